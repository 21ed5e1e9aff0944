"""Blocks that repeat, in loops: the same numbers, and fewer blocks for the compiler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional, preset
from lfm_jax.models.repeats import repeats

# As in lfm2_8b_a1b, in small: dense blocks, then units of three and of two with experts.
CONFIG = ModelConfig(
    vocab_size=32, embed_dim=16, layer_types=("conv", "conv", *("full_attention", "conv", "conv") * 2, "full_attention"),
    num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=2),
)  # fmt: skip


@pytest.mark.parametrize("kinds", ["", "a", "aaaa", "abab", "abcabcab", "ccaccaccacacac", "aabaabb", "abcd"])
def test_stretches_make_up_the_whole_and_each_is_its_unit_over_and_over(kinds):
    start = 0
    for period, times in repeats(kinds):
        assert kinds[start : start + period * times] == kinds[start : start + period] * times
        start += period * times
    assert start == len(kinds)


@pytest.mark.parametrize(
    "name, compiled", [("lfm2_350m", 6), ("lfm2_1_2b", 6), ("lfm2_8b_a1b", 8), ("lfm2_24b_a2b", 7), ("lfm3_1_7b", 7)]
)
def test_presets_are_a_few_kinds_of_blocks(name, compiled):
    config = preset(name)
    kinds = [(kind, config.is_moe_layer(index)) for index, kind in enumerate(config.layer_types)]
    assert sum(period for period, _ in repeats(kinds)) == compiled


@functools.cache
def _gradient(compute, config=CONFIG):
    """(hidden, router counts, gradient by every parameter) of the same packed rows; experts' biases differ."""
    functions = functional(lambda rngs: Decoder(config, compute, rngs=rngs))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)
    params, buffers = jax.tree.map(draw, functions.abstract_params), jax.tree.map(draw, functions.abstract_buffers)
    tokens = jnp.asarray(rng.integers(0, 32, (2, 12)), jnp.int32)
    segment_ids = jnp.asarray(np.repeat([[1, 1, 2, 0], [3, 4, 4, 4]], 3, axis=1), jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2], [0, 1, 2, *range(9)]], jnp.int32)

    def loss(params):
        output = functions.bind(params, buffers)(tokens, segment_ids, positions)
        return jnp.sum(jnp.square(output.hidden)), (output.hidden, output.router_counts)

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    return *found, gradient


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_loop_over_blocks_equals_one_after_the_other(remat):
    """Float32 sums in another order; the router's counts, layer by layer, to the last."""
    looped, plain = _gradient(ComputeConfig(scan_layers=True, remat=remat)), _gradient(ComputeConfig())
    near = lambda ours, expected: np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
    near(looped[0], plain[0])
    assert looped[1].shape == (7, 4) and len(np.unique(plain[1], axis=0)) > 4
    np.testing.assert_array_equal(looped[1], plain[1])
    jax.tree.map(near, looped[2], plain[2])


def test_the_compiler_sees_one_unit_of_each_stretch():
    """Twelve blocks of one kind are one, in a loop of twelve."""
    config = dataclasses.replace(CONFIG, layer_types=("conv",) * 12, moe=None)
    functions = functional(lambda rngs: Decoder(config, ComputeConfig(scan_layers=True), rngs=rngs))
    forward = lambda params, tokens: functions.bind(params, {})(tokens).hidden
    traced = jax.make_jaxpr(forward)(functions.abstract_params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    loops = [equation for equation in traced.eqns if equation.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == [12]
