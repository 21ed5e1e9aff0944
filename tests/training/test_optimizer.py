"""AdamW, clipping and decay groups against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfm_jax.models import PRESETS, Decoder, functional
from lfm_jax.training.optimizer import OptimizerConfig, decayed, make_optimizer
from lfm_jax.training.schedule import ScheduleConfig

FLAT = ScheduleConfig(decay_share=0.0)
SHAPES = {
    "embed": {"embedding": (11, 6)},
    "layers": {0: {"operator": {"in_proj": (6, 3, 6), "in_bias": (3, 6), "kernel": (3, 6), "kernel_bias": (6,), "out_bias": (6,)},
                   "operator_norm": {"scale": (6,)}}},
}  # fmt: skip
SPARED = {"in_bias", "kernel_bias", "out_bias", "scale"}


def _random(seed, scale=1.0):
    shapes, tree = jax.tree.flatten(SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes])


def _names(tree):
    return [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _torch_run(config, params, gradients):
    """The parameters after each update, and the gradients' norms."""
    torch = pytest.importorskip("torch")
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in jax.tree.leaves(params)]
    spared = [name in SPARED for name in _names(params)]
    groups = [
        {"params": [tensor for tensor, free in zip(tensors, spared, strict=True) if free == group],
         "weight_decay": 0.0 if group else config.weight_decay}
        for group in (False, True)
    ]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps)
    norms, states = [], []
    for gradient in gradients:
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(np.asarray(leaf))
        norms.append(float(torch.nn.utils.clip_grad_norm_(tensors, config.clip_norm or float("inf"))))
        adamw.step()
        states.append([tensor.detach().numpy().copy() for tensor in tensors])
    return states, norms


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_updates_equal_torch_adamw_with_the_same_groups(clip_norm):
    """Gradients of norm 23 and of 0.2: one is clipped, one is not."""
    config = OptimizerConfig(learning_rate=1e-2, schedule=FLAT, weight_decay=0.3, clip_norm=clip_norm, eps=1e-6)
    optimizer = make_optimizer(config, steps=10)
    params, gradients = _random(0), [_random(1, 2.0), _random(2, 0.02), _random(3, 0.5)]
    expected, norms = _torch_run(config, params, gradients)
    assert norms[0] > 10 and norms[1] < 0.5
    state = optimizer.init(params)
    for gradient, theirs in zip(gradients, expected, strict=True):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda ours, tensor: np.testing.assert_allclose(ours, tensor, rtol=1e-5, atol=1e-6),
                     jax.tree.leaves(params), theirs)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_exactly_the_norms_and_biases_of_every_preset_are_spared(name):
    config = PRESETS[name]
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    flags = jax.tree_util.tree_flatten_with_path(decayed(functions.abstract_params))[0]
    ours = {jax.tree_util.keystr(path, simple=True, separator=".") for path, decays in flags if not decays}
    expected = {"final_norm.scale"}
    for index, kind in enumerate(config.layer_types):
        norms = ["operator_norm", "ffn_norm"] + ["post_operator_norm", "post_ffn_norm"] * config.sandwich_norms
        norms += ["operator.q_norm", "operator.k_norm"] * (kind != "conv")
        expected |= {f"layers.{index}.{norm}.scale" for norm in norms}
        if kind == "conv" and config.conv_bias:
            expected |= {f"layers.{index}.operator.{bias}" for bias in ("in_bias", "kernel_bias", "out_bias")}
    assert ours == expected
    # And by shape: what is spared are vectors, what decays are matrices and taps.
    shapes = jax.tree_util.tree_leaves_with_path(functions.abstract_params)
    assert {jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in shapes if leaf.ndim == 1} == expected


def test_biases_are_spared():
    flags = decayed(_random(0))
    assert {name for name, decays in zip(_names(flags), jax.tree.leaves(flags), strict=True) if not decays} == SPARED


def test_moments_are_float32_whatever_the_gradients_are():
    optimizer = make_optimizer(OptimizerConfig(), steps=10)
    params = _random(0)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(narrow, optimizer.init(params), params)
    adam = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adam))


def test_the_rate_follows_the_schedule_and_stands_in_the_state():
    """With b1 = b2 = 0 and no decay, an update is -rate * sign(gradient)."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=3)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, schedule=schedule, b1=0, b2=0, weight_decay=0), steps=8)
    params = {"kernel": jnp.ones((2, 2))}
    state, rates = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update({"kernel": jnp.full((2, 2), 3.0)}, state, params)
        rates.append(float(optax.tree.get(state, "learning_rate")))
        np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -rates[-1]), rtol=1e-5)
    theirs = optax.warmup_cosine_decay_schedule(0.125, 0.5, 3, 8)
    np.testing.assert_allclose(rates, [theirs(step) for step in range(8)], rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"eps": -1e-8}, "eps must be positive, got -1e-08"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"matrix_rate": 0.0}, "matrix_rate must be positive, got 0.0"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), got 1.0"),
        ({"b2": 0.999, "moment_dtype": "bfloat16"}, "b2=0.999, .*: averages in bfloat16 stand still beyond 0.98; lower them,"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None for no clipping; got 0.0"),
    ],
)
def test_impossible_settings_of_the_optimizer_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)
