"""Scrub says of each part of a run whether it is as it was written, and by its code whether all of it is."""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import run
from data_pipelines import read_token_shards
from experiments import scrub
from lfm_jax.interop.export_manifest import write_manifest
from lfm_jax.training import Checkpoints


class State(NamedTuple):
    step: jax.Array
    kernel: jax.Array


KERNEL = np.random.default_rng(0).standard_normal((600, 500), np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with two checkpoints, one that was not finished, an export and metrics."""
    folder = tmp_path_factory.mktemp("scrub") / "run"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (10, 20):
            checkpoints.save(State(jnp.int32(step), jnp.array(KERNEL + step)), data_state={}, config={})
    (folder / "checkpoints" / "00000030" / "state.tmp").mkdir(parents=True)
    (folder / "export" / "hf").mkdir(parents=True)
    (folder / "export" / "hf" / "config.json").write_text('{"vocab_size": 32}')
    (folder / "export" / "gguf").mkdir()
    (folder / "export" / "gguf" / "model-Q4_0.gguf").write_bytes(b"GGUF and more")
    (folder / "export" / "model.pte").write_bytes(b"a program")
    for export in ("export/hf", "export/gguf", "export"):
        write_manifest(epath.Path(folder / export), {})
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 3.0}\n')
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def scrubbed(*runs: Path) -> tuple[dict[str, str], dict]:
    """(state by what, of the last run; results.json)."""
    workdir = runs[0].parent / "scrub"
    workdir.mkdir(exist_ok=True)
    config = scrub.Config(runs=tuple(map(str, runs)))
    try:
        scrub.main(config, epath.Path(workdir))
        ended = None
    except scrub.Damaged as damaged:
        ended = damaged.code
    results = json.loads((workdir / "results.json").read_text())
    assert ended == (1 if results["damaged"] else None)
    return {part["what"]: part["state"] for part in results["parts"] if part["run"] == str(runs[-1])}, results


WHOLE = {
    "checkpoint of step 10": "whole",
    "checkpoint of step 20": "whole",
    "checkpoint of step 30": "not finished, and not used",
    "export/hf": "whole",
    "export": "whole",
    "export/gguf": "whole",
    "metrics.jsonl": "whole",
}


def test_damaged_metrics_are_found(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "tr{"step": 2}\n{"step": 3}\n')
    states, results = scrubbed(folder)
    assert results["damaged"] == 1 and states["metrics.jsonl"].endswith("metrics.jsonl:1 is damaged and left out")


def test_a_whole_run_is_whole_and_its_steps_are_marked(folder):
    states, results = scrubbed(folder)
    assert states == WHOLE and results["looked_at"] == 7 and results["damaged"] == 0
    marked = sorted(path.parent.name for path in (folder / "checkpoints").glob("*/verified"))
    assert marked == ["00000010", "00000020"]
    assert scrubbed(folder)[0] == WHOLE  # the marks are none of the files that were written


def flip(file: Path, piece: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(piece) + len(piece) // 2] ^= 4
    file.write_bytes(data)


def flip_a_value(step: Path) -> None:
    piece = (KERNEL + int(step.name))[1, :4].tobytes()
    (file,) = (file for file in (step / "state").rglob("*") if file.is_file() and piece in file.read_bytes())
    flip(file, piece)


@pytest.mark.parametrize(
    ("what", "damage", "text"),
    [
        (
            "checkpoint of step 20",
            lambda run: flip_a_value(run / "checkpoints/00000020"),
            r"state/.* is not as it was written: its crc32 does not fit",
        ),
        (
            "checkpoint of step 10",
            lambda run: flip(run / "checkpoints/00000010/manifest.json", b'"step": 10'),
            "manifest.json is not as it was written for this step: its digest does not fit|manifest.json cannot be read",
        ),
        (
            "checkpoint of step 10",
            lambda run: (run / "checkpoints/00000010/state/_CHECKPOINT_METADATA").unlink(),
            "state/_CHECKPOINT_METADATA is missing",
        ),
        ("export/hf", lambda run: flip(run / "export/hf/config.json", b"vocab"), "config.json is not the file that was exported"),
        ("export/gguf", lambda run: flip(run / "export/gguf/model-Q4_0.gguf", b"and"), "Q4_0.gguf is not the file that was"),
        ("export", lambda run: (run / "export/model.pte").unlink(), "model.pte is missing, which MANIFEST.sha256 lists"),
    ],
    ids=["value", "manifest", "missing", "export", "gguf", "program"],
)  # fmt: skip
def test_each_part_that_is_damaged_is_named(folder, what, damage, text):
    damage(folder)
    states, results = scrubbed(folder)
    assert re.search(text, states[what]), states[what]
    assert {**states, what: "whole"} == WHOLE and results["damaged"] == 1


def test_the_mark_of_a_damaged_step_goes(folder):
    scrubbed(folder)
    flip_a_value(folder / "checkpoints/00000020")
    scrubbed(folder)
    assert [path.parent.name for path in (folder / "checkpoints").glob("*/verified")] == ["00000010"]


def test_several_runs_are_looked_through(whole, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "export/hf/config.json").write_text("{}")
    states, results = scrubbed(folder, tmp_path / "empty")
    assert states == {"metrics.jsonl": "whole"} and results["looked_at"] == 8 and results["damaged"] == 1


def test_tokens_are_read_whole(folder, monkeypatch):
    (folder / scrub.TOKENS / "train").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(scrub, "read_token_shards", lambda path, check_contents: asked.append((path.name, check_contents)))
    assert scrubbed(folder)[0] == {**WHOLE, "tokens of train": "whole"} and asked == [("train", True)]
    monkeypatch.setattr(scrub, "read_token_shards", read_token_shards)
    states, results = scrubbed(folder)
    assert states["tokens of train"] != "whole" and results["damaged"] == 1


def test_what_is_no_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"runs: .*nothing is no folder; name workdirs of runs\."):
        scrub.main(scrub.Config(runs=(str(tmp_path / "nothing"),)), epath.Path(tmp_path))
    with pytest.raises(ValueError, match="give runs, the workdirs to look through: --config.runs=WORKDIR,WORKDIR"):
        scrub.Config(runs=())


def test_the_exit_code_is_that_of_the_command(folder, tmp_path, monkeypatch):
    arguments = ["--config=configs/scrub.py", f"--workdir={tmp_path / 'out'}", f"--config.runs={folder}"]
    assert run.main(arguments) == 0
    (folder / "export/hf/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="1"):
        run.main(arguments)
