"""Matrices rounded to what a file of few bits holds, while the model stays in floating point.

Trained like this (Jacob et al. 2018, arXiv 1712.05877, section 3), a model knows what its file will make of it; measured like
this, any model shows what rounding costs it.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Format = Literal["none", "q4_0", "8da4w"]
BLOCK = 32  # weights that share a scale, along the inputs of a matrix
Steps = Literal["q4_0", "q8_0", "int4", "int8"]


class Rounding(NamedTuple):
    """Of one matrix.

    steps: "q4_0" and "q8_0" are ggml's types, with scales in float16 (quantize_row_q4_0_ref and quantize_row_q8_0_ref in
      ggml-quants.c); "int4" is torchao's symmetric kind; these in blocks of 32. "int8": a scale for each row of a table.
    axes: those that a product sums over, next to each other.
    """

    steps: Steps
    axes: tuple[int, ...]


def summed_axes(axes: tuple[str | None, ...]) -> tuple[int, ...] | None:
    """Which axes of a matrix with these logical axes a product sums over; None: it is a vector, or the taps of a convolution.

    Projections out of the residual stream begin with "embed" and those into it end with it, behind an axis of experts or not; the
    table of the vocabulary has a row for each token.
    """
    first = int(axes[0] == "expert")
    if len(axes) - first < 2:
        return None
    if axes[first] == "vocab":
        return (first + 1,)
    if axes[first] == "embed":
        return (first,)
    return tuple(range(first, len(axes) - 1)) if axes[-1] == "embed" else None


def rounding_in(format: Format, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], tied: bool) -> Rounding | None:
    """How a file of a format has a parameter; None: in floating point.

    q4_0 is a GGUF file of that type (`lfm_jax.interop.gguf_file`), whose table of the vocabulary and head have 8 bits; 8da4w an
    ExecuTorch program (`lfm_jax.interop.executorch_file`), without its 8 bits for activations. There a tied table has 8 bits
    where tokens are looked up, and 4 as the head; here 4 for both.

    Args:
      name: of the parameter in its module; axes: logical; tied: whether the table of the vocabulary is the head as well.
    Raises:
      ValueError: the format has no room for the matrix.
    """
    summed = summed_axes(axes)
    if format == "none" or summed is None or name == "router":
        return None
    inputs = math.prod(shape[axis] for axis in summed)
    if format == "8da4w":
        if name == "embedding" and not tied:
            return Rounding("int8", summed)
        return None if name == "gate_proj" or inputs % BLOCK else Rounding("int4", summed)
    if inputs % BLOCK:
        raise ValueError(f"q4_0 has blocks of {BLOCK} weights, but {name} has {inputs} inputs; take 8da4w, or another width")
    return Rounding("q8_0" if "vocab" in axes else "q4_0", summed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(weight: jax.Array, rounding: Rounding) -> jax.Array:
    """The weight as it is read from the file, in its own type. The gradient goes straight through (Bengio et al. 2013, arXiv
    1308.3432)."""
    last = rounding.axes[-1]
    size = weight.shape[last] if rounding.steps == "int8" else BLOCK
    # Along one axis where that can be, so that the others stay as they are sharded.
    first = rounding.axes[0] if weight.shape[last] % size else last
    blocks = weight.reshape(*weight.shape[:first], -1, size, *weight.shape[last + 1 :])
    return _STEPS[rounding.steps](blocks.astype(jnp.float32), first + 1).reshape(weight.shape).astype(weight.dtype)


rounded.defvjp(lambda weight, rounding: (rounded(weight, rounding), None), lambda rounding, _, gradient: (gradient,))


def _half(scale: jax.Array) -> jax.Array:
    return scale.astype(jnp.float16).astype(jnp.float32)


def _inverse(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))


def _q4_0(blocks: jax.Array, axis: int) -> jax.Array:
    """The weight that is farthest from 0 becomes -8 steps; what is as far on the other side would be 8, and is 7."""
    farthest = jnp.argmax(jnp.abs(blocks), axis=axis, keepdims=True)
    scale = jnp.take_along_axis(blocks, farthest, axis=axis) / -8
    return (jnp.clip(jnp.floor(blocks * _inverse(scale) + 8.5), 0, 15) - 8) * _half(scale)


def _q8_0(blocks: jax.Array, axis: int) -> jax.Array:
    """Halves are rounded away from 0."""
    scale = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True) / 127
    steps = blocks * _inverse(scale)
    return jnp.sign(steps) * jnp.floor(jnp.abs(steps) + 0.5) * _half(scale)


def _int4(blocks: jax.Array, axis: int) -> jax.Array:
    """What is farthest from 0 is 7.5 steps away. Above it becomes 7; below, the last bit of a division chooses between -7 and -8,
    here and in torchao, and not always the same."""
    scale = jnp.max(jnp.abs(blocks), axis=axis, keepdims=True) / 7.5
    return jnp.clip(jnp.round(blocks * _inverse(scale)), -8, 7) * scale


def _int8(rows: jax.Array, axis: int) -> jax.Array:
    scale = jnp.max(jnp.abs(rows), axis=axis, keepdims=True) / 127
    return jnp.round(rows * _inverse(scale)) * scale


_STEPS = {"q4_0": _q4_0, "q8_0": _q8_0, "int4": _int4, "int8": _int8}
