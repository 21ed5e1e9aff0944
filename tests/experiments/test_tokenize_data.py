"""The command that tokenizes: killed and given again, it ends with the bytes of a run that was never disturbed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import run
from data_pipelines import load_tokenizer, read_token_shards
from experiments.tokenize_data import Config

WORDS = "the cat sat on a mat while one dog ran after two birds that sang in their tree".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty small files."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(60):
        texts = [" ".join(WORDS[(number * word + line) % len(WORDS)] for word in range(300)) for line in range(60)]
        (folder / f"{number:02}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(source, workdir, *more):
    return [
        "--config=configs/tokenize_data.py", f"--workdir={workdir}", f"--config.data.source={source}",
        "--config.tokenizer.vocab_size=340", "--config.tokenizer.train_bytes=100000", "--config.tokenization.unit_bytes=100000",
        "--config.tokenization.shard_tokens=20000", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """The workdir of a run in one process."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with contextlib.chdir(ROOT):
        assert run.main(command(source, workdir, "--config.tokenization.workers=1")) == 0
    return workdir


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_given_again_the_command_writes_the_same_bytes(source, undisturbed, tmp_path):
    arguments = command(
        source, tmp_path / "killed", f"--config.tokenizer_from={undisturbed / 'tokenizer'}", "--config.splits=train",
        "--config.tokenization.workers=2",
    )  # fmt: skip
    part = tmp_path / "killed" / "tokens" / ".train.part"
    with subprocess.Popen([sys.executable, "run.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE) as process:
        while len(list(part.glob("unit-*.json"))) < 3:
            assert process.poll() is None, "the run was over before it could be killed"
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # which ends when the last of its processes, which share its output, has ended
    finished = _finished(part)
    assert 3 <= len({name.split("-")[1] for name in finished}) < 60 and not (part / "index.json").exists()
    with contextlib.chdir(ROOT):
        assert run.main(arguments) == 0
    assert contents(tmp_path / "killed" / "tokens" / "train") == contents(undisturbed / "tokens" / "train")
    after = {path.name: _identity(path) for path in (tmp_path / "killed" / "tokens" / "train").iterdir()}
    assert {name: after[name] for name in finished} == finished  # not written again


def _finished(part: Path):
    """Identities of the files of tokens of the units that are finished."""
    records = [json.loads(path.read_text()) for path in part.glob("unit-*.json")]
    names = [shard["file"] for record in records for shard in record["shards"]]
    return {name: _identity(part / name) for name in names}


def _identity(path: Path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_the_figures_are_those_of_the_shards(source, undisturbed):
    figures = json.loads((undisturbed / "results.json").read_text())
    tokenizer = load_tokenizer(undisturbed / "tokenizer")
    texts = []
    for split in ("train", "held_out"):
        shards = read_token_shards(undisturbed / "tokens" / split, tokenizer, check_contents=True)
        assert figures[f"{split}_documents"] == len(shards) and figures[f"{split}_shards"] == len(shards.shards)
        assert figures[f"{split}_tokens"] == sum(shards.lengths) and figures[f"{split}_bad_records"] == 0
        assert figures[f"{split}_bytes_per_token"] == pytest.approx(shards.text_bytes / shards.tokens)
        texts += [tokenizer.decode(shards[index]) for index in range(len(shards))]
    written = [json.loads(line)["text"] for path in sorted(source.iterdir()) for line in path.read_text().splitlines()]
    assert sorted(texts) == sorted(written)


def test_beam_does_it_too(source, undisturbed, tmp_path):
    pytest.importorskip("apache_beam")
    arguments = command(
        source, tmp_path / "beam", f"--config.tokenizer_from={undisturbed / 'tokenizer'}", "--config.runner=beam",
        "--config.beam_options=--runner=DirectRunner,--direct_num_workers=1", "--config.splits=held_out",
    )  # fmt: skip
    with contextlib.chdir(ROOT):
        assert run.main(arguments) == 0
    assert contents(tmp_path / "beam" / "tokens" / "held_out") == contents(undisturbed / "tokens" / "held_out")
    assert not (tmp_path / "beam" / "tokens" / "train").exists()


def test_what_cannot_be_done_is_refused(source, tmp_path, capsys):
    with pytest.raises(ValueError, match="splits is empty; name train, held_out or both"):
        Config(data=None, splits=())
    with pytest.raises(ValueError, match=r"beam_options \('--runner=X',\) say nothing to the runner 'local'; set runner to beam"):
        Config(data=None, beam_options=("--runner=X",))
    with contextlib.chdir(ROOT):
        assert run.main(command(source / "nowhere", tmp_path / "run")) == 2
    assert "--config.data: source" in capsys.readouterr().err


def test_bad_records_are_put_aside_while_a_tokenizer_is_trained_too(source, tmp_path, capsys):
    """Whose training ends where they are too many, with the records named, as tokenization does."""
    (tmp_path / "text").mkdir()
    dirty = tmp_path / "text" / "dirty.jsonl"
    dirty.write_bytes((source / "00.jsonl").read_bytes() * 20 + b"no json\n")
    with contextlib.chdir(ROOT):
        assert run.main(command(tmp_path / "text", tmp_path / "some")) == 0
    (aside,) = (tmp_path / "some" / "tokenizer_quarantine.jsonl").read_text().splitlines()
    assert json.loads(aside)["where"] == "dirty.jsonl:1201"
    with contextlib.chdir(ROOT):
        assert run.main(command(tmp_path / "text", tmp_path / "none", "--config.tokenization.bad_records_limit=0")) == 2
    assert "records are bad, 0.088% where 0.000% may be: no_json 1. The first is dirty.jsonl:1201" in capsys.readouterr().err
    assert not (tmp_path / "none" / "tokenizer").exists()
