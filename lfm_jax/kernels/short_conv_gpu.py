"""The double-gated short convolution as Pallas (Triton) kernels for GPUs, forward and backward.

Each program loads its rows once per tap at a shifted offset: all but the first load of a row come from the caches, so that the
device's memory sees each value about once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lfm_jax.kernels.short_conv_reference import initial_gradients, tap_reach

_BLOCK_TIME, _BLOCK_CHANNELS = 16, 128  # the fastest of eight pairs on an H200 (docs/benchmarks/kernels.md)
_REACH_BIT = 16
MAX_WIDTH = _REACH_BIT - 1


class _Block:
    """The rows and channels of one program, and masked loads around them; an optional input that is not there is None."""

    def __init__(self, shape: tuple[int, int, int], width: int):
        self.batch_index = pl.program_id(0)
        _, self.seq, self.channels = shape
        self.width = width
        self.time = pl.program_id(1) * _BLOCK_TIME + jnp.arange(_BLOCK_TIME, dtype=jnp.int32)
        self.channel = pl.program_id(2) * _BLOCK_CHANNELS + jnp.arange(_BLOCK_CHANNELS, dtype=jnp.int32)
        self.inside = self._mask(self.time, self.seq)

    def _mask(self, rows: jax.Array, count: int) -> jax.Array:
        return ((rows >= 0) & (rows < count))[:, None] & (self.channel < self.channels)[None, :]

    def rows(self, ref, lead: tuple, rows: jax.Array, count: int) -> jax.Array:
        """ref[lead, rows, channels] in float32, 0 outside of its `count` rows."""
        safe = jnp.clip(rows, 0, count - 1)[:, None], jnp.minimum(self.channel, self.channels - 1)[None, :]
        return plgpu.load(ref.at[(*lead, *safe)], mask=self._mask(rows, count), other=0).astype(jnp.float32)

    def plane(self, bcx, index: int, shift: int = 0) -> jax.Array:
        return self.rows(bcx, (index, self.batch_index), self.time + shift, self.seq)

    def product(self, bcx, initial, shift: int) -> jax.Array:
        """B * x, `shift` rows away, rounded as the state is."""
        value = (self.plane(bcx, 0, shift) * self.plane(bcx, 2, shift)).astype(bcx.dtype).astype(jnp.float32)
        if initial is None or shift == 0:
            return value
        return value + self.rows(initial, (self.batch_index,), self.time + shift + self.width - 1, self.width - 1)

    def bit(self, flags, index: int) -> jax.Array:
        row = plgpu.load(flags.at[self.batch_index, jnp.minimum(self.time, self.seq - 1)])
        return (row >> index & 1 == 1)[:, None]

    def vector(self, ref, row: int) -> jax.Array:
        at = jnp.minimum(self.channel, self.channels - 1)
        return plgpu.load(ref.at[row, at])[None, :]

    def convolve(self, bcx, taps, flags, initial, biased: bool) -> jax.Array:
        total = self.vector(taps, self.width) if biased else jnp.zeros((1, 1), jnp.float32)
        for tap in range(self.width):
            term = self.product(bcx, initial, -tap) * self.vector(taps, self.width - 1 - tap)
            total = total + (term if flags is None else jnp.where(self.bit(flags, tap), term, 0.0))
        return total

    def store(self, ref, lead: tuple, value: jax.Array) -> None:
        at = (*lead, self.batch_index, self.time[:, None], self.channel[None, :])
        plgpu.store(ref.at[at], value.astype(ref.dtype), mask=self.inside)


def _forward_kernel(bcx, taps, flags, initial, y, *, width: int, biased: bool):
    block = _Block(y.shape, width)
    block.store(y, (), block.plane(bcx, 1) * block.convolve(bcx, taps, flags, initial, biased))


def _backward_kernel(bcx, taps, flags, initial, dy, dfinal, dbcx, dtaps, *, width: int, biased: bool):
    """dtaps: [batch, time blocks, width + 1, channels], each program's part of the gradient of the taps and the bias."""
    block = _Block(dy.shape, width)
    gradient = lambda shift: block.rows(dy, (block.batch_index,), block.time + shift, block.seq)
    total = block.convolve(bcx, taps, flags, initial, biased)
    block.store(dbcx, (1,), gradient(0) * total)
    product = block.product(bcx, None, 0)
    dproduct = block.rows(dfinal, (block.batch_index,), block.time - (block.seq - width + 1), width - 1)
    part = lambda row: dtaps.at[block.batch_index, pl.program_id(1), row, block.channel]
    valid = block.channel < block.channels
    for tap in range(width):
        slope = gradient(tap) * block.plane(bcx, 1, tap)
        if flags is not None:
            slope = jnp.where(block.bit(flags, _REACH_BIT + tap), slope, 0.0)
        dproduct += slope * block.vector(taps, width - 1 - tap)
        plgpu.store(part(width - 1 - tap), jnp.sum(slope * product, axis=0), mask=valid)
        if tap == 0:
            plgpu.store(part(width), jnp.sum(slope, axis=0), mask=valid)
    dproduct = dproduct.astype(dbcx.dtype).astype(jnp.float32)
    block.store(dbcx, (0,), dproduct * block.plane(bcx, 2))
    block.store(dbcx, (2,), dproduct * block.plane(bcx, 0))


def _call(kernel, name: str, bcx, weight, bias, visibility, initial_state, extra: list, out_shape, interpret: bool):
    width, (_, batch, seq, channels) = weight.shape[0], bcx.shape
    if width > MAX_WIDTH or seq < width:
        raise ValueError(
            f"the Pallas short convolution takes widths up to {MAX_WIDTH} and at least as many positions, got width {width} and "
            f"{seq} positions; use 'reference'"
        )
    taps = (weight if bias is None else jnp.concatenate([weight, bias[None]])).astype(jnp.float32)
    flags = None if visibility is None else visibility | tap_reach(visibility, width) << _REACH_BIT
    return pl.pallas_call(
        functools.partial(kernel, width=width, biased=bias is not None),
        grid=(batch, pl.cdiv(seq, _BLOCK_TIME), pl.cdiv(channels, _BLOCK_CHANNELS)),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=name,
    )(bcx, taps, flags, initial_state, *extra)


def forward(bcx, weight, bias, visibility, initial_state, *, interpret=False) -> jax.Array:
    """y; the arguments are those of `short_conv_reference`."""
    y = jax.ShapeDtypeStruct(bcx.shape[1:], bcx.dtype)
    return _call(_forward_kernel, "short_conv", bcx, weight, bias, visibility, initial_state, [], y, interpret)


def backward(bcx, weight, bias, visibility, initial_state, dy, dfinal, *, interpret=False):
    """The gradients of bcx, weight, bias and initial_state.

    Args:
      dy: [batch, seq, channels]; dfinal: [batch, width - 1, channels], the gradient of the final state.
    """
    width, (_, batch, seq, channels) = weight.shape[0], bcx.shape
    parts = (batch, pl.cdiv(seq, _BLOCK_TIME), width + 1, channels)
    shapes = [jax.ShapeDtypeStruct(bcx.shape, bcx.dtype), jax.ShapeDtypeStruct(parts, jnp.float32)]
    inputs = (bcx, weight, bias, visibility, initial_state)
    dbcx, dtaps = _call(_backward_kernel, "short_conv_grad", *inputs, [dy, dfinal], shapes, interpret)
    dtaps = jnp.sum(dtaps, axis=(0, 1))
    dweight, dbias = dtaps[:width], None if bias is None else dtaps[width]
    if initial_state is None:
        return dbcx, dweight, dbias, None
    from_state, dinitial = initial_gradients(bcx, weight, visibility, initial_state, dy)
    return dbcx, dweight + from_state, dbias, dinitial
