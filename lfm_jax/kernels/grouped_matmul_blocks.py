"""Grouped matmuls a block of rows at a time, for CPUs, where XLA's ragged dot multiplies every row with every group's matrix."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Blocks(NamedTuple):
    """Rows of one group each, in their order: the first `count` of arrays that have room for the most there can be.

    group, start, left: [most] int32: whose rows, from which on, and how many the group has from there on.
    """

    height: int
    group: jax.Array
    start: jax.Array
    left: jax.Array
    count: jax.Array

    def own(self, block: jax.Array) -> jax.Array:
        """Which rows of a block are its own, [height, 1]; those behind belong to the next, or to none."""
        return (jnp.arange(self.height) < self.left[block])[:, None]


def _blocks(rows: int, group_sizes: jax.Array) -> _Blocks:
    groups = group_sizes.shape[0]
    # Each block reads a matrix, and the last of a group has empty rows. Their sum is least at a height that goes with the root of
    # an average group; the factor is measured (docs/benchmarks/grouped_matmul.md).
    height = 8 * max(1, math.ceil(math.sqrt(rows / groups) / 2))
    each = -(-group_sizes // height)
    last = jnp.cumsum(each)
    block = jnp.arange(rows // height + groups)
    group = jnp.minimum(jnp.searchsorted(last, block, side="right"), groups - 1)
    before = (block - (last - each)[group]) * height
    start = (jnp.cumsum(group_sizes) - group_sizes)[group] + before
    return _Blocks(height, group, start, group_sizes[group] - before, last[-1])


def _room(rows: int, columns: int, height: int, dtype: jnp.dtype) -> jax.Array:
    """Zeros to write blocks into; the last one may reach past the rows."""
    return jnp.zeros((rows + height, columns), dtype)


def _padded(array: jax.Array, height: int) -> jax.Array:
    return jnp.pad(array, ((0, height), (0, 0)))


def _product(one: jax.Array, other: jax.Array, one_axis: int, other_axis: int) -> jax.Array:
    return jax.lax.dot_general(one, other, (((one_axis,), (other_axis,)), ((), ())), preferred_element_type=jnp.float32)


def forward(lhs: jax.Array, rhs: Sequence[jax.Array], group_sizes: jax.Array) -> tuple[jax.Array, ...]:
    """See `lfm_jax.kernels.grouped_matmul`."""
    rows = lhs.shape[0]
    blocks = _blocks(rows, group_sizes)
    padded = _padded(lhs, blocks.height)

    def add(block: jax.Array, outs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, group, own = blocks.start[block], blocks.group[block], blocks.own(block)
        here = jax.lax.dynamic_slice_in_dim(padded, start, blocks.height)
        # The rows behind its own, zeros here, are written by the next block.
        write = lambda out, matrices: jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(own, _product(here, matrices[group], 1, 0), 0).astype(out.dtype), start, axis=0
        )
        return tuple(map(write, outs, rhs))

    outs = tuple(_room(rows, matrices.shape[2], blocks.height, lhs.dtype) for matrices in rhs)
    return tuple(out[:rows] for out in jax.lax.fori_loop(0, blocks.count, add, outs))


def backward(
    lhs: jax.Array, rhs: Sequence[jax.Array], group_sizes: jax.Array, gradients: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of lhs and of each of rhs."""
    rows = lhs.shape[0]
    blocks = _blocks(rows, group_sizes)
    padded, *padded_gradients = (_padded(array, blocks.height) for array in (lhs, *gradients))

    def add(block: jax.Array, sums: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        by_lhs, by_rhs = sums
        start, group, own = blocks.start[block], blocks.group[block], blocks.own(block)
        part = lambda array: jnp.where(own, jax.lax.dynamic_slice_in_dim(array, start, blocks.height), 0)
        here, parts = part(padded), [part(gradient) for gradient in padded_gradients]
        by_here = sum(_product(gradient, matrices[group], 1, 1) for gradient, matrices in zip(parts, rhs, strict=True))
        by_rhs = tuple(by.at[group].add(_product(here, gradient, 0, 0)) for by, gradient in zip(by_rhs, parts, strict=True))
        return jax.lax.dynamic_update_slice_in_dim(by_lhs, by_here.astype(lhs.dtype), start, axis=0), by_rhs

    zeros = tuple(jnp.zeros(matrices.shape, jnp.float32) for matrices in rhs)
    by_lhs, by_rhs = jax.lax.fori_loop(0, blocks.count, add, (_room(rows, lhs.shape[1], blocks.height, lhs.dtype), zeros))
    return by_lhs[:rows], tuple(by.astype(matrices.dtype) for by, matrices in zip(by_rhs, rhs, strict=True))
