"""Whole training steps of small decoders: the same on every mesh, with every number of micro-batches, with rematerialization."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, RopeConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    abstract_state,
    check_mesh,
    host_part,
    make_eval_step,
    make_optimizer,
    make_train_step,
    next_token_objective,
    place_batch,
)
from lfm_jax.training.step import _balanced

DENSE = ModelConfig(
    vocab_size=64, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=24,
    conv_bias=True,
)  # fmt: skip
LFM3 = dataclasses.replace(
    DENSE, layer_types=("conv", "sliding_attention", "full_attention"), conv_width=7, sliding_window=4, sandwich_norms=True,
    attention_gate=True, full_rope=RopeConfig(fraction=0.5), tie_embeddings=False,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=1))
CONFIGS = {"dense": DENSE, "lfm3": LFM3, "moe": MOE}
MESHES = {
    "one device": MeshConfig(data=1, fsdp=1, tensor=1),
    "replicas": MeshConfig(data=4, fsdp=1),
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=8),  # of eight devices two share a head of keys
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(fsdp=1, context=8),
    "context mixed": MeshConfig(fsdp=2, context=2, tensor=2),
    "expert": MeshConfig(fsdp=2, expert=4),
    "expert mixed": MeshConfig(fsdp=1, expert=2, context=2, tensor=2),
}
# An eps far above the gradients' rounding, so that the updates show the gradients, not their signs.
OPTIMIZER = OptimizerConfig(learning_rate=0.02, schedule=ScheduleConfig(decay_share=0.0), eps=1e-2)
EXPERT_BIAS_RATE = 2.0**-10  # a power of two: sums of its multiples are exact


def _batch(seed=0, rows=8, seq=96):
    """Documents of all lengths up to a row, one to three a row, some of the row padding; one row is nothing but padding."""
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, 64, (rows, seq), dtype=np.int32) for name in ("tokens", "targets")}
    ends = np.sort(rng.integers(0, seq + 1, (rows, 3)), axis=1)
    ends[3] = 0
    column = np.arange(seq)[None, :, None]
    document = (column >= ends[:, None, :]).sum(axis=-1)
    starts = np.concatenate([np.zeros((rows, 1), int), ends], axis=1)
    batch["segment_ids"] = np.where(document < 3, document + 1, 0).astype(np.int32)
    batch["positions"] = (np.arange(seq)[None] - np.take_along_axis(starts, document, axis=1)).astype(np.int32)
    batch["loss_mask"] = (batch["segment_ids"] > 0).astype(np.float32)
    return batch


def _placed(seed, mesh):
    """What this host has of the batch, on its devices."""
    index, count = host_part(mesh)
    part = lambda rows: rows[len(rows) // count * index :][: len(rows) // count]
    return place_batch({name: part(rows) for name, rows in _batch(seed).items()}, mesh)


@functools.cache
def _parts(name, mesh_name, remat="none"):
    """(functions, optimizer, objective, mesh)"""
    functions = functional(lambda rngs: Decoder(CONFIGS[name], ComputeConfig(remat=remat), rngs=rngs))
    mesh = make_mesh(MESHES[mesh_name], jax.devices()[: math.prod(dataclasses.astuple(MESHES[mesh_name]))])
    check_mesh(functions, mesh)
    return functions, make_optimizer(OPTIMIZER, 1000), next_token_objective(LossConfig(z_loss=1e-2, block=8)), mesh


@functools.cache
def _initial(name, mesh_name):
    """Normal parameters (norms about 1) made on the host, so that nothing needs compiling; the same on every mesh."""
    functions, optimizer, _, mesh = _parts(name, mesh_name)
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        if not path[0].name == "params":
            return np.zeros(leaf.shape, leaf.dtype)
        scale = path[-1].key == "scale"
        return np.float32(scale) + (0.1 if scale else 0.3) * rng.normal(size=leaf.shape).astype(np.float32)

    abstract = abstract_state(functions, optimizer, mesh)
    return jax.tree_util.tree_map_with_path(draw, abstract), jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _init(name, mesh_name):
    return jax.device_put(*_initial(name, mesh_name))


@functools.cache
def _step(name, mesh_name, accumulation=1, remat="none"):
    functions, optimizer, objective, mesh = _parts(name, mesh_name, remat)
    step = make_train_step(
        functions, optimizer, objective, mesh, seed=0, accumulation=accumulation, expert_bias_rate=EXPERT_BIAS_RATE
    )
    return step.lower(_init(name, mesh_name), _placed(0, mesh)).compile()


@functools.cache
def _trained(name, mesh_name, accumulation=1, remat="none"):
    """State and metrics after two steps on different batches, on the host."""
    mesh, state, metrics = _parts(name, mesh_name, remat)[-1], _init(name, mesh_name), []
    for seed in range(2):
        state, last = _step(name, mesh_name, accumulation, remat)(state, _placed(seed, mesh))
        metrics.append(last)
    return jax.tree.map(np.asarray, (state, metrics))


def _assert_same(ours, theirs):
    """Metrics within 1e-5 of each other; every parameter within 1e-3 of the largest step that any took.

    Two updates move parameters by up to 0.04; both sides are float32 sums in another order, and the second step starts from what
    the first made of them.
    """
    (state, metrics), (expected, expected_metrics) = ours, theirs
    for found, other in zip(metrics, expected_metrics, strict=True):
        assert set(found) == set(other)
        for name in found:
            np.testing.assert_allclose(found[name], other[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-5), state.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, state.buffers, expected.buffers)


@pytest.mark.parametrize(
    "name, mesh_name", [("dense", "data"), ("dense", "fsdp"), ("dense", "tensor"), ("dense", "mixed"), ("lfm3", "mixed"),
     ("dense", "context"), ("lfm3", "context"), ("lfm3", "context mixed"), ("moe", "expert"), ("moe", "expert mixed")]
)
def test_two_steps_on_eight_devices_equal_those_on_one(name, mesh_name):
    _assert_same(_trained(name, mesh_name), _trained(name, "one device"))


def test_replicas_meet_twice_a_step_whatever_the_accumulation():
    """In the loop over micro-batches no device hears of another; outside of it all four gather parameters and sum gradients."""
    _assert_same(_trained("dense", "replicas", 2), _trained("dense", "one device"))
    computations = _step("dense", "replicas", 2).as_text().split("\n\n")
    (entry,) = (text for text in computations if text.startswith("ENTRY"))
    loops = [text for text in computations if text is not entry]
    groups = r"replica_groups=(\{\{.*?\}\}|mesh\[.*?\] \{.*?\}|[^ ]+), "
    collectives = lambda text: set(re.findall(rf" (all-reduce|all-gather|reduce-scatter|all-to-all)\(.*?{groups}", text))
    everyone = re.compile(r"\{\{0,1,2,3\}\}|\[1,4\]<=\[4\]|mesh\[.*'(axis_\d)'=4.*\] \{'\1'\}")
    assert " while(" in entry and {kind for kind, _ in collectives(entry)} == {"all-reduce", "all-gather"}
    assert all(everyone.fullmatch(group) for _, group in collectives(entry)), collectives(entry)
    assert {group for text in loops for _, group in collectives(text)} <= {"{{0},{1},{2},{3}}"}


@pytest.mark.parametrize(
    "mesh_name, accumulation, remat", [("one device", 4, "none"), ("one device", 1, "full"), ("mixed", 2, "none")]
)
def test_expert_bias_once_per_step_any_accum_remat_mesh_eval(mesh_name, accumulation, remat):
    """Two steps are the same, the bias to its last bit, and it is so far off zero that it must have moved in both.

    The rows' weights go from 0 to 12: means of the micro-batches' means would be another loss.
    """
    ours = _trained("moe", mesh_name, accumulation, remat)
    _assert_same(ours, _trained("moe", "one device"))
    bias = ours[0].buffers["layers"][1]["moe"]["expert_bias"]
    assert np.abs(bias).max() > EXPERT_BIAS_RATE and bias.sum() == 0
    weights = _batch()["loss_mask"].sum(axis=1).reshape(2, 4).sum(axis=0)
    assert weights.max() > 1.5 * weights.min()


def test_expert_bias_moves_by_the_sign_of_the_load_and_stays_in_evaluation():
    """By hand from the router's counts of the same batch under the same parameters."""
    functions, _, objective, mesh = _parts("moe", "one device")
    state, bias = _init("moe", "one device"), np.zeros(4)
    evaluate = make_eval_step(functions, objective, mesh)
    for seed in range(2):
        batch = _placed(seed, mesh)
        counts = np.asarray(evaluate(state.params, state.buffers, batch).router_counts)
        assert counts.sum() == 2 * _batch(seed)["loss_mask"].sum()
        np.testing.assert_array_equal(state.buffers["layers"][1]["moe"]["expert_bias"], bias)
        state, metrics = _step("moe", "one device")(state, batch)
        bias += EXPERT_BIAS_RATE * np.sign(counts.mean() - counts[0])
        bias -= bias.mean()
        assert float(metrics["router_imbalance"]) == pytest.approx(counts.max() / counts.mean())
    np.testing.assert_array_equal(state.buffers["layers"][1]["moe"]["expert_bias"], bias)


@functools.cache
def _evaluated(mesh_name):
    functions, _, objective, mesh = _parts("dense", mesh_name)
    state = _init("dense", mesh_name)
    evaluate = make_eval_step(functions, objective, mesh)
    return jax.device_get(evaluate(state.params, state.buffers, _placed(0, mesh)))


@pytest.mark.parametrize("mesh_name", ["data", "mixed"])
def test_evaluation_of_a_state_that_replicas_split_equals_that_on_one_device(mesh_name):
    ours, expected = _evaluated(mesh_name), _evaluated("one device")
    assert expected.weight == _batch()["loss_mask"].sum()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, expected)


def test_each_layer_has_its_own_counts():
    """Twelve layers, two of them dense: layer 10 comes after layer 2. In layer l only expert l % 4 is chosen."""
    buffers = {"layers": {layer: {"moe": {"expert_bias": jnp.zeros(4)}} for layer in range(2, 12)}}
    counts = jnp.asarray([np.eye(4, dtype=np.float32)[layer % 4] for layer in range(2, 12)])
    moved = _balanced(buffers, counts, 1.0)["layers"]
    for layer in range(2, 12):
        np.testing.assert_allclose(moved[layer]["moe"]["expert_bias"], 0.5 - 2 * np.eye(4)[layer % 4])


def test_a_tiny_run_learns_its_batch_by_heart():
    mesh, state, losses = _parts("dense", "one device")[-1], _init("dense", "one device"), []
    for _ in range(300):
        state, metrics = _step("dense", "one device")(state, _placed(0, mesh))
        losses.append(float(metrics["nll"]))
    assert losses[0] > 4 and losses[-1] < 0.2
