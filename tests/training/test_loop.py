"""The training loop: stopped and resumed it is the same run, and what goes wrong is said."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.configuration import ConfigError
from lfm_jax.models import Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    SilentCorruption,
    TrainConfig,
    checkpoint_manifest,
    loop,
    make_optimizer,
    next_token_objective,
    train,
)
from lfm_jax.training.metrics import is_of_the_machine, read_metrics
from lfm_jax.training.state import parameter_shardings
from lfm_jax.training.stopping import Interrupted, stop_requests
from lfm_jax.training.trouble import TrainingDiverged, TroubleConfig

MODEL = ModelConfig(
    vocab_size=31, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)
FUNCTIONS = functional(lambda rngs: Decoder(MODEL, rngs=rngs))
CONFIG = TrainConfig(steps=12, log_every=1, evaluate_every=5, checkpoint_every=4)


class Batches:
    """Random tokens, a function of the step alone; at step `at` (from 1) it calls `then` first."""

    def __init__(self, at=None, then=None):
        self.step, self.at, self.then = 0, at, then

    def __next__(self):
        self.step += 1
        if self.step == self.at:
            self.then()
        tokens = np.random.default_rng(self.step).integers(0, 31, (8, 11)).astype(np.int32)
        ones = np.ones((8, 10), np.int32)
        return {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones,
            "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1, "loss_mask": ones.astype(np.float32),
        }  # fmt: skip

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def drawing(model, batch, key):
    """Next-token loss that also records a random number of the step."""
    sums = next_token_objective(LossConfig())(model, batch, key)
    return sums._replace(metrics=sums.metrics | {"draw": jax.random.uniform(key) * sums.weight})


def run(workdir, batches=None, config=CONFIG, **changes):
    arguments = {
        "functions": FUNCTIONS, "optimizer": make_optimizer(OptimizerConfig(learning_rate=1e-2), config.steps),
        "objective": drawing, "batches": batches or Batches(), "mesh": make_mesh(MeshConfig(), jax.devices()[:1]),
        "workdir": workdir, "run_config": {"name": "test"},
    }  # fmt: skip
    return train(config, **arguments | changes)


def records(workdir):
    """What was logged, without the times; every digit."""
    return [{name: value for name, value in record.items() if not is_of_the_machine(name)} for record in read_metrics(workdir)]


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours.state, theirs.state)


def checkpoint_steps(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, result) of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


def test_every_due_step_is_logged(whole):
    workdir, trained = whole
    logged = records(workdir)
    assert [record["step"] for record in logged] == list(range(1, 13)) and trained.started_at == 0
    assert {"step", "train/loss", "train/nll", "train/gradient_norm", "train/learning_rate", "train/tokens"} <= set(logged[0])
    assert checkpoint_steps(workdir) == [4, 8, 12]
    assert int(trained.state.step) == 12


def test_tokens_per_second_leave_the_first_step_out(whole):
    """It compiles."""
    timed = ["train/tokens_per_second" in record for record in read_metrics(whole[0])]
    assert timed == [False] + [True] * 11


def test_rng_differs_each_step_after_resume(whole):
    draws = [record["train/draw"] for record in records(whole[0])]
    assert len(set(draws)) == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_bit_for_bit_the_same(whole, tmp_path, number, capsys):
    """Between two checkpoints: the step that runs is finished and saved."""
    with pytest.raises(Interrupted) as stop:
        run(tmp_path, Batches(6, lambda: os.kill(os.getpid(), number)))
    assert stop.value.code == 75
    assert "stopped after step 6 of 12 and saved; the same command resumes" in capsys.readouterr().out
    assert checkpoint_steps(tmp_path) == [4, 6]
    resumed = run(tmp_path)
    assert resumed.started_at == 6
    assert_same(resumed, whole[1])
    assert records(tmp_path) == records(whole[0])


def test_a_crashed_run_continues_bit_for_bit_the_same(whole, tmp_path):
    """It goes back to the last checkpoint, and what was logged since comes again."""

    def crash():
        raise ConnectionError("the data's server went away")

    with pytest.raises(ConnectionError):
        run(tmp_path, Batches(11, crash))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))
    resumed = run(tmp_path)
    assert resumed.started_at == 8
    assert_same(resumed, whole[1])
    assert records(tmp_path) == records(whole[0])


def test_a_finished_run_is_left_as_it_is(whole):
    before = records(whole[0])
    again = run(whole[0], Batches(1, lambda: pytest.fail("asked for a batch")))
    assert again.started_at == 12 and records(whole[0]) == before
    assert_same(again, whole[1])


def test_a_second_signal_ends_at_once():
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            with stop_requests() as stop:
                os.kill(os.getpid(), signal.SIGINT)
                assert stop.requested
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_evaluations_are_logged_and_the_last_step_has_one(tmp_path):
    seen = []

    def evaluate(params, buffers):
        seen.append(jax.tree.map(np.asarray, params))
        return {"bits_per_byte": float(len(seen))}

    trained = run(tmp_path, evaluate=evaluate)
    logged = {record["step"]: record["eval/bits_per_byte"] for record in records(tmp_path) if "eval/bits_per_byte" in record}
    assert logged == {5: 1.0, 10: 2.0, 12: 3.0}
    jax.tree.map(np.testing.assert_array_equal, seen[-1], jax.tree.map(np.asarray, trained.state.params))


def test_given_parameters_are_begun_with(tmp_path):
    given, expected = FUNCTIONS.init(jax.random.key(7)), FUNCTIONS.init(jax.random.key(7))
    frozen = make_optimizer(OptimizerConfig(learning_rate=1e-30, weight_decay=0.0), 1)
    trained = run(tmp_path, config=dataclasses.replace(CONFIG, steps=1), optimizer=frozen, initial=given)
    jax.tree.map(np.testing.assert_array_equal, trained.state.params, expected[0])


def test_given_arrays_are_gone_in_a_new_run_and_in_one_that_goes_on(tmp_path):
    """On a mesh whose replicas split the state: what is given is not split like that, and is copied."""
    mesh, config = make_mesh(MeshConfig(data=2, fsdp=4)), dataclasses.replace(CONFIG, steps=1)
    expected = FUNCTIONS.init(jax.random.key(7))
    frozen = make_optimizer(OptimizerConfig(learning_rate=1e-30, weight_decay=0.0), 1)
    shardings = parameter_shardings(FUNCTIONS, mesh)
    for started_at in (0, 1):
        params, buffers = FUNCTIONS.init(jax.random.key(7))
        given = jax.device_put(params, shardings), buffers
        trained = run(tmp_path, config=config, optimizer=frozen, initial=given, mesh=mesh)
        assert trained.started_at == started_at and all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        jax.tree.map(np.testing.assert_array_equal, trained.state.params, expected[0])


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path):
    def objective(model, batch, key):
        sums = next_token_objective(LossConfig())(model, batch, key)
        return sums._replace(loss=jnp.where(jnp.sum(batch["tokens"]) == totals[7], jnp.nan, 1.0) * sums.loss)

    batches = Batches()
    totals = [int(next(batches)["tokens"].sum()) for _ in range(8)]
    assert totals[7] not in totals[:7]
    with pytest.raises(TrainingDiverged, match="loss is nan at step 8; gradient_norm is nan at step 8. Loss"):
        run(tmp_path, objective=objective)
    assert checkpoint_steps(tmp_path) == [4]


def test_a_failed_save_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(Exception, match="checkpoints"):
        run(tmp_path)


def test_model_flops_utilization_is_flops_over_the_peak_of_all_devices(tmp_path, monkeypatch):
    from lfm_jax.sharding.chips import CHIPS
    from lfm_jax.training import record

    monkeypatch.setattr(record, "chip_of", lambda device: CHIPS["v5e"])
    run(tmp_path, flops_per_token=lambda step: 3e9 if step <= 6 else 5e9)
    timed = [record for record in read_metrics(tmp_path) if "train/tokens_per_second" in record]
    for values in timed:
        flops = 3e9 if values["step"] <= 6 else 5e9
        expected = flops * values["train/tokens_per_second"] / (8 * 197e12)
        assert values["train/model_flops_utilization"] == pytest.approx(expected)
    assert len(timed) == 11


@pytest.mark.parametrize("name", ["steps", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"])
def test_a_count_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**{"steps": 1, name: 0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keep_every": 0}, "keep_every must be at least 1, or None, got 0"),
        ({"keep_best": -1}, "keep_best must not be negative, got -1"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_run(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **changes)


def test_the_best_by_a_figure_are_kept_and_one_that_is_none_is_told_at_the_first_evaluation(tmp_path):
    found = iter([0.1, 0.3, 0.2])
    evaluate = lambda params, buffers: {"accuracy": next(found), "limit": 0.0}
    best = dataclasses.replace(CONFIG, evaluate_every=4, keep_checkpoints=1, keep_best=1)
    message = "train.best_by: the evaluation has no figure 'acuracy'. Did you mean 'accuracy'. Valid choices: accuracy, limit"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, config=dataclasses.replace(best, best_by="acuracy"), evaluate=lambda *_: {"accuracy": 1.0, "limit": 0.0})
    assert checkpoint_steps(tmp_path) == [4], "what was trained until then is not lost"
    (tmp_path / "other").mkdir()
    run(tmp_path / "other", config=dataclasses.replace(best, best_by="-accuracy"), evaluate=evaluate)
    assert checkpoint_steps(tmp_path / "other") == [8, 12]
    assert best.score({}) is None


def test_the_record_up_to_a_checkpoint_is_safe_before_the_checkpoint_is(tmp_path, monkeypatch):
    """What has not been synced is gone with the power, and behind a checkpoint nothing comes again."""
    safe, held = [0], []

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/metrics.jsonl"):
            safe.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    commit = checkpoint_manifest.commit

    def committed(folder, content):
        last = max(safe)
        records = (tmp_path / "metrics.jsonl").read_bytes()[:last].splitlines()
        held.append((content["step"], json.loads(records[-1])["step"]))
        commit(folder, content)

    monkeypatch.setattr(checkpoint_manifest, "commit", committed)
    run(tmp_path)
    assert [step for step, _ in held] == [4, 8, 12] and all(record >= step for step, record in held)


def test_copies_are_compared_every_so_many_steps_and_before_each_checkpoint(tmp_path, monkeypatch):
    """No checkpoint has what a comparison has found."""
    compared = []

    def check(state, mesh, step):
        compared.append((step, int(state.step)))
        if step == 8:
            raise SilentCorruption("a device is broken")

    monkeypatch.setattr(loop, "check_replicas", check)
    with pytest.raises(SilentCorruption, match="a device is broken"):
        run(tmp_path, config=dataclasses.replace(CONFIG, compare_replicas_every=3))
    assert compared == [(step, step) for step in (3, 4, 6, 8)] and checkpoint_steps(tmp_path) == [4]


class Observing(Batches):
    """Tokens that hang on the parameters they were made with, which it keeps."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []

    def observe(self, params, buffers, step):
        self.seen.append((step, jax.tree.map(np.array, params)))

    def __next__(self):
        batch = super().__next__()
        batch["tokens"] = (batch["tokens"] + int(1e6 * np.abs(self.seen[-1][1]["embed"]["embedding"]).sum())) % 31
        return batch


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """(workdir, result, batches) of a run whose batches are made by its own model."""
    workdir, batches = tmp_path_factory.mktemp("observed"), Observing()
    return workdir, run(workdir, batches), batches


def _same_trees(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_batches_of_the_model_itself_are_made_by_the_parameters_after_the_last_update(observed, tmp_path):
    seen = observed[2].seen
    assert [step for step, _ in seen] == list(range(12))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 12)
    four = run(tmp_path, Observing(), config=dataclasses.replace(CONFIG, steps=4), optimizer=optimizer)
    _same_trees(seen[4][1], four.state.params)
    assert not np.array_equal(seen[4][1]["embed"]["embedding"], seen[5][1]["embed"]["embedding"])


def test_a_run_whose_batches_are_made_by_its_model_resumes_bit_for_bit_the_same(observed, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, Observing(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    batches = Observing()
    assert_same(run(tmp_path, batches), observed[1])
    assert records(tmp_path) == records(observed[0])
    assert [step for step, _ in batches.seen] == list(range(6, 12))
    _same_trees(batches.seen[0][1], observed[2].seen[6][1])


def test_after_a_roll_back_batches_are_made_by_the_parameters_of_the_checkpoint(tmp_path):
    """The batch of step 6 is no number; the run goes back to step 4, and past that batch."""

    class Broken(Observing):
        def __next__(self):
            batch = super().__next__()
            return batch | {"loss_mask": batch["loss_mask"] * np.float32(np.nan if self.step == 6 else 1)}

    batches, trouble = Broken(), TroubleConfig(non_finite="roll_back", replay=False)
    run(tmp_path, batches, config=dataclasses.replace(CONFIG, steps=8, trouble=trouble))
    steps = [step for step, _ in batches.seen]
    first, back = steps.index(4), steps.index(4, 5)
    assert set(steps[back:-3]) == {4} and steps[-4:] == [4, 5, 6, 7]
    for _, params in batches.seen[back:-3]:
        _same_trees(params, batches.seen[first][1])
