"""Splash attention, emulated, against attention with its scores written out: values and gradients."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.kernels import attention
from lfm_jax.sharding import MeshConfig, dealt_order, make_mesh

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 512, 4, 2, 64


def _inputs(dtype=jnp.float32):
    """query, key, value, the gradient of the output, segment ids; documents end within blocks and at their borders."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, heads: jax.random.normal(key, (BATCH, SEQ, heads, HEAD_DIM)).astype(dtype)
    arrays = [draw(key, heads) for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)]
    segment_ids = jnp.asarray([[1] * 70 + [2] * 186 + [3] * 200 + [0] * 56, [1] * 512], jnp.int32)
    return *arrays, segment_ids


def _mask(segment_ids, window):
    place = np.arange(SEQ)
    mask = place[:, None] >= place
    if window is not None:
        mask &= place[:, None] < place + window
    return jnp.asarray(mask)[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _run(implementation, window, mesh=None, dtype=jnp.float32):
    """The output and the gradients of query, key and value, in the order of the sequence."""
    query, key, value, dout, segment_ids = _inputs(dtype)
    mask = _mask(segment_ids, window)
    order = dealt_order(SEQ, 1 if mesh is None else mesh.shape["context"])
    deal = lambda array, axis=1: jnp.take(array, order, axis)
    mask, segment_ids, dout = deal(deal(mask), 2), deal(segment_ids), deal(dout)

    def step(query, key, value):
        function = lambda *inputs: attention(*inputs, mask, segment_ids, window=window, implementation=implementation)
        out, transpose = jax.vjp(function, query, key, value)
        return out, *transpose(dout)

    inputs = [deal(array) for array in (query, key, value)]
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(step)(*inputs))
    return [array[:, np.argsort(order)] for array in found]


def _assert_close(found, expected, tolerance):
    """Sums of 512 products in another order: float32 rounds each by 2^-24, bfloat16 each result by 2^-9."""
    for name, ours, theirs in zip(("out", "query", "key", "value"), found, expected, strict=True):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("window", [None, 100])
def test_splash_attention_equals_the_reference(window):
    _assert_close(_run("splash", window), _run("reference", window), 1e-5)


def test_splash_attention_in_bfloat16():
    _assert_close(_run("splash", None, dtype=jnp.bfloat16), _run("reference", None, dtype=jnp.bfloat16), 2**-6)


@pytest.mark.parametrize("implementation", ["splash", "reference"])
@pytest.mark.parametrize(
    "config, window",
    [
        (MeshConfig(fsdp=1, context=2, tensor=4), None),  # of four devices two share a head of keys
        (MeshConfig(fsdp=2, context=2, tensor=2), 100),
        (MeshConfig(fsdp=2, context=4), None),
    ],
)
def test_heads_and_sequences_over_devices(implementation, config, window):
    _assert_close(_run(implementation, window, make_mesh(config)), _run("reference", window), 1e-5)


def test_a_shape_that_the_kernel_does_not_take_is_refused():
    short = jnp.zeros((1, 120, 2, 64))
    with pytest.raises(ValueError, match="takes sequences of a multiple of 128 and heads of a multiple of 64, got 120 and 64"):
        attention(short, short, short, jnp.ones((1, 120, 120), bool), None, implementation="splash")
