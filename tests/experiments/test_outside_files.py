"""Damaged and hostile files of every format: a short form of the benchmark, read in this process where that is safe."""

import json
import random

import pytest
from etils import epath

from experiments.benchmarks import outside_files
from experiments.benchmarks.outside_files import BAD, GOOD, Config, Outcome, Trial, mutate
from experiments.benchmarks.outside_formats import FORMATS

MUTANTS = 40
# Each of these takes a process of its own, or reads a model, so that fewer must do.
SLOW = {"tokenizer.json": 8, "chat template": 6, "safetensors, no manifest": 25, "export with its manifest": 25}
# Files of hundreds of megabytes, and those that are stopped after seconds.
LONG = {
    "hundred_megabytes", "header_99_megabytes", "no_newline", "blanks", "objects", "bomb", "huge", "million_tensors", "many_axes",
    "many", "loops", "lipsum", "replace_12", "join", "center", "format",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_a_clear_error_or_no_damage(name, tmp_path):
    trial = Trial(name, epath.Path(tmp_path), seed=1)
    cases = [case for case in FORMATS[name].crafted if case not in LONG]
    if name in ("tokenizer.json", "chat template"):
        cases = cases[:: 1 + len(cases) // 10]
    for case in [*cases, *range(SLOW.get(name, MUTANTS))]:
        what, outcome = trial.run(case)
        assert outcome.kind in GOOD, (case, what, outcome)
    assert trial.read() == trial.expected


def test_each_damage_is_done_and_is_always_the_same():
    data = b'{"a": 123, "b": [4.5, "text"]}' * 40
    done = {}
    for seed in range(200):
        name, changed = mutate(data, random.Random(seed))
        assert (name, changed) == mutate(data, random.Random(seed))
        done.setdefault(name, []).append(changed)
    assert set(done) == {"flip", "32_bytes", "truncate", "zeros", "8_bytes", "integer", "append", "duplicate"}
    assert all(len(changed) == len(data) for changed in done["flip"])
    assert all(sum(a != b for a, b in zip(data, changed, strict=True)) == 1 for changed in done["flip"])
    assert all(changed.startswith(data) and len(changed) > len(data) for changed in done["append"])
    assert all(data.startswith(changed) for changed in done["truncate"])


def _format(read, digest=True):
    return FORMATS["text"]._replace(read=read, digest=digest, marker="a.txt", crafted={})


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("read", "digest", "kind"),
    [
        (lambda: "same", True, "same result"),
        (lambda: "other", True, "silently wrong"),
        (lambda: "other", False, "other result, no digest"),
        (lambda: _raise(ValueError("a.txt is damaged")), True, "clear error"),
        (lambda: _raise(FileNotFoundError("a.txt")), True, "clear error"),
        (lambda: _raise(ValueError("something is damaged")), True, "unclear error"),
        (lambda: _raise(UnicodeDecodeError("utf-8", b"a", 0, 1, "a.txt")), True, "unclear error"),
        (lambda: _raise(RecursionError("a.txt")), True, "unclear error"),
        (lambda: _raise(MemoryError()), True, "unclear error"),
        (lambda: bytearray(b"a") * 500_000_000 and "same", True, "growth"),
        (lambda: sum(range(10_000_000)) and "same", True, "hang"),
    ],
    ids=range(11),
)
def test_what_becomes_of_a_file_is_told_apart(read, digest, kind, tmp_path, monkeypatch):
    """With a limit that the last two, and only these, are above: each its own.

    Far above it: what else the process held may leave memory meanwhile, pages of libraries among it.
    """
    answers = iter([lambda: "same", read])
    monkeypatch.setitem(FORMATS, "text", _format(lambda folder: next(answers)(), digest))
    monkeypatch.setattr(outside_files, "MOST_GROWTH_BYTES", 100_000_000)
    if kind == "hang":
        monkeypatch.setattr(outside_files, "MOST_SECONDS", 0.05)
    _, outcome = Trial("text", epath.Path(tmp_path), seed=0).run(0)
    assert outcome.kind == kind


def test_a_worker_that_dies_is_replaced_and_counted(tmp_path, monkeypatch):
    """Real workers: the second kind is asked for a format that they do not have, and dies of it."""
    found = list(outside_files.try_format("Parquet", 1, 0))
    assert [case for case, _, _ in found] == ["magic", 0] and {outcome.kind for *_, outcome in found} <= set(GOOD)
    monkeypatch.setitem(FORMATS, "no such", FORMATS["text"]._replace(crafted={}))  # not in the worker
    ((case, _, outcome),) = outside_files.try_format("no such", 1, 0)
    assert (case, outcome.kind, outcome.detail) == (0, "crash", "exit code 1")


def test_figures_and_faults_are_written(tmp_path, monkeypatch):
    outcomes = [
        ("deep", "deep", Outcome("clear error", "ValueError: a", 0.5, 10)),
        (0, "flip", Outcome("same result", "", 0.1, 3_000_000)),
        (1, "zeros", Outcome("crash", "exit code -6", 0.0, 0)),
    ]
    monkeypatch.setattr(outside_files, "try_format", lambda name, mutants, seed: iter(outcomes))
    outside_files.main(Config(formats=("text", "Parquet"), mutants=2, processes=1), epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clear_error"] == results["same_result"] == results["crash"] == 2 and results["hang"] == 0
    assert results["rows"][0]["files"] == 3 and results["rows"][0]["errors"] == {"ValueError": 1}
    fault = {"case": 1, "damage": "zeros", "outcome": "crash", "detail": "exit code -6"}
    assert results["faults"] == [{"format": name, **fault} for name in ("text", "Parquet")]
    table = (tmp_path / "outside_files.md").read_text().splitlines()
    assert table[0] == f"| format | files | {' | '.join(GOOD + BAD)} | longest, s | growth, MB |"
    assert table[2] == "| text | 3 | 1 | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 0.5 | 3 |"


def test_a_format_that_is_none_is_refused():
    with pytest.raises(ValueError, match="formats: 'jsonl' is none. "):
        Config(formats=("jsonl",))
    with pytest.raises(ValueError, match="mutants and processes must not be negative or none, got -1 and 2"):
        Config(mutants=-1)
