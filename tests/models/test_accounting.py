"""Sizes and FLOPs against hand counts and the compiler's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.models import PRESETS, ComputeConfig, Decoder, ModelConfig, MoEConfig, accounting, functional, init_cache, preset

SMALL = ModelConfig(
    vocab_size=50, embed_dim=8, layer_types=("conv", "full_attention", "sliding_attention"), num_heads=4, num_kv_heads=2,
    head_dim=6, mlp_dim=20, conv_width=4, sliding_window=3, attention_gate=True,
    moe=MoEConfig(num_experts=5, experts_per_token=2, mlp_dim=10, num_dense_layers=2),
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_groups_add_up_to_the_model(name):
    config = preset(name)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(accounting.abstract_params(config)))
    assert sum(accounting.parameter_groups(config).values()) == total


def test_groups_by_hand():
    assert accounting.parameter_groups(SMALL) == {
        "embeddings": 50 * 8,
        "operators": (8 * 24 + 4 * 8 + 8 * 8) + 2 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 8 * 4),
        "feed_forward": 2 * 3 * 8 * 20 + 8 * 5 + 5 * 3 * 8 * 10,
        "norms": 3 * 2 * 8 + 2 * 2 * 6 + 8,
    }
    assert accounting.parameter_groups(dataclasses.replace(SMALL, tie_embeddings=False))["embeddings"] == 2 * 50 * 8


def test_flops_hand_count():
    """Multiply-adds of each layer type at seq 5, counted by hand; a multiply-add is 2 FLOPs."""
    projections = 8 * 24 + 8 * 8  # in_proj and out_proj of the convolution
    elementwise = 8 * (1 + 2 * 4 + 1)  # B * x, four taps of a product and a sum, C * the sum: FLOPs, not multiply-adds
    attention = 8 * 24 + 2 * 8 * 12 + 24 * 8 + 8 * 4  # q, k and v, out, gate
    full = 2 * 24 * (1 + 2 + 3 + 4 + 5) / 5  # scores and weighted sum over the keys a causal query sees
    sliding = 2 * 24 * (1 + 2 + 3 + 3 + 3) / 5
    dense, moe = 3 * 8 * 20, 8 * 5 + 2 * 3 * 8 * 10
    hand = 2 * (projections + 2 * attention + full + sliding + 2 * dense + moe + 8 * 50) + elementwise
    assert accounting.forward_flops_per_token(SMALL, 5) == pytest.approx(hand, rel=1e-12)
    assert accounting.training_flops_per_token(SMALL, 5) == pytest.approx(3 * hand, rel=1e-12)
    square = 2 * (2 * 2 * 24 * 5 - full - sliding)
    assert accounting.forward_flops_per_token(SMALL, 5, causal=False) == pytest.approx(hand + square, rel=1e-12)


@pytest.mark.parametrize("name", ["nano", "lfm3_1_7b"])
def test_flops_agree_with_the_compiler(name):
    """XLA counts all of the square of attention, and the norms, rotations and softmax that ours leaves out: 6 % covers them."""
    config = dataclasses.replace(preset(name), layer_types=preset(name).layer_types[:6])
    model = functional(lambda rngs: Decoder(config, ComputeConfig(short_conv="reference"), rngs=rngs))

    def forward(params, buffers, tokens):
        bound = model.bind(params, buffers)
        return bound.logits(bound(tokens).hidden)

    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    counted = jax.jit(forward).lower(model.abstract_params, model.abstract_buffers, tokens).compile().cost_analysis()["flops"]
    ours = 256 * accounting.forward_flops_per_token(config, 256, causal=False)
    assert 1.0 <= counted / ours < 1.06


def test_cache_bytes_are_those_of_a_real_cache():
    config = dataclasses.replace(SMALL, sliding_window=16)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 16, jnp.bfloat16))
    real = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert accounting.cache_bytes(config).total(16, config.sliding_window) == real


def test_decoding_reads_the_active_weights_once_and_the_cache():
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    idle_experts = 3 * 3 * 8 * 10
    weights = accounting.parameter_count(untied) - idle_experts - 50 * 8
    cache = accounting.cache_bytes(untied).total(7, 3)
    assert accounting.decode_bytes_per_token(untied, 7) == 2 * weights + cache
    assert np.isclose(accounting.decode_bytes_per_token(SMALL, 7), 2 * weights + cache, rtol=1e-12)
