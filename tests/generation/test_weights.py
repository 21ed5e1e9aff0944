"""Weights in eight bits: rounded as by hand, one scale for each output, and read as eight bits by the TPU's program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lfm_jax.generation import Engine, EngineConfig, Request, SamplingConfig
from lfm_jax.generation import slots as device
from lfm_jax.generation.sampling import Needs
from lfm_jax.generation.weights import quantize_weights
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, QuantizedWeight, functional
from lfm_jax.sharding import aot

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, attention_gate=True, tie_embeddings=False, conv_bias=True, context_length=64,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=2),
)  # fmt: skip
# The axes that a product sums over, by the parameter's name (and its number of axes, where names repeat).
SUMMED = {
    "embedding": (1,), "lm_head": (0,), "in_proj": (0,), "q_proj": (0,), "k_proj": (0,), "v_proj": (0,), "gate_proj": (0,),
    ("out_proj", 2): (0,), ("out_proj", 3): (0, 1), ("gate", 2): (0,), ("up", 2): (0,), ("down", 2): (0,), ("gate", 3): (1,),
    ("up", 3): (1,), ("down", 3): (1,),
}  # fmt: skip


@functools.cache
def weights():
    functions = functional(lambda rngs: Decoder(CONFIG, ComputeConfig(dtype="float32"), rngs=rngs))
    params, buffers = functions.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return functions, params, buffers


def _by_path(tree):
    is_leaf = lambda node: isinstance(node, QuantizedWeight)
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]}


def _summed(path, leaf):
    return SUMMED.get(path[-1]) or SUMMED.get((path[-1], leaf.ndim))


def test_every_matrix_has_one_scale_for_each_output_and_is_off_by_half_a_step_at_most():
    functions, params, _ = weights()
    quantized, rounded = _by_path(quantize_weights(functions, params)), 0
    for path, leaf in _by_path(params).items():
        summed = None if path[-1] == "router" else _summed(path, leaf)
        if summed is None:
            np.testing.assert_array_equal(quantized[path], leaf)
            continue
        rounded += 1
        scale = np.abs(leaf).max(axis=summed, keepdims=True) / 127
        np.testing.assert_allclose(quantized[path].scale, scale, rtol=1e-6)
        assert quantized[path].values.dtype == jnp.int8 and np.abs(quantized[path].values).max() == 127
        assert (np.abs(quantized[path].astype(jnp.float32) - leaf) <= scale * 0.50001).all()
    assert rounded == 2 + 2 * 2 + 5 + 2 * 3 + 3


def test_the_engine_answers_as_with_the_rounded_weights():
    functions, params, buffers = weights()
    by_hand = {}
    for path, leaf in _by_path(params).items():
        summed = None if path[-1] == "router" else _summed(path, leaf)
        scale = 1 if summed is None else np.abs(leaf).max(axis=summed, keepdims=True) / np.float32(127)
        by_hand[path] = leaf if summed is None else jnp.asarray(np.round(leaf / scale) * scale)
    rounded = jax.tree_util.tree_map_with_path(lambda path, _: by_hand[tuple(key.key for key in path)], params)
    requests = [Request(prompt=(1, 5, 9), sampling=SamplingConfig(max_new_tokens=10, temperature=0))]
    (expected,) = Engine(functions, CONFIG, rounded, buffers).run(requests)
    (found,) = Engine(functions, CONFIG, params, buffers, EngineConfig(weights="int8")).run(requests)
    assert found.tokens == expected.tokens
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)


def test_an_output_without_weights_stays_zero():
    functions, params, _ = weights()
    params = {**params, "lm_head": params["lm_head"].at[:, 3].set(0.0)}
    head = quantize_weights(functions, params)["lm_head"].astype(jnp.float32)
    assert not np.any(head[:, 3]) and np.isfinite(head).all()


def test_the_tpu_reads_eight_bits_in_every_step():
    """XLA would rather make floats of them once, before the loop, or of a table of which a row is wanted."""
    config = ModelConfig(
        vocab_size=32_768, embed_dim=1024, layer_types=("conv", "full_attention"), num_heads=16, num_kv_heads=8, head_dim=64,
        mlp_dim=4096,
    )  # fmt: skip
    functions = functional(lambda rngs: Decoder(config, ComputeConfig(dtype="bfloat16"), rngs=rngs))
    program = device.Program(functions, config, jnp.dtype(jnp.bfloat16), 256)
    chip = SingleDeviceSharding(aot.tpu_devices("v5e:2x2")[0])
    abstract = (
        jax.eval_shape(functools.partial(quantize_weights, functions), functions.abstract_params), functions.abstract_buffers,
        jax.eval_shape(lambda: device.empty_slots(program, 8, 256, 1, False)), jax.ShapeDtypeStruct((8,), bool),
        jax.ShapeDtypeStruct((), bool),
    )  # fmt: skip
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), abstract)
    traced = device.decode.trace(program, *placed, steps=4, reach=128, needs=Needs(*[False] * 5), top=0)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1024 * 4096 * 2 < memory.argument_size_in_bytes  # not one feed-forward matrix in floats


def test_a_quantized_weight_is_read_whole():
    with pytest.raises(TypeError, match=r"a quantized weight is read whole, \[...\]; not \[0\]"):
        QuantizedWeight(jnp.zeros((2, 2), jnp.int8), jnp.ones((1, 2)))[0]


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="weights must be one of float, int8, got 'int4'"):
        EngineConfig(weights="int4")
