"""Troubled steps: what a spike is, what is left out, where a run goes back to, and that a resumed run decides the same."""

import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lfm_jax.configuration import ConfigError
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.sharding.flags import repeats_exactly
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    SilentCorruption,
    TrainConfig,
    TrainingDiverged,
    TroubleConfig,
    init_state,
    loop,
    make_optimizer,
    make_train_step,
    next_token_objective,
    place_batch,
    read_metrics,
    train,
)
from lfm_jax.training.trouble import Watchman

MODEL = ModelConfig(
    vocab_size=32, embed_dim=16, layer_types=("conv", "conv"), num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24,
    moe=MoEConfig(num_experts=2, experts_per_token=1, mlp_dim=8, num_dense_layers=1),
)  # fmt: skip
FUNCTIONS = functional(lambda rngs: Decoder(MODEL, rngs=rngs))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2), 12)
ONE = MeshConfig(fsdp=1)
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)
ROLL_BACK = TroubleConfig(non_finite="roll_back", replay=False)
SKIP = TroubleConfig(non_finite="skip", replay=False)


class Batches:
    """Random rows, a function of their place in the data (from 1). Those of `factors` have their loss multiplied by it.

    order: the places that come, one after the other; None: all. before: called with the place of the next one.
    """

    def __init__(self, factors=None, order=None, before=lambda place: None):
        self.taken, self.factors, self.order, self.before, self.places = 0, factors or {}, order, before, []

    def __next__(self):
        place = self.taken + 1 if self.order is None else next(iter(self.order[self.taken :]))
        self.before(place)
        self.taken += 1
        self.places.append(place)
        tokens = np.random.default_rng(place).integers(0, 32, (8, 9)).astype(np.int32)
        ones = np.ones((8, 8), np.int32)
        return {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones,
            "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1, "loss_mask": ones.astype(np.float32),
            "factor": np.full(8, self.factors.get(place, 1.0), np.float32),
        }  # fmt: skip

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


def objective(model, batch, key):
    sums = next_token_objective(LossConfig())(model, batch, key)
    return sums._replace(loss=sums.loss * jnp.mean(batch["factor"]))


@functools.cache
def mesh_of(config):
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))])


# Of the same step the loop makes a new function for each run, which would be compiled anew.
compiled_once = functools.cache(make_train_step)


@functools.cache
def initial(mesh):
    return init_state(FUNCTIONS, OPTIMIZER, mesh, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "make_train_step", compiled_once)
    monkeypatch.setattr(loop, "init_state", lambda functions, optimizer, mesh, seed: jax.tree.map(jnp.copy, initial(mesh)))


def run(workdir, batches, trouble, mesh=ONE, **changes):
    """12 steps, with a checkpoint after each fourth."""
    wanted = changes.pop("objective", objective)
    config = TrainConfig(**{"steps": 12, "log_every": 1, "checkpoint_every": 4, "trouble": trouble} | changes)
    workdir.mkdir(exist_ok=True)
    return train(
        config, functions=FUNCTIONS, optimizer=OPTIMIZER, objective=wanted, batches=batches, mesh=mesh_of(mesh), workdir=workdir,
        run_config={},
    )  # fmt: skip


def records(workdir):
    """What was logged of the steps, every digit; without times."""
    logged = [{**record} for record in read_metrics(workdir)]
    kept = lambda name: name == "step" or name.startswith("train/") and name != "train/tokens_per_second"
    return [{name: value for name, value in record.items() if kept(name)} for record in logged]


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, theirs)


def told(workdir):
    """The lines about trouble."""
    return [json.loads(line) for line in (workdir / "trouble.jsonl").read_text().splitlines()]


def loop_state(workdir, step):
    return json.loads((workdir / "checkpoints" / f"{step:08d}" / "manifest.json").read_text())["loop_state"]


def crash():
    raise ConnectionError("the data's server went away")


def at(place, then):
    """Calls `then` before the batch at `place`, the first time."""
    left = [place]
    return lambda now: (left.clear(), then()) if left and now == place else None


def watchman(tmp_path, **changes):
    return Watchman(TroubleConfig(**changes), epath.Path(tmp_path))


# What a spike is.


def decisions(watcher, values):
    """Whether each (loss, gradient norm) is trouble."""
    return [
        watcher.look(step, {"loss": loss, "gradient_norm": norm}) is not None for step, (loss, norm) in enumerate(values, 1)
    ]


def losses(seed, steps=120):
    """Like those of a run, float32, with some far above and some far below the others."""
    rng = np.random.default_rng(seed)
    values = rng.normal((3.0, 1.0), (0.1, 0.3), (steps, 2))
    values[rng.random(steps) < 0.05] += rng.normal(0, 1.5, 2)
    return values.astype(np.float32).astype(float)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window, sigma", [(2, 1.5), (16, 3.0), (40, 6.0)])
def test_spikes_are_those_that_numpy_finds(tmp_path, seed, window, sigma):
    """Of the steps from `window` + 1 before to 2 before: mean, and deviation with divisor n."""
    values = losses(seed)
    expected = []
    for step in range(len(values)):
        before = values[step - 1 - window : step - 1] if step > window else None
        limit = np.float32(before.mean(0) + sigma * before.std(0)) if before is not None else np.inf
        expected.append(bool(np.any(np.float32(values[step]) > limit)))
    assert any(expected) or window == 40
    assert decisions(watchman(tmp_path, window=window, sigma=sigma, spike="report"), values) == expected


def olmo_core(values, window, sigma):
    """The steps that OLMo-core's SkipStepOptimizer.get_step_factor skips (src/olmo_core/optim/skip_step_optimizer.py)."""
    skipped = []
    for step in range(len(values)):
        kept = values[max(0, step - window) : step + 1]
        enough = len(kept) >= max(20, window // 2)
        mean, deviation = (kept[:-1].mean(0), kept[:-1].std(0, ddof=1)) if enough else (0, np.inf)
        skipped.append(bool(np.any(abs(kept[-1] - mean) / deviation > sigma)))
    return skipped


@pytest.mark.parametrize("seed", range(4))
def test_a_spike_far_above_the_rest_is_one_for_olmo_core_too(tmp_path, seed):
    """Theirs begins with half a window, and counts what is too low, too."""
    values = np.random.default_rng(seed).normal((3.0, 1.0), (0.1, 0.3), (300, 2)).astype(np.float32).astype(float)
    values[[30, 150, 200, 295]] += 5
    values[250] -= 5
    ours = np.flatnonzero(decisions(watchman(tmp_path, window=40, spike="report"), values))
    assert ours.tolist() == [150, 200, 295]
    assert np.flatnonzero(olmo_core(values, 40, 6.0)).tolist() == [30, 150, 200, 250, 295]


def test_a_number_that_is_not_finite_is_no_part_of_what_is_usual(tmp_path):
    values = losses(0, 60)
    with_nan = np.insert(values, 20, np.nan, axis=0)
    one, other = (watchman(tmp_path, window=8, non_finite="skip", spike="report", limit=100) for _ in range(2))
    decisions(one, values), decisions(other, with_nan)
    assert one.bounds(61) == other.bounds(62)


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 10, 30])
def test_a_resumed_watchman_judges_by_the_same_bounds(tmp_path, stop):
    values = losses(1, 60)
    whole, first = (watchman(tmp_path, window=8, sigma=2.0, spike="skip", limit=60) for _ in range(2))
    assert decisions(first, values[:stop]) == decisions(whole, values[:stop])
    resumed = watchman(tmp_path, window=8, sigma=2.0, spike="skip", limit=60)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    for step in range(stop + 1, 61):
        assert resumed.bounds(step) == whole.bounds(step)
        seen = dict(zip(("loss", "gradient_norm"), values[step - 1], strict=True))
        assert resumed.look(step, seen) == whole.look(step, seen)
    assert resumed.get_state() == whole.get_state() and whole.get_state()["skipped"]


def test_only_skipped_steps_count_towards_the_limit_of_them(tmp_path):
    watcher = watchman(tmp_path, window=4, sigma=1.0, limit=1, non_finite="skip", spike="report")
    assert decisions(watcher, [(step**2, 1.0) for step in range(1, 20)]).count(True) > 10
    look = lambda step: watcher.look(step, {"loss": math.nan, "gradient_norm": 1.0})
    assert look(20).action == "skip" and look(24).action == "skip"  # the first is out of the window again
    with pytest.raises(TrainingDiverged, match=r"nan at step 25.*; of the last 4 steps these were skipped: 24, 25\. Loss"):
        look(25)


@pytest.mark.parametrize(
    ("settings", "last", "advice"),
    [
        ({"spike": "roll_back", "limit": 0}, 7.0, "train.trouble.limit=1"),
        ({"spike": "skip", "limit": 0}, 7.0, "train.trouble.limit=1"),
        ({"non_finite": "stop"}, math.nan, "train.trouble.non_finite=skip .or roll_back."),
    ],
)
def test_the_diagnosis_is_of_the_steps_before_and_has_the_setting_to_go_on_with(settings, last, advice, tmp_path):
    watcher = watchman(tmp_path, window=2, **settings)
    course = rf"of the steps before: 1 \(1\), 1 \(1\), 1 \(1\)\. .*--config\.{advice} and --allow_config_change carry"
    with pytest.raises(TrainingDiverged, match=course):
        decisions(watcher, [(1.0, 1.0)] * 3 + [(last, 1.0)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"window": 1}, "window must be at least 2 steps, got 1"),
        ({"back": -1}, "back must not be negative, got -1"),
        ({"ahead": -1}, "ahead must not be negative, got -1"),
        ({"limit": -2}, "limit must not be negative, got -2"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TroubleConfig(**changes)


# What is left out.


@pytest.mark.parametrize("mesh, accumulation", [(ONE, 1), (EIGHT, 2)])
def test_a_skipped_step_changes_nothing_but_the_number_of_steps(tmp_path, mesh, accumulation):
    """As a run made by hand, of the step without `skip`, in which it is not taken: params, moments, buffers, to the bit."""
    ours = run(tmp_path, Batches({3: math.nan, 6: math.inf}), SKIP, mesh, accumulation=accumulation, steps=8)
    placed = mesh_of(mesh)
    step = compiled_once(FUNCTIONS, OPTIMIZER, objective, placed, seed=0, accumulation=accumulation)
    state, batches = jax.tree.map(jnp.copy, initial(placed)), Batches()
    for number in range(1, 9):
        batch = place_batch(next(batches), placed)
        if number in (3, 6):
            state = state._replace(step=state.step + 1)
        else:
            state, _ = step(state, batch)
    assert int(ours.state.step) == 8 and jax.tree.leaves(ours.state.buffers)
    assert_same(ours.state, state)
    assert [record["step"] for record in records(tmp_path) if record["train/skipped"]] == [3, 6]


def test_a_report_changes_nothing(tmp_path):
    spikes = Batches({5: 50.0, 9: 50.0})
    ours = run(tmp_path / "ours", spikes, TroubleConfig(window=3, sigma=6.0, spike="report"))
    theirs = run(tmp_path / "theirs", Batches({5: 50.0, 9: 50.0}), TroubleConfig())
    assert [(line["step"], line["batch"], line["action"]) for line in told(tmp_path / "ours")][0] == (5, 5, "report")
    assert not (tmp_path / "theirs" / "trouble.jsonl").exists()
    assert_same(ours.state, theirs.state)
    assert records(tmp_path / "ours") == records(tmp_path / "theirs")


def test_a_troubled_batch_is_kept_as_it_was(tmp_path):
    run(tmp_path, Batches({3: math.nan}), SKIP, steps=4)
    (line,) = told(tmp_path)
    assert (line["step"], line["action"], line["loss"], line["usual_loss"]) == (3, "skip", "nan", "inf")
    expected = Batches({3: math.nan}, order=[3])
    with np.load(tmp_path / "trouble" / "step-00000003" / "process-0.npz", allow_pickle=False) as kept:
        for name, array in next(expected).items():
            np.testing.assert_array_equal(kept[name], array)


# Where it goes back to.


@pytest.mark.parametrize(
    "changes, bad, order, path",
    [
        ({}, [7], [1, 2, 3, 4, *range(8, 16)], [*range(1, 9), 5, 6, 7, *range(8, 16)]),
        # Found when step 8 was to be saved; nothing beyond had been begun.
        ({}, [8], [1, 2, 3, 4, *range(9, 17)], [*range(1, 9), *range(5, 9), *range(9, 17)]),
        ({"ahead": 2}, [7], [1, 2, 3, 4, *range(10, 18)], [*range(1, 9), *range(5, 10), *range(10, 18)]),
        ({"back": 3}, [10], [1, 2, 3, 4, *range(11, 19)], [*range(1, 12), *range(5, 11), *range(11, 19)]),
        ({}, [2], [*range(3, 15)], [1, 2, 3, 1, 2, *range(3, 15)]),
        # The second comes before there is a new checkpoint: what led to the first stays left out.
        ({}, [5, 8], [1, 2, 3, 4, *range(9, 17)], [*range(1, 7), 5, *range(6, 10), *range(5, 9), *range(9, 17)]),
        # And after one.
        ({}, [5, 11], [1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 14, 15], [*range(1, 7), 5, *range(6, 13), 10, 11, *range(12, 16)]),
    ],
)
def test_a_run_goes_back_and_on_as_one_that_never_saw_those_batches(tmp_path, changes, bad, order, path):
    """order: the batches that the final state is made of. path: all that were asked for, those left out included."""
    batches = Batches(dict.fromkeys(bad, math.nan))
    ours = run(tmp_path / "ours", batches, dataclasses.replace(ROLL_BACK, **changes))
    theirs = run(tmp_path / "theirs", Batches(order=order), SKIP)
    assert_same(ours.state, theirs.state)
    assert records(tmp_path / "ours") == records(tmp_path / "theirs")
    assert batches.places == path
    state = loop_state(tmp_path / "ours", 12)
    assert (state["roll_backs"], state["left_out"]) == (len(bad), order[-1] - 12)
    assert [line["batch"] for line in told(tmp_path / "ours")] == bad


def test_newer_checkpoints_and_figures_are_gone_when_it_goes_back(tmp_path):
    seen = []

    def look(place):
        seen.append((place, sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()), len(records(tmp_path))))

    run(tmp_path, Batches({10: math.nan}, before=look), dataclasses.replace(ROLL_BACK, back=3))
    before, after = (index for index, (place, *_) in enumerate(seen) if place == 11)
    assert seen[before][1:] == ([0, 4, 8], 9)
    assert seen[after][1] == [0, 4] and seen[after + 1][2] == 4
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))


def test_eight_devices_go_back_as_one_does(tmp_path):
    ours = run(tmp_path / "ours", Batches({7: math.nan}), ROLL_BACK, EIGHT, accumulation=2)
    theirs = run(tmp_path / "theirs", Batches(order=[1, 2, 3, 4, *range(8, 16)]), SKIP, EIGHT, accumulation=2)
    assert_same(ours.state, theirs.state)


SPIKES = {6: 50.0, 9: math.nan, 12: 60.0}


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_a_run_that_is_killed_anywhere_decides_as_one_that_was_not(tmp_path, action):
    """Also where it was stopped, and has saved in between; state, figures and decisions are the same to the bit."""
    trouble = TroubleConfig(non_finite=action, spike=action, window=3, sigma=20.0, replay=False)
    whole = run(tmp_path / "whole", Batches(SPIKES), trouble)
    assert [line["batch"] for line in told(tmp_path / "whole")] == [6, 9, 12]
    expected, decided = records(tmp_path / "whole"), loop_state(tmp_path / "whole", 12)
    assert (decided["roll_backs"], decided["skipped"]) == ((3, []) if action == "roll_back" else (0, [12]))
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    for then, ended in ((crash, ConnectionError), (stop, SystemExit)):
        for place in range(2, 13):
            workdir = tmp_path / f"{ended.__name__}-{place}"
            with pytest.raises(ended):
                run(workdir, Batches(SPIKES, before=at(place, then)), trouble)
            resumed = run(workdir, Batches(SPIKES), trouble)
            assert_same(resumed.state, whole.state)
            assert records(workdir) == expected and loop_state(workdir, 12) == decided, (ended, place)


# Where it ends.


def test_too_many_skipped_steps_end_the_run_with_the_diagnosis(tmp_path):
    message = (
        r"loss is nan at step 4; gradient_norm is nan at step 4; of the last 128 steps these were skipped: 3, 4\. "
        r"Loss \(and gradient norm\) of the steps before: \d\.\d+ \(\d\.\d+\), \d\.\d+ \(\d\.\d+\)\. The batches are in "
    )
    with pytest.raises(TrainingDiverged, match=message):
        run(tmp_path, Batches({3: math.nan, 4: math.nan}), dataclasses.replace(SKIP, limit=1))


def test_too_many_roll_backs_end_the_run_also_over_a_restart(tmp_path):
    """The first is before the checkpoint that the second process begins with."""
    bad = Batches({3: math.nan, 14: math.nan}, before=at(13, crash))
    trouble = dataclasses.replace(ROLL_BACK, limit=1)
    with pytest.raises(ConnectionError):
        run(tmp_path, bad, trouble)
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 11; .*, after 1 roll-backs\. Loss"):
        run(tmp_path, Batches({3: math.nan, 14: math.nan}), trouble)


def test_without_a_checkpoint_from_before_it_ends(tmp_path):
    trouble = dataclasses.replace(ROLL_BACK, back=9)
    with pytest.raises(TrainingDiverged, match="loss is nan at step 10; .*, and there is no checkpoint from before it to go"):
        run(tmp_path, Batches({10: math.nan}), trouble, keep_checkpoints=1)


@pytest.mark.parametrize("batches, step", [(14, 11), (7, 5)])
def test_data_that_ends_is_said(tmp_path, batches, step):
    """In the steps after it went back; and while batches are left out."""
    data, trouble = Batches({6: math.nan}, order=range(1, batches + 1)), dataclasses.replace(ROLL_BACK, ahead=2)
    with pytest.raises(ConfigError, match=f"the data ends before step {step} of 12, as batches were left out; raise"):
        run(tmp_path, data, trouble)


# Whether it is a device.


def unsteady(model, batch, key):
    """An objective that never computes the same twice."""
    sums = objective(model, batch, key)
    count = jax.pure_callback(lambda weight: np.float32(next(COUNTER)), jax.ShapeDtypeStruct((), jnp.float32), sums.weight)
    return sums._replace(loss=sums.loss * (1 + jax.lax.stop_gradient(count)))


COUNTER = itertools.count()
REPLAYED = dataclasses.replace(SKIP, replay=True)


@pytest.mark.parametrize("mesh, accumulation", [(ONE, 1), (EIGHT, 2)])
def test_a_step_computed_twice_more_is_the_same_to_the_bit(tmp_path, capsys, mesh, accumulation):
    given = {"accumulation": accumulation, "steps": 5}
    replayed = run(tmp_path / "ours", Batches({3: math.nan}), REPLAYED, mesh, **given)
    assert "step 3, computed twice more, is the same to the bit: no device is caught" in capsys.readouterr().out
    assert_same(replayed.state, run(tmp_path / "theirs", Batches({3: math.nan}), SKIP, mesh, **given).state)


def test_a_step_that_is_not_computed_the_same_twice_ends_the_run(tmp_path):
    message = r"the gradient of step 3, computed twice, is not the same on device 0 of process 0\. Take the host out"
    with pytest.raises(SilentCorruption, match=message):
        run(tmp_path, Batches({3: 1e30}), dataclasses.replace(REPLAYED, spike="skip", window=2), objective=unsteady)


@pytest.mark.parametrize(
    "platform, flags, verdict",
    [
        ("cpu", "", True), ("tpu", "", True), ("gpu", "", False), ("gpu", "--xla_gpu_deterministic_ops=false", False),
        ("gpu", "--xla_dump_to=d --xla_gpu_deterministic_ops=true", True), ("gpu", "--xla_gpu_deterministic_ops", True),
        ("gpu", "--xla_gpu_exclude_nondeterministic_ops=1", True),
    ],
)  # fmt: skip
def test_only_devices_that_repeat_themselves_are_judged_by_that(platform, flags, verdict):
    assert repeats_exactly(types.SimpleNamespace(platform=platform), {"XLA_FLAGS": flags}) == verdict


def test_a_gpu_that_computes_otherwise_is_not_called_broken(tmp_path, monkeypatch, capsys):
    """It adds up in any order."""
    monkeypatch.setattr(loop, "repeats_exactly", lambda device: repeats_exactly(types.SimpleNamespace(platform="gpu"), {}))
    trouble = dataclasses.replace(REPLAYED, spike="skip", window=2)
    trained = run(tmp_path, Batches({3: 1e30}), trouble, objective=unsteady, steps=4)
    assert int(trained.state.step) == 4
    assert "step 3 is not computed twice more: without XLA_FLAGS=--xla_gpu_deterministic_ops a" in capsys.readouterr().out


def test_the_device_that_computes_otherwise_is_named(tmp_path, monkeypatch):
    """The second time, one bit of device 5's part of one array is another."""
    make = loop.make_replay

    def broken(*arguments, **named):
        replay, times = make(*arguments, **named), itertools.count()

        def answer(*given):
            gradient, loss = replay(*given)
            if next(times):
                (leaf, *others), tree = jax.tree.flatten(gradient)
                parts = {shard.device: np.array(shard.data) for shard in leaf.addressable_shards}
                parts[jax.devices()[5]].reshape(-1).view(np.uint32)[0] ^= 1 << 7
                arrays = [jax.device_put(part, device) for device, part in parts.items()]
                leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
                gradient = jax.tree.unflatten(tree, [leaf, *others])
            return gradient, loss

        return answer

    monkeypatch.setattr(loop, "make_replay", broken)
    with pytest.raises(SilentCorruption, match=r"is not the same on device 5 of process 0\."):
        run(tmp_path, Batches({3: math.nan}), REPLAYED, EIGHT)
