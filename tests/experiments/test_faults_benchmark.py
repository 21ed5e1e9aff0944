"""A short campaign: a run that four things happen to ends as the one that nothing happens to, and each is told."""

import json

import pytest

from experiments.benchmarks.faults import Config, main
from experiments.benchmarks.faults.campaign import differences_between
from experiments.benchmarks.faults.victim import KINDS
from experiments.results import read_results

FOUR = ("kill", "stuck", "raise", "flipped bit on disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    main(Config(faults=4, kinds=FOUR, seed=1, silent=6.0, stay=20.0), folder)
    return folder


@pytest.mark.heavy
def test_nothing_is_lost_and_all_is_told(folder):
    results = read_results(folder)
    rows = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert results["differences"] == [] and results["identical"], rows
    assert sorted(row["kind"] for row in rows) == sorted(FOUR)
    # On busy cores the watch may end a run before its fault has struck.
    watched = [row for row in rows if row["kind"] in ("kill", "stuck", "raise") and row["seconds"] is not None]
    assert all(0 < row["seconds_to_word"] <= row["seconds"] for row in watched), rows
    assert [results[name] for name in ("hung", "unexpected_exit_codes", "untold")] == [0, 0, 0], rows


@pytest.mark.heavy
def test_what_is_not_the_same_is_found(folder):
    """A logged figure, and a value of the last checkpoint."""
    metrics = folder / "hurt" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    record = json.loads(lines[30])
    metrics.write_text("".join([*lines[:30], json.dumps(record | {"train/loss": 0.5}) + "\n", *lines[31:]]))
    manifest = sorted((folder / "hurt" / "checkpoints").glob("*/manifest.json"))[-1]
    content = json.loads(manifest.read_text())
    content["leaves"]["step"]["fingerprint"] = "0" * 16
    manifest.write_text(json.dumps(content))
    assert differences_between(folder / "calm", folder / "hurt") == [
        "leaves of the last checkpoint", f"metrics of step {record['step']}"
    ]  # fmt: skip


def test_every_kind_comes_as_often_as_the_others():
    plan = Config(faults=3 * len(KINDS)).plan()
    assert {kind: plan.count(kind) for kind in plan} == dict.fromkeys(KINDS, 3)
    assert plan == Config(faults=3 * len(KINDS)).plan() != Config(faults=3 * len(KINDS), seed=1).plan()
    assert len(KINDS) >= 12


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="kinds has 'lightning'; known are kill, freeze"):
        Config(kinds=("lightning",))
    with pytest.raises(ValueError, match="faults must be at least 1, got 0"):
        Config(faults=0)
