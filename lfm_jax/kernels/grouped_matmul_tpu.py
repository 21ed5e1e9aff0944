"""Grouped matmuls as Pallas kernels for TPUs: rows sorted by group, each group times a matrix of its own.

The grid walks over columns (which two cores may share) and, inside, over visits: a visit is a block of rows as far as it belongs
to one group, so a block in which a group ends is visited more than once. Which visits there are is data; the grid is as long as
they are many, and tables that the kernel prefetches say which block and group each has. The whole contraction is one block, so
that a group's matrix is read once for each block of columns and no sum is ever put aside. Inside a visit rows are taken in chunks
of the matrix unit's height, and those of other groups are left out: rows in vain are at most a chunk for each group.
Block sizes and their figures: docs/benchmarks/grouped_matmul.md.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK_ROWS = 512
CHUNK_ROWS = 128
LANES = 128
_BLOCK_COLUMNS = 1024
_MATRIX_BYTES = 8 * 2**20  # of the blocks of matrices that a grid step holds, which the pipeline doubles
_VMEM_BYTES = 60 * 2**20

Matrices = Sequence[jax.Array]
# The axes that a product of two matrices sums over, for `dot_general`.
_LAST_WITH_FIRST, _LAST_WITH_LAST, _FIRST_WITH_FIRST = ((((one,), (other,)), ((), ())) for one, other in ((1, 0), (1, 1), (0, 0)))


def forward(lhs: jax.Array, rhs: Matrices, group_sizes: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, ...]:
    """lhs [rows, k] times each of rhs, [groups, k, columns]: [rows, columns] of each, zero behind the last group."""
    return tuple(_multiply([lhs], [matrices], group_sizes, transposed=False, interpret=interpret) for matrices in rhs)


def backward(
    lhs: jax.Array, rhs: Matrices, group_sizes: jax.Array, gradients: Sequence[jax.Array], *, interpret: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of lhs and of each of rhs; gradients: of the outputs. All sums are float32."""
    dlhs = _multiply(gradients, rhs, group_sizes, transposed=True, interpret=interpret)
    return dlhs, tuple(
        _multiply_groups(lhs, gradient, group_sizes, dtype=matrices.dtype, interpret=interpret)
        for matrices, gradient in zip(rhs, gradients, strict=True)
    )


def _visits(group_sizes: jax.Array, rows: int, *, every_group: bool) -> tuple[list[jax.Array], jax.Array]:
    """The tables group, block, first row and row behind the last (within the block) of each visit, and the number of visits.

    every_group: empty groups are visited too, without a row; otherwise the rows behind the last group are, as one group more.
    """
    blocks = pl.cdiv(rows, BLOCK_ROWS)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    if not every_group:
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, rows)
    first = jnp.minimum(starts // BLOCK_ROWS, blocks - 1)
    count = jnp.where(ends > starts, pl.cdiv(ends, BLOCK_ROWS) - first, 1 if every_group else 0)
    until = jnp.cumsum(count)
    visit = jnp.arange(blocks + group_sizes.size)
    group = jnp.minimum(jnp.sum(visit[:, None] >= until[None, :], axis=1), starts.size - 1)
    block = jnp.minimum(first[group] + visit - (until - count)[group], blocks - 1)
    within = lambda row: jnp.clip(row[group] - block * BLOCK_ROWS, 0, BLOCK_ROWS)
    tables = [table.astype(jnp.int32) for table in (group, block, within(starts), within(ends))]
    return tables, until[-1]


def _for_chunks(low: jax.Array, high: jax.Array, work: Callable[[jax.Array], None]) -> None:
    """Calls work with the first row of each chunk of a block that has rows of low to high."""

    def step(index, _):
        at = pl.multiple_of(index * CHUNK_ROWS, CHUNK_ROWS)
        pl.when((at < high) & (at + CHUNK_ROWS > low))(lambda: work(at))

    jax.lax.fori_loop(0, BLOCK_ROWS // CHUNK_ROWS, step, None)


def _keep(values: jax.Array, others: jax.Array | float, at: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Float32 values of a chunk in its rows low to high of the block, others elsewhere."""
    row = at + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where((row >= low) & (row < high), values, others)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _block_columns(columns: int, row_bytes: int) -> int:
    """As many as fit, in an even number of blocks where there can be: two cores share them."""
    most = max(LANES, min(_BLOCK_COLUMNS, _MATRIX_BYTES // row_bytes // LANES * LANES))
    blocks = 2 * pl.cdiv(columns, 2 * most)
    return pl.cdiv(columns, blocks * LANES) * LANES


def _rows_of(array: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((BLOCK_ROWS, array.shape[1]), lambda column, visit, group, block, *_: (block[visit], 0))


def _multiply(lhs: Sequence[jax.Array], rhs: Matrices, group_sizes: jax.Array, *, transposed: bool, interpret: bool) -> jax.Array:
    """The sum over pairs of lhs [rows, k] times rhs [groups, k, columns], or [groups, columns, k] if transposed."""
    rows, groups = lhs[0].shape[0], rhs[0].shape[0]
    columns = rhs[0].shape[1 if transposed else 2]
    contracted = sum(array.shape[1] for array in lhs)
    size = lhs[0].dtype.itemsize
    width = _block_columns(columns, contracted * size)
    tables, visits = _visits(group_sizes, rows, every_group=False)
    matrix = lambda group: jnp.minimum(group, groups - 1)  # the rows behind the last group have none, and move none

    def matrices(k: int) -> pl.BlockSpec:
        if transposed:
            return pl.BlockSpec((None, width, k), lambda column, visit, group, *_: (matrix(group[visit]), column, 0))
        return pl.BlockSpec((None, k, width), lambda column, visit, group, *_: (matrix(group[visit]), 0, column))

    kernel = functools.partial(_multiply_kernel, pairs=len(rhs), groups=groups, transposed=transposed)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), lhs[0].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(pl.cdiv(columns, width), visits),
            in_specs=[
                *[_rows_of(array) for array in lhs],
                *[matrices(array.shape[1]) for array in lhs],
            ],
            out_specs=pl.BlockSpec((BLOCK_ROWS, width), lambda column, visit, group, block, *_: (block[visit], column)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * contracted * columns,
            bytes_accessed=size * (rows * (contracted * pl.cdiv(columns, width) + columns) + groups * contracted * columns),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*tables, *lhs, *rhs)


def _multiply_kernel(group, block, low, high, *refs, pairs: int, groups: int, transposed: bool):
    visit = pl.program_id(1)
    lhs, rhs, out = refs[:pairs], refs[pairs:-1], refs[-1]

    def write(at, values):
        rows = pl.ds(at, CHUNK_ROWS)
        # What another group's visit has written stays; what it has yet to write may be anything.
        out[rows, :] = _keep(values, out[rows, :].astype(jnp.float32), at, low[visit], high[visit]).astype(out.dtype)

    def multiply(at):
        total = 0.0
        for rows, matrix in zip(lhs, rhs, strict=True):
            total += jax.lax.dot_general(
                rows[pl.ds(at, CHUNK_ROWS), :], matrix[...], _LAST_WITH_LAST if transposed else _LAST_WITH_FIRST,
                precision=_precision(rows.dtype), preferred_element_type=jnp.float32,
            )  # fmt: skip
        write(at, total)

    pl.when(group[visit] < groups)(lambda: _for_chunks(low[visit], high[visit], multiply))
    zeros = jnp.zeros((CHUNK_ROWS, out.shape[1]), jnp.float32)
    pl.when(group[visit] == groups)(lambda: _for_chunks(low[visit], high[visit], lambda at: write(at, zeros)))


def _multiply_groups(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """[groups, k, columns]: for each group its rows of lhs [rows, k], transposed, times its rows of rhs [rows, columns]."""
    rows, k = lhs.shape
    columns, groups, size = rhs.shape[1], group_sizes.size, lhs.dtype.itemsize
    width = _block_columns(columns, 4 * k)  # of float32 sums
    tables, visits = _visits(group_sizes, rows, every_group=True)
    return pl.pallas_call(
        _multiply_groups_kernel,
        out_shape=jax.ShapeDtypeStruct((groups, k, columns), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(pl.cdiv(columns, width), visits),
            in_specs=[
                _rows_of(lhs),
                pl.BlockSpec((BLOCK_ROWS, width), lambda column, visit, group, block, *_: (block[visit], column)),
            ],
            out_specs=pl.BlockSpec((None, k, width), lambda column, visit, group, *_: (group[visit], 0, column)),
            scratch_shapes=[pltpu.VMEM((k, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * k * columns,
            bytes_accessed=size * (rows * (k * pl.cdiv(columns, width) + columns) + groups * k * columns),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(*tables, lhs, rhs)


def _multiply_groups_kernel(group, block, low, high, lhs, rhs, out, sums):
    visit, last = pl.program_id(1), pl.num_programs(1) - 1
    begins = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != group[visit])
    ends = (visit == last) | (group[jnp.minimum(visit + 1, last)] != group[visit])
    empty = high[visit] == low[visit]

    def add(at):
        # Both sides, since what belongs to no group need not be a number.
        own = [
            _keep(array[pl.ds(at, CHUNK_ROWS), :].astype(jnp.float32), 0.0, at, low[visit], high[visit]).astype(array.dtype)
            for array in (lhs, rhs)
        ]
        product = jax.lax.dot_general(
            *own, _FIRST_WITH_FIRST, precision=_precision(lhs.dtype), preferred_element_type=jnp.float32
        )
        # The first chunk of a group finds the sums of the one before: to leave them out costs less than to write zeros.
        sums[...] = jnp.where(begins & (at <= low[visit]), 0.0, sums[...]) + product

    _for_chunks(low[visit], high[visit], add)

    @pl.when(ends & ~empty)
    def _():
        out[...] = sums[...].astype(out.dtype)

    @pl.when(empty)
    def _():
        out[...] = jnp.zeros_like(out)
