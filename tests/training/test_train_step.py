"""What a step does, on a model of two numbers whose gradient can be written down."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from lfm_jax.models import functional
from lfm_jax.sharding import AXES, MeshConfig, aot, make_mesh
from lfm_jax.training import (
    OptimizerConfig,
    ScheduleConfig,
    Sums,
    as_fed,
    host_part,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    place_batch,
)

SEED = 3


class Line(nnx.Module):
    """slope * x + scale."""

    def __init__(self, rngs):
        self.slope = nnx.Param(jnp.ones(1), axes=(None,))
        self.scale = nnx.Param(jnp.zeros(1), axes=(None,))


FUNCTIONS = functional(Line)


def _squares(line, batch, key):
    error = line.slope[...][:, None] * batch["tokens"] + line.scale[...][:, None] - batch["targets"]
    weight = batch["loss_mask"]
    return Sums(
        jnp.sum(weight * error**2), jnp.sum(weight), {"noise": jnp.sum(weight) * jax.random.normal(key)}, None
    )  # fmt: skip


def _mesh(devices=1):
    return make_mesh(MeshConfig(data=2 if devices > 1 else 1), jax.devices()[:devices])


def _batch(rows=8, seq=3, weightless=False):
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=(rows, seq)).astype(np.float32) for name in ("tokens", "targets", "loss_mask")}
    # Weights are most unequal between rows, so that means of means would be far off.
    batch["loss_mask"] = (0.0 if weightless else 1.0) * np.abs(batch["loss_mask"]) * 4.0 ** np.arange(rows)[:, None] / 4.0**rows
    return {name: rows.astype(np.float32) for name, rows in batch.items()}


def _step(optimizer, devices=1, **settings):
    mesh = _mesh(devices)
    step = make_train_step(FUNCTIONS, optimizer, _squares, mesh, seed=SEED, **settings)
    return step, init_state(FUNCTIONS, optimizer, mesh, SEED), mesh


def _by_hand(batch):
    """Loss and gradient at slope 1 and scale 0, in float64."""
    x, y, weight = (batch[name].astype(np.float64) for name in ("tokens", "targets", "loss_mask"))
    share = weight / weight.sum()
    return np.sum(share * (x - y) ** 2), np.sum(share * 2 * (x - y) * x), np.sum(share * 2 * (x - y))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_grad_accum_equals_big_batch_unequal_lengths(accumulation, devices):
    """Sum of losses over sum of weights of the whole step, by hand."""
    step, state, mesh = _step(optax.sgd(1.0), devices, accumulation=accumulation)
    batch = _batch(rows=32)
    state, metrics = step(state, place_batch(batch, mesh))
    loss, slope, scale = _by_hand(batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["tokens"], batch["loss_mask"].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.hypot(slope, scale), rtol=1e-5)
    np.testing.assert_allclose([1 - state.params["slope"][0], -state.params["scale"][0]], [slope, scale], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_figures_that_are_no_means_over_the_weight_are_right_however_rows_are_dealt(accumulation, devices):
    """Extremes, which do not add up; counts, which are not divided; and means over something else than the weight."""

    def objective(line, batch, key):
        x, real = batch["tokens"], batch["loss_mask"] > 0
        some = lambda values: jnp.sum(jnp.where(real, values, 0))
        return _squares(line, batch, key)._replace(
            metrics={"x": some(x)}, of=some(1.0), counts={"words": some(1.0), "rows": jnp.float32(len(x))},
            lowest={"x": jnp.min(jnp.where(real, x + 9, jnp.inf))}, highest={"x": jnp.max(jnp.where(real, x - 9, -jnp.inf))},
        )  # fmt: skip

    mesh, batch = _mesh(devices), _batch(rows=32)
    batch["loss_mask"][5:23] = 0  # micro-batches and devices with nothing
    real = batch["loss_mask"] > 0
    step = make_train_step(FUNCTIONS, optax.sgd(1.0), objective, mesh, seed=SEED, accumulation=accumulation)
    _, metrics = step(init_state(FUNCTIONS, optax.sgd(1.0), mesh, SEED), place_batch(batch, mesh))
    x = batch["tokens"][real]
    assert (metrics["x_min"], metrics["x_max"], metrics["words"]) == ((x + 9).min(), (x - 9).max(), x.size)
    np.testing.assert_allclose(metrics["x"], x.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], _by_hand(batch)[0], rtol=1e-5)
    assert "tokens" not in metrics


@pytest.mark.parametrize("accumulation", [1, 4])
def test_no_row_moves_between_devices(accumulation):
    """Devices exchange sums; a micro-batch is made of each device's own rows."""
    step, state, mesh = _step(optax.sgd(1.0), 8, accumulation=accumulation)
    program = step.lower(state, place_batch(_batch(rows=32), mesh)).compile().as_text()
    assert "all-reduce" in program
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if name in program]


def test_gradient_norm_is_the_one_before_clipping():
    config = OptimizerConfig(learning_rate=0.1, clip_norm=1e-3, b1=0, b2=0, eps=1.0, schedule=ScheduleConfig(decay_share=0.0))
    step, state, mesh = _step(make_optimizer(config, 10))
    batch = _batch()
    state, metrics = step(state, place_batch(batch, mesh))
    _, slope, scale = _by_hand(batch)
    norm = np.hypot(slope, scale)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    # Adam without memory divides by |gradient| + 1, and the slope alone decays.
    slope, scale = slope / norm * 1e-3, scale / norm * 1e-3
    np.testing.assert_allclose(1 - state.params["slope"][0], 0.1 * (slope / (abs(slope) + 1) + 0.1), rtol=1e-4)
    np.testing.assert_allclose(-state.params["scale"][0], 0.1 * scale / (abs(scale) + 1), rtol=1e-4)


def test_metrics_are_float32_scalars_and_few():
    step, state, mesh = _step(make_optimizer(OptimizerConfig(learning_rate=0.1, schedule=ScheduleConfig(warmup_steps=1)), 10))
    rates = []
    for _ in range(2):
        state, metrics = step(state, place_batch(_batch(), mesh))
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([0.05, 0.1])
    by_group = {f"{name}_norm_{group}" for name in ("gradient", "update") for group in ("feed_forward", "norms")}
    assert set(metrics) == {"loss", "noise", "tokens", "gradient_norm", "learning_rate", *by_group}
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def _noise(step, state, mesh, steps):
    values = []
    for _ in range(steps):
        state, metrics = step(state, place_batch(_batch(), mesh))
        values.append(float(metrics["noise"]))
    return values, state


def test_rng_differs_each_step_after_resume():
    """Every step has its own numbers, and a run taken up at step 2 has those that it would have had."""
    step, state, mesh = _step(optax.sgd(0.1))
    straight, _ = _noise(step, state, mesh, 5)
    assert len(set(straight)) == 5
    first, state = _noise(step, init_state(FUNCTIONS, optax.sgd(0.1), mesh, SEED), mesh, 2)
    assert int(state.step) == 2
    again = make_train_step(FUNCTIONS, optax.sgd(0.1), _squares, mesh, seed=SEED)
    assert first + _noise(again, state, mesh, 3)[0] == straight
    other = make_train_step(FUNCTIONS, optax.sgd(0.1), _squares, mesh, seed=SEED + 1)
    assert _noise(other, init_state(FUNCTIONS, optax.sgd(0.1), mesh, SEED), mesh, 1)[0] != straight[:1]


def test_rng_differs_between_micro_batches():
    """Two micro-batches of equal weight: with one key for both, the step's noise would be that of either."""

    def noise(line, batch, key):
        return Sums(jnp.sum(line.slope[...]) * 0, jnp.float32(1), {"noise": jax.random.normal(key)}, None)

    mesh, optimizer = _mesh(), optax.sgd(0.1)
    state, batch = init_state(FUNCTIONS, optimizer, mesh, SEED), place_batch(_batch(), mesh)
    step = make_train_step(FUNCTIONS, optimizer, noise, mesh, seed=SEED, accumulation=2)
    mean = float(step(state, batch)[1]["noise"])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 1), 0)
    micro = [float(jax.random.normal(jax.random.fold_in(key, number))) for number in (0, 1)]
    assert mean == pytest.approx(sum(micro) / 2) and micro[0] != micro[1]


def test_a_batch_without_weight_moves_no_parameter_and_is_no_nan():
    """After a step with weight, so that there is momentum; the step counts all the same."""
    step, state, mesh = _step(make_optimizer(OptimizerConfig(learning_rate=0.1), 10))
    state, _ = step(state, place_batch(_batch(), mesh))
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, place_batch(_batch(weightless=True), mesh))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert int(state.step) == 2 and float(metrics["loss"]) == 0 and float(metrics["tokens"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))


def test_the_state_is_donated():
    step, state, mesh = _step(make_optimizer(OptimizerConfig(), 10))
    step(state, place_batch(_batch(), mesh))
    # The learning rate of the update before is the one array that no step reads.
    kept = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(state) if not leaf.is_deleted()]
    assert kept == [".opt_state[3].learning_rate"]


def test_a_step_compiles_once():
    step, state, mesh = _step(make_optimizer(OptimizerConfig(schedule=ScheduleConfig(warmup_steps=2)), 10), devices=8)
    for _ in range(4):
        state, _ = step(state, place_batch(_batch(), mesh))
    assert step._cache_size() == 1


def test_evaluation_returns_sums_and_takes_nothing():
    _, state, mesh = _step(optax.sgd(0.1))
    evaluate = make_eval_step(FUNCTIONS, _squares, mesh)
    batch = place_batch(_batch(), mesh)
    first, second = (evaluate(state.params, state.buffers, batch) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    loss, _, _ = _by_hand(_batch())
    np.testing.assert_allclose(first.loss / first.weight, loss, rtol=1e-5)


def test_a_batch_is_split_by_rows_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(24).reshape(8, 3)
    placed = place_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    for shard in placed.addressable_shards:
        at = dict(zip(mesh.axis_names, np.argwhere(mesh.devices == shard.device)[0], strict=True))
        np.testing.assert_array_equal(shard.data, rows[2 * (2 * at["data"] + at["fsdp"]) :][:2])


def test_sequences_are_dealt_over_context():
    """Of two devices the first has the chunks 0 and 3, the second 1 and 2."""
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    rows = np.arange(32).reshape(4, 8)
    placed = place_batch({"tokens": rows, "reward": rows[:, 0]}, mesh)
    for shard in placed["tokens"].addressable_shards:
        at = dict(zip(mesh.axis_names, np.argwhere(mesh.devices == shard.device)[0], strict=True))
        chunks = [2, 3, 4, 5] if at["context"] else [0, 1, 6, 7]
        np.testing.assert_array_equal(shard.data, rows[at["fsdp"] :][:1, chunks])
    np.testing.assert_array_equal(placed["reward"], rows[:, 0])


@pytest.mark.parametrize(
    "config, part",
    [
        (MeshConfig(), (0, 4)),  # each of four hosts feeds the rows of its four devices
        (MeshConfig(fsdp=4, tensor=4), (0, 4)),  # one part for the four devices of a host
        (MeshConfig(fsdp=2, context=8), (0, 2)),  # two hosts share sequences
        (MeshConfig(fsdp=1, context=16), (0, 1)),
    ],
)
def test_hosts_that_share_sequences_feed_the_same_rows(config, part):
    pytest.importorskip("libtpu")
    devices = sorted(aot.tpu_devices("v5e:4x4"), key=lambda device: (device.process_index, device.id))
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    sizes = [getattr(config, name) for name in AXES]
    sizes[sizes.index(-1) if -1 in sizes else 0] = 16 // -math.prod(sizes) if -1 in sizes else sizes[0]
    mesh = Mesh(np.asarray(devices).reshape(sizes), AXES)
    assert host_part(mesh) == part


def test_rows_come_back_in_the_order_in_which_hosts_feed_them():
    """Where those of a host do not lie beside each other: along the ring of a slice the first has the shards 0, 1, 6 and 15."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(fsdp=16), aot.tpu_devices("v5e:4x4"))
    hosts = [device.process_index for device in mesh.devices.ravel()]
    held = sorted([row for row in range(32) if hosts[row // 2] == host] for host in range(4))
    assert [0, 1, 2, 3, 12, 13, 30, 31] in held
    np.testing.assert_array_equal(as_fed(np.arange(96).reshape(32, 3), mesh)[:, 0] // 3, np.concatenate(held))


def test_hosts_that_share_a_part_of_their_rows_are_refused():
    pytest.importorskip("libtpu")
    devices = sorted(aot.tpu_devices("v5e:4x4"), key=lambda device: (device.process_index, device.id))[:12]
    mesh = Mesh(np.asarray(devices).reshape(2, 1, 1, 6, 1), AXES)  # the second of three hosts has devices of both halves
    with pytest.raises(ValueError, match="some of 3 hosts share a part of their rows, of data x fsdp x expert = 2 parts"):
        host_part(mesh)


@pytest.mark.parametrize(
    "devices, accumulation, message",
    [
        (1, 3, "a batch of 8 rows does not divide into 3 micro-batches over 1 devices .*; make it a multiple of 3, or take "),
        (1, 9, "make it a multiple of 9, or take accumulation=8"),
        (8, 2, "8 rows does not divide into 2 micro-batches over 8 devices .*; make it a multiple of 16, or take accumulation=1"),
    ],
)
def test_rows_that_do_not_divide_are_refused(devices, accumulation, message):
    step, state, mesh = _step(optax.sgd(0.1), devices, accumulation=accumulation)
    with pytest.raises(ValueError, match=message):
        step(state, place_batch(_batch(), mesh))


def test_no_micro_batch_is_refused():
    with pytest.raises(ValueError, match="accumulation must be at least 1 micro-batch, got 0"):
        _step(optax.sgd(0.1), accumulation=0)
