"""Pre-training on two processes, from text to an exported model: it is that of one process with the devices of both."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tasks_of_slurm import run_tasks
from test_pretrain import command, losses, results, sentences

from experiments.stages import load_stage
from lfm_jax.interop import import_folder
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig, make_mesh

SETTINGS = ("--config.train.steps=6", "--config.train.evaluate_every=6", "--config.export.max_shard_bytes=20000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """one and two: workdirs of runs that have ended."""
    folder = tmp_path_factory.mktemp("pretrain_two_processes")
    (folder / "text").mkdir()
    for seed in range(60):
        (folder / "text" / f"{seed}.txt").write_text(sentences(seed))
    for name, processes in (("one", 1), ("two", 2)):
        given = [sys.executable, "run.py", *command(folder / "text", folder / name, *SETTINGS)]
        codes, logs = run_tasks(given, folder, name, processes)
        assert codes == [0] * processes, logs
    return folder


def test_figures_are_those_of_one_process(folder):
    one, two = (losses(folder / name) for name in ("one", "two"))
    assert len(one) == 6 and one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    expected, found = (results(folder / name) for name in ("one", "two"))
    assert found.keys() == expected.keys()
    assert found["nll_per_token"] == pytest.approx(expected["nll_per_token"], rel=1e-5)
    assert found["samples"] == expected["samples"]


def test_each_figure_is_written_once(folder):
    """By the first process: two that write to one file tear it."""
    steps = [json.loads(line)["step"] for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    assert "results.json" in (folder / "two-0.log").read_text() and "results.json" not in (folder / "two-1.log").read_text()


def test_the_model_is_exported_whole(folder):
    """In several shards, of arrays that were split over both processes."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    export = folder / "two" / "export" / "hf"
    stage = load_stage(str(folder / "two"), ComputeConfig(), mesh)
    jax.tree.map(np.testing.assert_array_equal, import_folder(export).params, stage.params)
    assert len(list(export.glob("*.safetensors"))) > 1
    subprocess.run(["sha256sum", "-c", "--strict", "MANIFEST.sha256"], cwd=export, check=True, capture_output=True)
    expected = load_stage(str(folder / "one"), ComputeConfig(), mesh).params
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, one, rtol=0, atol=1e-5), expected, stage.params)
