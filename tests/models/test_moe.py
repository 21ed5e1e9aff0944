"""Routing and experts against a loop over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.models.config import ComputeConfig, MoEConfig
from lfm_jax.models.moe import ExpertBias, MoE

CONFIG = MoEConfig(num_experts=6, experts_per_token=2, mlp_dim=16, scaling_factor=1.7)


def _moe(config=CONFIG):
    moe = MoE(8, config, ComputeConfig(dtype="float32"), residual_gain=1.0, rngs=nnx.Rngs(0))
    if config.expert_bias:
        moe.expert_bias[...] = jnp.asarray([0.9, -0.9, 0.0, 0.4, -0.2, 0.1])
    return moe


def _loop(moe, x, replayed=None, router=None):
    """One token and one expert at a time, in float64. replayed: experts of each token, -1 where the router chooses them."""
    config, out = moe.config, np.zeros(x.shape)
    own, gate, up, down = (np.asarray(w[...], np.float64) for w in (moe.router, moe.gate, moe.up, moe.down))
    router = own if router is None else router
    bias = np.asarray(moe.expert_bias[...], np.float64) if config.expert_bias else 0
    for index in np.ndindex(x.shape[:2]):
        token = np.asarray(x[index], np.float64)
        score = 1 / (1 + np.exp(-token @ router))
        chosen = np.argsort(-(score + bias), kind="stable")[: config.experts_per_token]
        chosen = chosen if replayed is None or replayed[index][0] < 0 else replayed[index]
        weight = score[chosen] / (score[chosen].sum() + 1e-6) if config.normalize_weights else score[chosen]
        for expert, scale in zip(chosen, weight * config.scaling_factor, strict=True):
            hidden = token @ gate[expert]
            out[index] += scale * ((hidden / (1 + np.exp(-hidden)) * (token @ up[expert])) @ down[expert])
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_lfm2moe_router_sigmoid_bias_selects_only_scaling(normalize, biased):
    moe = _moe(dataclasses.replace(CONFIG, normalize_weights=normalize, expert_bias=biased))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    out, (counts, _) = moe(x, None)
    np.testing.assert_allclose(out, _loop(moe, x), atol=1e-5)
    assert float(counts.sum()) == 2 * 9 * 2


def test_the_router_works_in_float32_in_both_directions():
    """By the precision of its products: a CPU has no other."""
    graphdef, weights = nnx.split(_moe())
    loss = lambda weights, x: jnp.sum(nnx.merge(graphdef, weights).route(x)[1])
    text = jax.jit(jax.grad(loss, (0, 1))).lower(weights, jnp.ones((2, 9, 8), jnp.bfloat16)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_expert_bias_changes_the_choice_and_takes_no_gradient():
    moe, plain = _moe(), _moe(dataclasses.replace(CONFIG, expert_bias=False))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    assert np.any(np.asarray(moe.route(x)[0]) != np.asarray(plain.route(x)[0]))

    graphdef, bias, weights = nnx.split(moe, ExpertBias, ...)
    loss = lambda bias: jnp.sum(nnx.merge(graphdef, bias, weights)(x, None)[0] ** 2)
    np.testing.assert_array_equal(jax.grad(loss)(bias)["expert_bias"][...], np.zeros(6))


@pytest.mark.parametrize("normalize", [True, False])
def test_router_replay_same_experts_gradient_to_router(normalize):
    """The gradient by differences of the loop, of experts that the router would not choose, too; what is told is its choice."""
    moe = _moe(dataclasses.replace(CONFIG, normalize_weights=normalize))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    replayed = np.random.default_rng(0).permuted(np.tile(np.arange(6), (2, 9, 1)), axis=2)[:, :, :2]
    replayed[0, 3:6] = -1
    out, routed = moe(x, None, jnp.asarray(replayed))
    np.testing.assert_allclose(out, _loop(moe, x, replayed), atol=1e-5)
    assert np.abs(out - _loop(moe, x)).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, routed, moe(x, None)[1])

    direction = np.random.default_rng(1).normal(size=x.shape)
    graphdef, weights = nnx.split(moe)
    loss = lambda weights: jnp.sum(nnx.merge(graphdef, weights)(x, None, jnp.asarray(replayed))[0] * direction.astype(np.float32))
    gradient = np.asarray(jax.grad(loss)(weights)["router"][...])
    router = np.asarray(moe.router[...], np.float64)
    for place in [(0, 0), (3, 4), (7, 5), (5, 2)]:
        step = np.zeros_like(router)
        step[place] = 1e-5
        ends = (_loop(moe, x, replayed, router + sign * step) for sign in (1, -1))
        assert gradient[place] == pytest.approx(np.sum(np.subtract(*ends) * direction) / 2e-5, rel=1e-3, abs=1e-4)
    assert (np.abs(gradient) > 1e-4).all()


def test_padding_is_not_counted():
    x = jax.random.normal(jax.random.key(1), (1, 5, 8))
    valid = jnp.asarray([[True, True, False, True, False]])
    moe = _moe()
    _, (counts, _) = moe(x, valid)
    chosen = np.asarray(moe.route(x)[0])[np.asarray(valid)]
    np.testing.assert_array_equal(counts, np.bincount(chosen.ravel(), minlength=6))
