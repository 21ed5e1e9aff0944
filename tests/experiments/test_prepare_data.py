"""The preparation as a user runs it: the figures, killed and started again, and its mistakes."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

import run

WORDS = [f"{first}{second}" for first in ("lorem", "ipsum", "dolor", "amet") for second in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,500 documents, every tenth of them a copy, and an evaluation set with a stretch of one."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    texts = [" ".join(["the", "of", *generator.choice(WORDS, 90)]) for _ in range(1500)]
    texts[5::10] = [text + " again" for text in texts[4::10]]
    (folder / "source").mkdir()
    (folder / "source" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": " ".join(texts[7].split()[20:40])}) + "\n")
    return folder


def command(corpus, workdir, *overrides):
    evaluation = [{"name": "planted", "source": str(corpus / "evaluation.jsonl")}]
    return [
        "--config=configs/prepare_data.py", f"--workdir={workdir}", f"--config.data.source={corpus / 'source'}",
        f"--config.steps.decontamination.evaluation={evaluation}", "--config.steps.near_duplicates.threshold=0.7",
        "--config.steps.difficulty.order=True", "--config.steps.difficulty.bucket_bytes=200000",
        "--config.steps.output.shard_bytes=300000", "--config.steps.part_documents=200", *overrides,
    ]  # fmt: skip


def content(workdir):
    kept = [path for folder in ("documents", "passes") for path in sorted((workdir / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in (*kept, workdir / "removed.jsonl")}


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared")
    assert run.main(command(corpus, workdir)) == 0
    return workdir


def test_the_figures_hang_together(prepared, corpus):
    figures = json.loads((prepared / "results.json").read_text())
    assert figures["documents_read"] == 1500 and figures["near_duplicates_removed_documents"] == 150
    assert figures["decontamination_removed_documents"] == 1 and figures["documents"] == 1500 - 151
    lost = sum(value for name, value in figures.items() if name.endswith("_removed_bytes"))
    assert figures["text_bytes_read"] == figures["text_bytes"] + lost
    size = sum(len(json.loads(line)["text"]) for line in (corpus / "source" / "texts.jsonl").read_text().splitlines())
    assert figures["text_bytes_read"] == size
    assert figures["files"] == len(list((prepared / "documents").glob("*.jsonl.zst"))) > 1
    removed = [json.loads(line) for line in (prepared / "removed.jsonl").read_text().splitlines()]
    assert len(removed) == 151 and removed[0]["duplicate_of"] == "texts.jsonl:5" and removed[0]["name"] == "texts.jsonl:6"
    assert figures["contamination"][0]["documents"] == 1 and figures["contamination"][0]["ngrams"] == 8
    assert figures["median_difficulty_bits_per_byte"] == figures["difficulty_quantiles"]["0.5"]


def test_killed_at_several_points_it_ends_with_the_same_bytes(prepared, corpus, tmp_path):
    """SIGKILL when another of its files has appeared: in the first pass, between passes, and while it writes."""
    arguments = [sys.executable, "run.py", *command(corpus, tmp_path)]
    awaited = ("passes/scan/part-00002", "passes/scan/scan.json", "passes/difficulty_model", ".documents.part/bucket-00000")
    for name in awaited:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
        while not (tmp_path / name).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (tmp_path / "documents").exists()
    assert run.main(command(corpus, tmp_path)) == 0
    assert content(tmp_path) == content(prepared)


def test_the_splits_are_those_of_the_source(corpus, tmp_path):
    counts = {}
    light = ["--config.data.held_out_share=0.3", "--config.steps.difficulty=None", "--config.steps.near_duplicates=None"]
    for split in ("train", "held_out"):
        arguments = command(corpus, tmp_path / split)
        arguments = [argument for argument in arguments if "difficulty" not in argument and "near" not in argument]
        assert run.main([*arguments, *light, f"--config.split={split}"]) == 0
        counts[split] = json.loads((tmp_path / split / "results.json").read_text())["documents_read"]
    assert sum(counts.values()) == 1500 and 350 < counts["held_out"] < 550


def test_bad_records_are_put_aside_up_to_a_limit(tmp_path, capsys):
    """In every pass, and from evaluation sets none."""
    texts = [json.dumps({"text": f"{seed} " * 60}) for seed in range(99)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*texts[:7], '{"text": null}', *texts[7:]]) + "\n")
    arguments = [
        "--config=configs/prepare_data.py:code", f"--config.data.source={tmp_path}/texts.jsonl",
        "--config.steps.near_duplicates=None", "--config.steps.difficulty.sample_bytes=20000",
    ]  # fmt: skip
    assert run.main([*arguments, f"--workdir={tmp_path}/run", "--config.bad_records_limit=0.02"]) == 0
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures["documents_read"] == figures["documents"] == 99 and figures["bad_records"] == 1
    (aside,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (aside["where"], aside["reason"]) == ("texts.jsonl:8", "no_text")
    assert run.main([*arguments, f"--workdir={tmp_path}/strict"]) == 2
    assert "--config.data: 1 of 100 records are bad, 1.000% where 0.100% may be: no_text 1" in capsys.readouterr().err
    evaluation = f"--config.steps.decontamination.evaluation=[{{'name': 'a', 'source': '{tmp_path}/texts.jsonl'}}]"
    assert run.main([*arguments, f"--workdir={tmp_path}/set", "--config.bad_records_limit=1", evaluation]) == 2
    assert "evaluation set 'a'" in capsys.readouterr().err
    assert run.main([*arguments, f"--workdir={tmp_path}/none", "--config.bad_records_limit=2"]) == 2
    assert "bad_records_limit must be a share from 0 to 1, got 2.0" in capsys.readouterr().err


def test_code_is_not_judged_as_prose(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "x = 1"}\n')
    for name, code in (("code", 0), ("", 2)):
        workdir = tmp_path / f"run{name}"
        config = f"--config=configs/prepare_data.py{name and ':'}{name}"
        source = f"--config.data.source={tmp_path / 'text'}"
        assert run.main([config, f"--workdir={workdir}", source, "--config.steps.difficulty=None"]) == code


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.data.source={corpus}/none"], "--config.data: source '{corpus}/none' does not exist"),
        (["--config.steps.near_duplicates.threshold=2"], "steps.near_duplicates: threshold must be above 0 and at most 1"),
        (["--config.steps.quality.min_words=1000"], "no document is left of 1500: quality removed 1500"),
        (
            ["--config.steps.decontamination.evaluation=[{{'name': 'a', 'source': '{corpus}/none'}}]"],
            "evaluation set 'a': source '{corpus}/none' does not exist",
        ),
    ],
)
def test_a_mistake_is_told_in_one_paragraph(overrides, message, corpus, tmp_path, capsys):
    overrides = [override.format(corpus=corpus) for override in overrides]
    assert run.main(command(corpus, tmp_path, *overrides)) == 2
    shown = capsys.readouterr().err
    assert message.format(corpus=corpus) in shown and shown.count("\n") == 1


def test_several_processes_are_refused(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert run.main(command(corpus, tmp_path)) == 2
    assert "preparation runs in one process, 2 are there: run it by itself" in capsys.readouterr().err
