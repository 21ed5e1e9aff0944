"""Reinforcement learning on two processes of a device each is that of one process with two devices, and goes on when stopped."""

import json
import sys

import jax
import numpy as np
import pytest
from rl_places import write_model
from tasks_of_slurm import run_tasks
from test_rl import EVERYTHING, MODEL, steps

import run
from experiments.stages import load_stage
from lfm_jax.interop import import_folder
from lfm_jax.models import ComputeConfig
from lfm_jax.sharding import MeshConfig, make_mesh

# As run.py is started; but environments are those of the tests, and process 1 asks to be stopped when it takes its n-th batch.
CODE = """
import os, signal, sys
sys.path += ["tests/experiments"]
from rl_places import places
from test_rl import Bandit, Echo, Never
import jax
import run
from experiments import rl
from experiments.rl.batches import RolloutBatches
from experiments.stages import mesh_for

asked, taken, take = int(sys.argv.pop(1)), [], RolloutBatches.__next__

def counted(batches):
    taken.append(1)
    if jax.process_index() == 1 and len(taken) == asked:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(batches)

with places(Echo, Bandit(), Never()):
    rl.mesh_for, RolloutBatches.__next__ = mesh_for, counted
    run._process()
"""
SETTINGS = EVERYTHING | {
    "environments.names": "echo,bandit,never", "rollouts.prompts": 4, "rollouts.temperatures": "((1.0,2),(0.6,1),(0.0,1))",
    "rollouts.keep": None, "evaluation.problems": 1, "curriculum.cold_after": 2, "curriculum.probe_prompts": 1,
    "curriculum.probe_samples": 4, "train.steps": 9, "train.evaluate_every": 9,
    "optimizer.eps": 1e-4,  # else Adam makes of what rounding leaves of a small gradient as large a step as of any other
}  # fmt: skip


def learn(folder, name, processes, asked=0, **changes):
    """Exit codes and what was printed of a run of so many processes, two devices together."""
    settings = {"init_from": f"{folder}/model", **SETTINGS, **changes}
    given = [f"--config.{field}={value}" for field, value in settings.items()]
    command = [sys.executable, "-c", CODE, str(asked), "--config=configs/rl.py", f"--workdir={folder / name}", *given]
    return run_tasks(command, folder, name, processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one process; and of two, of which one was asked to stop in the midst of the first rollouts."""
    folder = tmp_path_factory.mktemp("rl_two_processes")
    write_model(MODEL, folder)
    codes, logs = learn(folder, "one", 1)
    assert codes == [0], logs
    codes, logs = learn(folder, "two", 2, asked=3)
    assert codes == [75, 75] and "and saved; the same command resumes" in logs[0], logs
    codes, logs = learn(folder, "two", 2)
    assert codes == [0, 0], logs
    return folder


def answers(workdir, batch):
    """Of a batch of rollouts, in the order of the prompts, whichever process has written them."""
    lines = [line for path in (workdir / "rollouts").glob(f"{batch:06d}*.jsonl") for line in path.read_text().splitlines()]
    records = sorted(map(json.loads, lines), key=lambda record: record["slot"])
    return [(record, answer) for record in records for answer in record["answers"]]


def test_each_process_answers_its_own_prompts(folder):
    slots = [
        [json.loads(line)["slot"] for line in path.read_text().splitlines()]
        for path in (folder / "two" / "rollouts" / f"000001-{index}-of-2.jsonl" for index in range(2))
    ]
    assert slots == [[0, 1], [2, 3]]


def test_answers_rewards_and_log_probabilities_are_those_of_one_process(folder):
    """Before the first update exactly, but for rounding; what that makes of later parameters, later figures show."""
    for batch in (1, 2):
        one, two = answers(folder / "one", batch), answers(folder / "two", batch)
        assert len(one) == len(two) == 16
        assert len({answer["reward"] for _, answer in one}) > 1
        for (record, expected), (other, found) in zip(one, two, strict=True):
            same = ("slot", "environment", "seed", "policy_step", "seq", "prompt_ids")
            assert [record[name] for name in same] == [other[name] for name in same]
            assert [expected[name] for name in ("token_ids", "kept", "rewards")] == [
                found[name] for name in ("token_ids", "kept", "rewards")
            ]
            of_the_trainer = ("old_log_probs", "reference_log_probs") if batch == 1 else ()
            for name in ("advantage", "token_advantages", "log_probs", *of_the_trainer):
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=f"{name} of {batch}")


def test_losses_and_figures_are_those_of_one_process(folder):
    """Also of the steps after those that the run was stopped at, and of those who are cold.

    Those of the second batch and later are of parameters in which Adam has made what rounding left of small gradients larger.
    """
    one, two = (steps(folder / name) for name in ("one", "two"))
    resumed = json.loads((folder / "two" / "results.json").read_text())["resumed_at_step"]
    assert 3 <= resumed < 9 and len(one) == len(two) == 9
    assert len({record["train/loss"] for record in one}) == 9
    for step, (expected, found) in enumerate(zip(one, two, strict=True), 1):
        assert found.keys() == expected.keys()
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if step <= 4 else {"rtol": 0.05, "atol": 0.01}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, **tolerance, err_msg=f"{name} of step {step}")
    assert json.loads((folder / "one" / "cold.json").read_text()).keys() == {"environments"}


def test_parameters_are_those_of_one_process(folder):
    """And the folder that the two have written has them."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    first, one, two = (load_stage(str(folder / name), ComputeConfig(), mesh).params for name in ("model", "one", "two"))
    moved, apart = (
        [float(np.abs(after - before).max()) for before, after in zip(*map(jax.tree.leaves, each), strict=True)]
        for each in ((first, one), (one, two))
    )
    assert all(0 <= difference < distance / 100 for difference, distance in zip(apart, moved, strict=True)), (apart, moved)
    jax.tree.map(np.testing.assert_array_equal, import_folder(folder / "two" / "export" / "hf").params, two)


def test_a_format_that_one_process_writes_is_refused_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    settings = {"init_from": "nowhere", "environments.names": "arithmetic", "export.formats": "hf,gguf"}
    given = [f"--config.{field}={value}" for field, value in settings.items()]
    assert run.main(["--config=configs/rl.py", f"--workdir={tmp_path / 'run'}", *given]) == 2
    assert "--config.export.formats: 2 processes write hf alone, and not gguf; set hf" in capsys.readouterr().err
