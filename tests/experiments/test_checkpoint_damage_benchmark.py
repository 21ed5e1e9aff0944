"""The benchmark damages what it says, and knows what is noticed from what is not."""

import collections
import json
import re
import warnings

import numpy as np
import pytest
from etils import epath

from experiments.benchmarks import checkpoint_damage
from experiments.benchmarks.checkpoint_damage import KINDS, Config, damages
from lfm_jax.training import CheckpointWarning
from lfm_jax.training.checkpoint import Restored


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    workdir = tmp_path_factory.mktemp("damage")
    config = Config(flips=18, flips_anywhere=8, truncations=9, zeroed_blocks=9, scrub_every=9)
    checkpoint_damage.main(config, epath.Path(workdir))
    return json.loads((workdir / "results.json").read_text())


def test_damage_to_any_file_is_noticed_and_named(results):
    assert results["damages"] == 18 + 8 + 9 + 9 + len(results["files"]) == results["noticed"] + results["unused"]
    assert [results[outcome] for outcome in ("wrong_values", "unnamed", "error", "crash", "hang")] == [0] * 5
    assert results["scrubbed"] >= 5 and results["scrub_differs"] == 0 and results["whole_again"]
    assert all("d/" in each["file"] and each["outcome"] == "unused" for each in results["not_noticed"])
    # Ours, Orbax's and TensorStore's; the largest is read by its values alone.
    assert {"manifest.json", "state/_CHECKPOINT_METADATA", "state/state/_METADATA", "state/state/manifest.ocdbt"} <= set(
        results["files"]
    )
    assert max(results["files"].values()) > 1 << 20


def test_every_file_is_hit_by_every_kind(results):
    rows = {row["damage"]: row for row in results["rows"]}
    assert list(rows) == list(KINDS)
    filled = sum(size > 0 for size in results["files"].values())
    assert filled == 9 and rows["deletion"]["files"] == len(results["files"])
    assert [rows[kind]["files"] for kind in ("flip in each file", "truncation", "zeroed block")] == [filled] * 3


def test_a_damage_is_one_bit_or_a_cut_or_a_block(tmp_path):
    (tmp_path / "state").mkdir()
    large, small, empty = tmp_path / "state" / "large", tmp_path / "small", tmp_path / "empty"
    originals = {large: bytes(range(1, 201)) * 40, small: b"some words", empty: b""}
    for file, data in originals.items():
        file.write_bytes(data)
    config = Config(flips=40, flips_anywhere=60, truncations=20, zeroed_blocks=20, seed=3)
    found = list(damages(tmp_path, config))
    assert found == list(damages(tmp_path, config)) != list(damages(tmp_path, Config(flips=40, seed=4)))
    assert collections.Counter(damage.kind for damage in found) == dict(zip(KINDS, (40, 60, 20, 20, 3), strict=True))
    for damage in found:
        data = originals[damage.file]
        if damage.kind.startswith("flip"):
            assert len(damage.content) == len(data)
            changed = [(place, a ^ b) for place, (a, b) in enumerate(zip(data, damage.content, strict=True)) if a != b]
            bit, place = map(int, re.fullmatch(r"bit (\d) of byte (\d+)", damage.what).groups())
            assert changed == [(place, 1 << bit)]
        elif damage.kind == "truncation":
            assert len(damage.content) < len(data) and data.startswith(damage.content)
        elif damage.kind == "zeroed block":
            begin, zeros = damage.content.index(0), damage.content.count(0)
            assert damage.content == data[:begin] + bytes(zeros) + data[begin + zeros :] and zeros <= 512
        else:
            assert damage.content is None
    anywhere = collections.Counter(damage.file.name for damage in found if damage.kind == "flip anywhere")
    assert anywhere["large"] > 50


class _Restores:
    """In place of the checkpoints of a run: what is restored, and what is told."""

    def __init__(self, step, told, off=0):
        self.step, self.told, self.off = step, told, off

    def __call__(self, folder):
        return self

    def restore(self, wanted):
        for text in self.told:
            warnings.warn(text, CheckpointWarning, stacklevel=1)
        state = checkpoint_damage._values(self.step + self.off, 4)._replace(step=np.int32(self.step))
        return Restored(self.step, state, {"at": self.step}, {}, {})


@pytest.mark.parametrize(
    ("restores", "outcome"),
    [
        (_Restores(100, ["a/00000200 is damaged and not used: it is"]), "noticed"),
        (_Restores(100, []), "unnamed"),
        (_Restores(100, ["a/00000300 is damaged and not used: it is"]), "unnamed"),
        (_Restores(200, []), "unused"),
        (_Restores(200, [], off=1), "wrong values"),
        (_Restores(100, ["a/00000200 is damaged and not used: it is"], off=1), "wrong values"),
    ],
)
def test_an_outcome_is_judged_by_what_was_saved(tmp_path, monkeypatch, restores, outcome):
    monkeypatch.setattr("lfm_jax.training.Checkpoints", restores)
    assert checkpoint_damage._judge(tmp_path, 4, None) == outcome


@pytest.mark.parametrize(
    ("does", "answer"),
    [
        ("exit 7", {"outcome": "crash", "whole": None, "text": "exit code 7"}),
        ("kill -11 $$", {"outcome": "crash", "whole": None, "text": "exit code -11"}),
        ("read more", {"outcome": "hang", "whole": None}),
    ],
)
def test_a_reader_that_dies_or_waits_is_counted_and_another_takes_its_place(tmp_path, monkeypatch, does, answer):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '\"ready\"'\nread line\necho \"\\\"$line\\\"\"\nread line\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(checkpoint_damage.sys, "executable", str(program))
    reader = checkpoint_damage._Reader(tmp_path, 4)
    try:
        for _ in range(2):
            assert reader.ask(scrub=False) == "false"
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint_damage, "_MOST_WAIT_SECONDS", 0.5 if does == "read more" else 100)
                assert reader.ask(scrub=True) == answer
    finally:
        reader.close()


def test_a_reader_that_does_not_start_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_damage.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"the process that reads did not start \(.*exit code 1.*reader.log says why"):
        checkpoint_damage._Reader(tmp_path, 4).start()


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="scrub_every and embed_rows must be at least 1, got 0 and 800"):
        Config(scrub_every=0)
