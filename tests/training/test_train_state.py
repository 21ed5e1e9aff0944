"""Shapes and shardings of the training state, for models of every size, and the arrays that are made from them."""

import dataclasses
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lfm_jax.models import PRESETS, ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import OptimizerConfig, abstract_state, check_mesh, init_state, make_optimizer

TINY = ModelConfig(
    vocab_size=64, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=1),
)  # fmt: skip
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)


def _functions(config):
    return functional(lambda rngs: Decoder(config, ComputeConfig(), rngs=rngs))


def _abstract(config, mesh_config=MIXED):
    return abstract_state(_functions(config), make_optimizer(OptimizerConfig(), 10), make_mesh(mesh_config))


def _bytes(leaf, sharding):
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def test_parameters_and_their_moments_are_split_alike():
    """By hand: heads, mlp, channels and vocab over tensor; the first of mlp and embed over fsdp; a free axis over data."""
    state = _abstract(TINY)
    expected = {
        ("embed", "embedding"): PartitionSpec(("data", "tensor"), "fsdp"),
        ("layers", 0, "operator", "in_proj"): PartitionSpec(("data", "fsdp"), None, "tensor"),
        ("layers", 0, "operator", "kernel"): PartitionSpec(None, ("data", "tensor")),
        ("layers", 0, "mlp", "up"): PartitionSpec(("data", "fsdp"), "tensor"),
        ("layers", 0, "mlp", "down"): PartitionSpec(("tensor", "fsdp"), "data"),
        ("layers", 1, "operator", "k_proj"): PartitionSpec("fsdp", "tensor", "data"),
        ("layers", 1, "moe", "gate"): PartitionSpec("data", "fsdp", "tensor"),
        ("final_norm", "scale"): PartitionSpec(("data", "fsdp")),
    }
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for tree in (state.params, adam.mu, adam.nu):
        for path, spec in expected.items():
            leaf = tree
            for key in path:
                leaf = leaf[key]
            assert leaf.sharding.spec == spec and leaf.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.sharding, adam.mu) == jax.tree.map(lambda leaf: leaf.sharding, state.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, adam.nu) == jax.tree.map(lambda leaf: leaf.sharding, state.params)
    scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == ()]
    assert len(scalars) == 4 and all(leaf.sharding.spec == PartitionSpec() for leaf in scalars)


def test_init_makes_what_was_announced_and_no_device_holds_more_than_its_part():
    """On two meshes, to the same values."""
    functions, optimizer = _functions(TINY), make_optimizer(OptimizerConfig(), 10)

    def check(announced, leaf):
        assert (announced.shape, announced.dtype, announced.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {_bytes(announced, announced.sharding)}

    states = []
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MIXED)):
        abstract = abstract_state(functions, optimizer, mesh)
        states.append(init_state(functions, optimizer, mesh, 5))
        jax.tree.map(check, abstract, states[-1])
        whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        part = sum(_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(abstract))
        assert part < whole / 2 or mesh.size == 1
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_experts_are_split_over_expert_and_everything_else_over_context_and_expert_as_over_fsdp():
    state = _abstract(TINY, MeshConfig(fsdp=2, expert=2, context=2))
    layer = state.params["layers"][1]
    assert layer["moe"]["gate"].sharding.spec == PartitionSpec("expert", ("fsdp", "context"), None)
    assert layer["moe"]["router"].sharding.spec == PartitionSpec(("fsdp", "context", "expert"), None)
    assert layer["operator"]["q_proj"].sharding.spec == PartitionSpec(("fsdp", "context", "expert"), None, None)
    assert layer["moe"]["down"].sharding.spec == PartitionSpec("expert", ("fsdp", "context"), None)
    # Where a width of 24 has no more room, the next axis takes what is left.
    layer = _abstract(TINY, MeshConfig(data=1, fsdp=1, context=2, tensor=4)).params["layers"][0]
    assert layer["mlp"]["down"].sharding.spec == PartitionSpec(("tensor", "context"), None)
    narrow, mesh = dataclasses.replace(TINY, mlp_dim=20), MeshConfig(data=1, fsdp=1, context=2, tensor=4)
    assert _abstract(narrow, mesh).params["layers"][0]["mlp"]["down"].sharding.spec == PartitionSpec("tensor", "context")
    check_mesh(_functions(narrow), make_mesh(mesh))


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(fsdp=1, tensor=8), r"tensor=8 does not divide heads = 4 of layers.0.*; together they may be 4, and data"),
        (MeshConfig(fsdp=1, expert=8), r"expert=8 does not divide expert = 4 of layers.1.moe.*; together they may be 4,"),
        (MeshConfig(data=1, fsdp=4, context=2), None),
        (MeshConfig(fsdp=2, tensor=4), None),  # two heads of keys: every pair of devices has a copy of one
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(config, message):
    functions = _functions(dataclasses.replace(TINY, layer_types=("full_attention", "conv")))
    if message is None:
        check_mesh(functions, make_mesh(config))
        return
    with pytest.raises(ValueError, match=message):
        check_mesh(functions, make_mesh(config))


class Draw(nnx.Module):
    """Four numbers drawn at random."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jax.random.normal(rngs.params(), 4), axes=(None,))


def test_initial_values_are_drawn_from_the_seed():
    functions, optimizer, mesh = functional(Draw), make_optimizer(OptimizerConfig(), 10), make_mesh(MIXED)
    first, again, other = (np.asarray(init_state(functions, optimizer, mesh, seed).params["scale"]) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


@pytest.mark.parametrize("name", ["lfm2_24b_a2b", "lfm3_1_7b"])
def test_big_presets_are_described_without_an_array(name):
    gc.collect()  # arrays that other tests have left in cycles would go meanwhile
    before = len(jax.live_arrays())
    state = _abstract(PRESETS[name], MeshConfig(fsdp=8))
    assert len(jax.live_arrays()) == before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    # Parameters and two moments, float32, split by eight but for a few vectors.
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    part = sum(_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(state))
    assert 12 * parameters / 8 < part < 1.001 * 12 * parameters / 8
