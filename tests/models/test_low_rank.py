"""Adapters against NumPy, against the gradient of the matrices they stand for, and in whole training steps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.models.low_rank import TARGETS, LowRankConfig, adapt
from lfm_jax.models.rounding import Rounding, rounded
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    abstract_state,
    make_optimizer,
    make_train_step,
    next_token_objective,
    place_batch,
)

# Every kind of matrix that is adapted, and of what is not: a mixture, gated attention, a head of its own.
CONFIG = ModelConfig(
    vocab_size=64, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    attention_gate=True, tie_embeddings=False,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=32, num_dense_layers=1),
)  # fmt: skip
LOW_RANK = LowRankConfig(rank=3, alpha=6.0)
CONV, MLP, ATTENTION, MOE = (("layers", *path) for path in ((0, "operator"), (0, "mlp"), (1, "operator"), (1, "moe")))
# Of each matrix: experts, inputs, outputs.
MATRICES = {
    (*CONV, "in_proj"): (1, 32, 96), (*CONV, "out_proj"): (1, 32, 32),
    (*MLP, "gate"): (1, 32, 64), (*MLP, "up"): (1, 32, 64), (*MLP, "down"): (1, 64, 32),
    (*ATTENTION, "q_proj"): (1, 32, 32), (*ATTENTION, "k_proj"): (1, 32, 16), (*ATTENTION, "v_proj"): (1, 32, 16),
    (*ATTENTION, "gate_proj"): (1, 32, 4), (*ATTENTION, "out_proj"): (1, 32, 32),
    (*MOE, "gate"): (4, 32, 32), (*MOE, "up"): (4, 32, 32), (*MOE, "down"): (4, 32, 32),
}  # fmt: skip


@functools.cache
def _model(**compute):
    return adapt(functional(lambda rngs: Decoder(CONFIG, ComputeConfig(**compute), rngs=rngs)), LOW_RANK)


@functools.cache
def _begun():
    """New adapters, and the arrays beside them: made on the host, but for what is to be looked at."""
    rng, model = np.random.default_rng(0), _model()
    draw = lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32)
    adapters = jax.jit(model.adapters)(jax.random.key(1))
    return adapters, jax.tree.map(draw, model.abstract_buffers)


@functools.cache
def _moved():
    """The same once they have learnt something: no B is zero."""
    rng = np.random.default_rng(1)
    adapters, buffers = _begun()
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32), adapters), buffers


def _at(tree, path):
    return functools.reduce(lambda branch, key: branch[key], path, tree)


def _batch(seed=0, rows=8, seq=24):
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, 64, (rows, seq), dtype=np.int32) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.where(np.arange(seq) < rng.integers(1, seq, (rows, 1)), 1, 2).astype(np.int32)
    first = np.argmax(batch["segment_ids"] == 2, axis=1)[:, None]
    batch["positions"] = (np.arange(seq) - np.where(batch["segment_ids"] == 2, first, 0)).astype(np.int32)
    batch["loss_mask"] = (rng.random((rows, seq)) < 0.8).astype(np.float32)
    return batch


@functools.cache
def _loss_and_gradient(functions):
    objective = next_token_objective(LossConfig())

    @jax.jit
    @jax.value_and_grad
    def program(params, buffers):
        return objective(functions.bind(params, buffers), _batch(), jax.random.key(0)).loss

    return program


@functools.cache
def _merge():
    return jax.jit(_model().merged)


def test_a_model_begins_as_it_was():
    """To the bit, and so does its loss; and no array is in the program that is not given to it."""
    model, (params, buffers) = _model(), _begun()
    merged = _merge()(params, buffers["frozen"])
    jax.tree.map(np.testing.assert_array_equal, merged, buffers["frozen"])
    adapted, _ = _loss_and_gradient(model)(params, buffers)
    alone, _ = _loss_and_gradient(model.base)(buffers["frozen"], buffers["buffers"])
    assert adapted == alone and np.isfinite(alone)
    assert jax.make_jaxpr(model.merged)(params, buffers["frozen"]).consts == []


def test_adapters_are_where_they_should_be_and_begin_as_published():
    """A within 1 / sqrt(inputs), filling that; B zero. Nothing else is trained; and all that is not is there."""
    model, (params, _) = _model(), _begun()
    for path, (experts, inputs, outputs) in MATRICES.items():
        pair = _at(params, path)
        assert pair["a"].size == experts * inputs * 3 and pair["b"].size == experts * 3 * outputs
        assert not np.any(pair["b"])
        low, high = np.quantile(pair["a"] * inputs**0.5, [0, 1])
        assert -1 <= low < -0.85 and 0.85 < high <= 1 and abs(np.std(pair["a"] * inputs**0.5) - 3**-0.5) < 0.1
    assert len(jax.tree.leaves(params)) == 2 * len(MATRICES)
    up, gate = (_at(params, (*MLP, name))["a"] for name in ("up", "gate"))
    assert not np.any(up == gate)
    made = jax.eval_shape(model.init, jax.random.key(0))
    shape_of = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(shape_of, made) == jax.tree.map(shape_of, (model.abstract_params, model.abstract_buffers))
    assert jax.tree.map(shape_of, made[0]) == jax.tree.map(shape_of, params)
    assert made[1]["frozen"] == jax.eval_shape(model.base.init, jax.random.key(0))[0]


def test_targets_alone_are_adapted_and_begin_the_same_whatever_else_is():
    draw = lambda targets, seed: adapt(_model().base, LowRankConfig(rank=3, targets=targets)).adapters(jax.random.key(seed))
    some, (every, _) = draw(("q_proj", "down"), 1), _begun()
    paths = [(*MLP, "down"), (*ATTENTION, "q_proj"), (*MOE, "down")]
    assert len(jax.tree.leaves(some)) == 2 * len(paths)
    for path in paths:
        np.testing.assert_array_equal(_at(some, path)["a"], _at(every, path)["a"])
    assert not np.any(_at(draw(("down",), 2), paths[0])["a"] == _at(every, paths[0])["a"])


def test_merged_matrices_and_gradients_are_those_of_numpy():
    """W + s A B; and with G the gradient by that matrix, s G B^T and s A^T G."""
    model, (params, buffers) = _model(), _moved()
    merged = _merge()(params, buffers["frozen"])
    _, of_adapters = _loss_and_gradient(model)(params, buffers)
    _, of_matrices = _loss_and_gradient(model.base)(merged, buffers["buffers"])
    wide = lambda array, *shape: np.asarray(array, np.float64).reshape(shape)
    for path, (experts, inputs, outputs) in MATRICES.items():
        a = wide(_at(params, path)["a"], experts, inputs, 3)
        b = wide(_at(params, path)["b"], experts, 3, outputs)
        weight = wide(_at(buffers["frozen"], path), experts, inputs, outputs) + 2 * a @ b
        np.testing.assert_allclose(wide(_at(merged, path), *weight.shape), weight, rtol=1e-5, atol=1e-6)
        dense = wide(_at(of_matrices, path), *weight.shape)
        assert np.abs(dense).max() > 1e-3, path
        for name, expected in {"a": 2 * dense @ b.mT, "b": 2 * a.mT @ dense}.items():
            found = wide(_at(of_adapters, path)[name], *expected.shape)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for keys, leaf in jax.tree_util.tree_leaves_with_path(merged):
        path = tuple(key.key for key in keys)
        if path not in MATRICES:
            np.testing.assert_array_equal(leaf, _at(buffers["frozen"], path))


def test_a_matrix_is_computed_with_as_if_it_were_a_parameter():
    """Summed up in float32; then cast, or rounded to what a file holds."""
    params, buffers = _moved()
    alone = {"layers": {0: {"mlp": {"up": _at(params, (*MLP, "up"))}}}}

    def up(model):
        return jax.jit(lambda *given: model.bind(*given).layers[0].mlp.up[...])(alone, buffers)

    merged = _at(_model().merged(alone, buffers["frozen"]), (*MLP, "up"))
    assert merged.dtype == jnp.float32
    np.testing.assert_array_equal(up(_model(dtype="bfloat16")), merged.astype(jnp.bfloat16))
    np.testing.assert_array_equal(up(_model(file_format="8da4w")), rounded(merged, Rounding("int4", (0,))))


@functools.cache
def _trained(mesh_config, accumulation):
    """(the state after two steps, on the host; the metrics of each)."""
    mesh = make_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
    # An eps far above the gradients' rounding, so that the updates show the gradients, not their signs.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule=ScheduleConfig(decay_share=0.0), eps=1e-2), 1000)
    abstract = abstract_state(_model(), optimizer, mesh)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = zeros._replace(**dict(zip(("params", "buffers"), jax.device_get(_moved()), strict=True)))
    state = jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), state, abstract)
    step = make_train_step(
        _model(), optimizer, next_token_objective(LossConfig()), mesh, seed=0, accumulation=accumulation
    )
    every = []
    for seed in range(2):
        state, metrics = step(state, place_batch(_batch(seed), mesh))
        every.append(jax.device_get(metrics))
    return jax.device_get(state), every


ONE_DEVICE = (MeshConfig(fsdp=1), 1)


def test_a_step_moves_adapters_and_the_experts_bias_and_nothing_else():
    (params, buffers), (after, metrics) = _moved(), _trained(*ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, after.buffers["frozen"], buffers["frozen"])
    assert all(np.any(new != old) for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(params), strict=True))
    ((bias,), (bias_before,)) = (jax.tree.leaves(each["buffers"]) for each in (after.buffers, buffers))
    moved = bias - bias_before + np.mean(bias_before)
    assert np.all(np.abs(moved) < 4.5e-3) and np.ptp(moved) > 1e-3
    groups = {name for name in metrics[0] if name.startswith("update_norm_")}
    assert groups == {"update_norm_operators", "update_norm_feed_forward"}


def test_moments_are_those_of_adapters_alone():
    """3 (inputs + outputs) numbers for each matrix, twice in float32, and two counts and a learning rate."""
    after, _ = _trained(*ONE_DEVICE)
    numbers = sum(3 * experts * (inputs + outputs) for experts, inputs, outputs in MATRICES.values())
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(after.opt_state)) == 2 * 4 * numbers + 3 * 4
    assert len(jax.tree.leaves(after.opt_state)) == 2 * 2 * len(MATRICES) + 3


def test_replicas_shards_and_micro_batches_train_the_same_adapters():
    """What is named after embed is split over `expert` as over `fsdp`."""
    expected, metrics = _trained(*ONE_DEVICE)
    found, found_metrics = _trained(MeshConfig(data=2, fsdp=1, expert=2, tensor=2), 2)
    for one, other in zip(metrics, found_metrics, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["gradient_norm"], one["gradient_norm"], rtol=1e-4)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(other, one, rtol=0, atol=2e-5), expected.params, found.params)
    jax.tree.map(np.testing.assert_array_equal, found.buffers["frozen"], expected.buffers["frozen"])
    np.testing.assert_allclose(*(jax.tree.leaves(each.buffers["buffers"]) for each in (found, expected)), atol=1e-6)


def test_the_scale_is_over_the_rank_or_its_root():
    assert LowRankConfig(rank=16, alpha=32.0).scale == 2
    assert LowRankConfig(rank=16, alpha=32.0, alpha_over="sqrt_rank").scale == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"targets": ()}, "targets is empty; name matrices to adapt, of in_proj, q_proj"),
        ({"targets": ("q_pro",)}, "targets: no matrix 'q_pro' can be adapted. Did you mean 'q_proj'?"),
        ({"targets": ("router",)}, "targets: no matrix 'router' can be adapted."),
        ({"targets": ("embedding",)}, "targets: no matrix 'embedding' can be adapted."),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LowRankConfig(**changes)


def test_targets_that_a_model_has_not_are_refused_unless_they_are_simply_all():
    config = dataclasses.replace(CONFIG, layer_types=("conv", "conv"), moe=None)
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    with pytest.raises(ValueError, match="targets: the model has no matrix 'q_proj'; it has down, gate, in_proj, out_proj, up"):
        adapt(functions, LowRankConfig(targets=("in_proj", "q_proj")))
    assert adapt(functions, LowRankConfig(targets=TARGETS)).abstract_params["layers"][1].keys() == {"mlp", "operator"}
