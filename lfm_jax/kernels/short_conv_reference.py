"""The specification of the double-gated short convolution, in plain JAX."""

import jax
import jax.numpy as jnp

from lfm_jax.arrays import SegmentIds


def gated_input(bcx: jax.Array) -> jax.Array:
    """B * x in float32, rounded to the type of `bcx`: what the convolution sees and what a state holds.

    The rounding makes chunks that are chained through their states equal to the whole, bit for bit. It is spelled out because a
    compiler may otherwise keep the excess precision of the product.
    """
    product = bcx[0].astype(jnp.float32) * bcx[2].astype(jnp.float32)
    info = jnp.finfo(bcx.dtype)
    return jax.lax.reduce_precision(product, info.nexp, info.nmant)


def final_state(bcx: jax.Array, initial_state: jax.Array | None, width: int) -> jax.Array:
    """The last width - 1 rows of [initial_state; B * x]; [batch, width - 1, channels]."""
    tail = gated_input(bcx[:, :, max(0, bcx.shape[2] - width + 1) :]).astype(bcx.dtype)
    return jnp.concatenate([_state(bcx, initial_state, width), tail], axis=1)[:, tail.shape[1] :]


def _state(bcx: jax.Array, initial_state: jax.Array | None, width: int) -> jax.Array:
    _, batch, _, channels = bcx.shape
    return jnp.zeros((batch, width - 1, channels), bcx.dtype) if initial_state is None else initial_state


def tap_visibility(segment_ids: SegmentIds, initial_segment_ids: jax.Array | None, width: int) -> jax.Array:
    """Which taps each position may read, as bits: bit j of [batch, seq] int32 is set if t - j is of the same segment as t.

    Args:
      initial_segment_ids: [batch, width - 1], the segments of the initial state; None: the first position's segment.
    """
    if initial_segment_ids is None:
        initial_segment_ids = jnp.repeat(segment_ids[:, :1], width - 1, axis=1)
    seq = segment_ids.shape[1]
    extended = jnp.concatenate([initial_segment_ids.astype(segment_ids.dtype), segment_ids], axis=1)
    same = [extended[:, width - 1 - tap :][:, :seq] == segment_ids for tap in range(width)]
    return sum(bit.astype(jnp.int32) << tap for tap, bit in enumerate(same))


def tap_reach(visibility: jax.Array, width: int) -> jax.Array:
    """The same seen from the position that is read: bit j of [batch, seq] is set if t + j is there and reads t."""
    ahead = lambda tap: jnp.pad(visibility[:, tap:], ((0, 0), (0, min(tap, visibility.shape[1])))) >> tap & 1
    return sum(ahead(tap) << tap for tap in range(width))


def short_conv_reference(
    bcx: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    visibility: jax.Array | None,
    initial_state: jax.Array | None,
) -> jax.Array:
    """C * (causal depthwise convolution of B * x, plus bias), with every product and sum in float32.

    This is the middle of transformers' `Lfm2ShortConv`, with segments and an initial state.

    Args:
      bcx: [3, batch, seq, channels]; weight: [width, channels], the last row at the current position; bias: [channels].
      visibility: [batch, seq] int32 of `tap_visibility`; None: every tap is read.
      initial_state: [batch, width - 1, channels] in the type of `bcx`, B * x before the first position; None: zeros.
    Returns:
      [batch, seq, channels] in the type of `bcx`.
    """
    width, seq = weight.shape[0], bcx.shape[2]
    before = _state(bcx, initial_state, width).astype(jnp.float32)
    inputs = jnp.concatenate([before, gated_input(bcx)], axis=1)
    total = jnp.zeros((), jnp.float32)
    for tap in range(width):
        term = inputs[:, width - 1 - tap :][:, :seq] * weight[width - 1 - tap].astype(jnp.float32)[None, None, :]
        if visibility is not None:
            # A choice rather than a product with 0: what another document holds, be it infinite, must not matter.
            term = jnp.where((visibility >> tap & 1 == 1)[:, :, None], term, 0.0)
        total = total + term
    if bias is not None:
        total = total + bias.astype(jnp.float32)[None, None, :]
    return (bcx[1].astype(jnp.float32) * total).astype(bcx.dtype)


def reference_backward(bcx, weight, bias, visibility, initial_state, dy, dfinal):
    """Gradients of bcx, weight, bias and initial_state from those of y and of the final state."""

    def both(bcx, weight, bias, initial_state):
        y = short_conv_reference(bcx, weight, bias, visibility, initial_state)
        return y, final_state(bcx, initial_state, weight.shape[0])

    return jax.vjp(both, bcx, weight, bias, initial_state)[1]((dy, dfinal))


def initial_gradients(bcx, weight, visibility, initial_state, dy):
    """What the initial state adds to the gradient of `weight`, and its own gradient: the part of the backward pass that touches
    only the first width - 1 positions, so that a kernel need not do it. For sequences no shorter than that."""
    head = weight.shape[0] - 1
    silent = bcx[:, :, :head].at[0].set(0)
    flags = None if visibility is None else visibility[:, :head]
    from_state = lambda weight, state: short_conv_reference(silent, weight, None, flags, state)
    return jax.vjp(from_state, weight, initial_state)[1](dy[:, :head])
