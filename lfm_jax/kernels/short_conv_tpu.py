"""The double-gated short convolution as Pallas kernels for TPUs, forward and backward.

Both are bound by memory, so each reads every input once and writes every output once. The grid walks over batch, channels and,
innermost and in order, time. What the taps need of the block before is kept in VMEM from the last grid step; what the gradient
needs of the block behind, 16 rows of C and of the output's gradient, is read twice.

Inside a block, rows are shifted in time by loading from VMEM at a row offset: that costs a load slot, while rotating and merging
registers would take the slots of the arithmetic. It wants scratch of 128 lanes, hence the leading axis of lane tiles there.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lfm_jax.kernels.short_conv_reference import initial_gradients, tap_reach

LANES = 128
# Rows kept before, and read behind, a block: one tile of bfloat16. It bounds the width, as do two flags a tap in a signed word.
MARGIN = 16
MAX_WIDTH = MARGIN - 1
MIN_SEQ = MARGIN
# A grid step costs 100 (forward) to 250 (backward) cycles beside its arithmetic, and the first block in and the last one out are
# covered by nothing: 2 MB a step forward; 7 MB backward, since TPU v7 has little time to spare there.
_BLOCK_CHANNELS = 512
_FORWARD_ROW_BYTES = 1024
_BACKWARD_ROW_BYTES = 2048
_VMEM_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call; block sizes are rows and channels of one grid step, chunk sizes of one pass of its inner loop."""

    width: int
    batch: int
    seq: int
    channels: int
    biased: bool
    segmented: bool
    block_time: int
    block_channels: int
    chunk_time: int = 64
    chunk_tiles: int = 4

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, pl.cdiv(self.channels, self.block_channels), pl.cdiv(self.seq, self.block_time)

    @property
    def tiles(self) -> int:
        return self.block_channels // LANES

    @property
    def tail(self) -> int:
        """Rows of the last block in time."""
        return self.seq - (self.grid[2] - 1) * self.block_time

    @property
    def tap_rows(self) -> int:
        """Rows of the array of edges that hold the taps and the bias, filled up to whole tiles."""
        return pl.cdiv(self.width + 1, 8) * 8

    @property
    def before(self) -> slice:
        """Rows of the array of edges that hold what stands before the first position."""
        return slice(self.tap_rows, self.tap_rows + MARGIN)

    @property
    def final_window(self) -> slice:
        """Whole tiles of rows of the last block that hold the final state."""
        return slice((self.tail - self.width + 1) // MARGIN * MARGIN, pl.cdiv(self.tail, MARGIN) * MARGIN)


def make_plan(
    bcx: jax.Array, width: int, *, biased: bool, segmented: bool, backward: bool, block_time: int | None = None
) -> Plan:
    """Chooses blocks of about `block_time` rows. The last must hold the whole final state: its gradient joins in one place.

    Raises:
      ValueError: the width or the length is one that the kernels do not take.
    """
    _, batch, seq, channels = bcx.shape
    if not 2 <= width <= MAX_WIDTH:
        raise ValueError(f"the Pallas short convolution takes widths of 2 to {MAX_WIDTH}, got {width}; use 'reference'")
    if seq < MIN_SEQ:
        raise ValueError(f"the Pallas short convolution takes at least {MIN_SEQ} positions, got {seq}; use 'reference'")
    block_time = block_time or (_BACKWARD_ROW_BYTES if backward else _FORWARD_ROW_BYTES) // bcx.dtype.itemsize
    whole = pl.cdiv(seq, LANES) * LANES
    sizes = (*range(min(block_time, whole), 0, -LANES), *range(block_time, whole + LANES, LANES))
    block_time = next(size for size in sizes if seq % size == 0 or seq % size >= width - 1)
    block_channels = min(_BLOCK_CHANNELS, pl.cdiv(channels, LANES) * LANES)
    return Plan(width, batch, seq, channels, biased, segmented, block_time, block_channels)


def _for_each_chunk(plan: Plan, mixed, body: Callable) -> None:
    """Runs `body(start, tile, lanes, masked)` over the block, a few lane tiles side by side: they share the masks of their rows.

    Most chunks lie within one segment and need no masks; `mixed` says which do not. None: no body needs them.
    """
    for first in range(0, plan.tiles, plan.chunk_tiles):
        tiles = range(first, min(first + plan.chunk_tiles, plan.tiles))

        def chunk(index, _, tiles=tiles):
            def run(masked):
                for tile in tiles:
                    body(pl.multiple_of(index * plan.chunk_time, plan.chunk_time), tile, _lanes(tile), masked)

            if mixed is None:
                run(False)
            else:
                pl.when(mixed[0, 0, index] != 0)(functools.partial(run, True))
                pl.when(mixed[0, 0, index] == 0)(functools.partial(run, False))
            return _

        jax.lax.fori_loop(0, plan.block_time // plan.chunk_time, chunk, 0)


def _lanes(tile: int) -> slice:
    return slice(tile * LANES, (tile + 1) * LANES)


def _row_to_columns(row: jax.Array) -> jax.Array:
    """[1, time] to [time, lanes], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _bit(flags: jax.Array, index: int) -> jax.Array:
    return (flags << (31 - index)) < 0


def _begin(plan: Plan, edges, flags, inputs, columns) -> None:
    """Before the first block in time stands the initial state."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for tile in range(plan.tiles):
            inputs[tile, :MARGIN] = edges[0, plan.before, _lanes(tile)]

    if plan.segmented:
        columns[...] = _row_to_columns(flags[0])


def _tap(plan: Plan, edges, tap: int, lanes: slice) -> jax.Array:
    return edges[0, plan.width - 1 - tap : plan.width - tap, lanes]


def _convolve(plan: Plan, inputs, edges, columns, start, tile, lanes, masked) -> jax.Array:
    total = inputs[tile, pl.ds(start + MARGIN, plan.chunk_time)] * _tap(plan, edges, 0, lanes)
    for tap in range(1, plan.width):
        shifted = inputs[tile, pl.ds(start + MARGIN - tap, plan.chunk_time)]
        if masked:
            shifted = jnp.where(_bit(columns[pl.ds(start, plan.chunk_time)], tap), shifted, 0.0)
        total += shifted * _tap(plan, edges, tap, lanes)
    return total + edges[0, plan.width : plan.width + 1, lanes] if plan.biased else total


def _forward_kernel(plan: Plan, bcx, edges, *rest):
    flags, mixed, y, inputs, columns = rest if plan.segmented else (None, None, *rest, None)
    _begin(plan, edges, flags, inputs, columns)

    def chunk(start, tile, lanes, masked):
        rows = pl.ds(start, plan.chunk_time)
        product = (bcx[0, 0, rows, lanes] * bcx[2, 0, rows, lanes]).astype(jnp.float32)
        inputs[tile, pl.ds(start + MARGIN, plan.chunk_time)] = product
        total = _convolve(plan, inputs, edges, columns, start, tile, lanes, masked)
        y[0, rows, lanes] = (bcx[1, 0, rows, lanes].astype(jnp.float32) * total).astype(y.dtype)

    _for_each_chunk(plan, mixed, chunk)
    inputs[:, :MARGIN] = inputs[:, plan.block_time :]


def _backward_kernel(plan: Plan, bcx, next_c, dy, next_dy, edges, *rest):
    """slopes: the gradient of the convolution's output, dy * C; dtaps: that of taps and bias, as sums over every eighth row."""
    flags, mixed, dbcx, dtaps, inputs, slopes, columns = rest if plan.segmented else (None, None, *rest, None)
    _begin(plan, edges, flags, inputs, columns)
    last = pl.program_id(2) == plan.grid[2] - 1

    @pl.when(pl.program_id(2) == 0)
    def _():
        dtaps[...] = jnp.zeros(dtaps.shape, dtaps.dtype)

    def prepare(start, tile, lanes, masked):
        rows = pl.ds(start, plan.chunk_time)
        product = (bcx[0, 0, rows, lanes] * bcx[2, 0, rows, lanes]).astype(jnp.float32)
        slope = dy[0, rows, lanes].astype(jnp.float32) * bcx[1, 0, rows, lanes].astype(jnp.float32)
        if plan.tail != plan.block_time:
            # What lies behind the array's end is anything, NaN included.
            inside = jax.lax.broadcasted_iota(jnp.int32, product.shape, 0) + start < jnp.where(last, plan.tail, plan.block_time)
            product, slope = jnp.where(inside, product, 0.0), jnp.where(inside, slope, 0.0)
        inputs[tile, pl.ds(start + MARGIN, plan.chunk_time)] = product
        slopes[tile, rows] = slope

    _for_each_chunk(plan, None, prepare)
    for tile in range(plan.tiles):
        behind = next_dy[0, :, _lanes(tile)].astype(jnp.float32) * next_c[0, 0, :, _lanes(tile)].astype(jnp.float32)
        slopes[tile, plan.block_time :] = jnp.where(last, 0.0, behind)

    def chunk(start, tile, lanes, masked):
        rows = pl.ds(start, plan.chunk_time)
        total = _convolve(plan, inputs, edges, columns, start, tile, lanes, masked)
        dbcx[1, 0, rows, lanes] = (dy[0, rows, lanes].astype(jnp.float32) * total).astype(dbcx.dtype)
        product = inputs[tile, pl.ds(start + MARGIN, plan.chunk_time)]
        slope = slopes[tile, rows]
        if plan.biased:
            dtaps[0, plan.width, :, lanes] += _fold(slope)
        dtaps[0, plan.width - 1, :, lanes] += _fold(slope * product)
        dproduct = slope * _tap(plan, edges, 0, lanes)
        for tap in range(1, plan.width):
            slope = slopes[tile, pl.ds(start + tap, plan.chunk_time)]
            if masked:
                slope = jnp.where(_bit(columns[rows], MARGIN + tap), slope, 0.0)
            dproduct += slope * _tap(plan, edges, tap, lanes)
            dtaps[0, plan.width - 1 - tap, :, lanes] += _fold(slope * product)
        dproduct = dproduct.astype(bcx.dtype)
        dbcx[0, 0, rows, lanes] = dproduct * bcx[2, 0, rows, lanes]
        dbcx[2, 0, rows, lanes] = dproduct * bcx[0, 0, rows, lanes]

    _for_each_chunk(plan, mixed, chunk)
    inputs[:, :MARGIN] = inputs[:, plan.block_time :]
    pl.when(last)(functools.partial(_add_final_gradient, plan, bcx, edges, dbcx))


def _add_final_gradient(plan: Plan, bcx, edges, dbcx) -> None:
    rows = plan.final_window
    for tile in range(plan.tiles):
        lanes = _lanes(tile)
        for plane, other in ((0, 2), (2, 0)):
            extra = edges[0, plan.before.stop :, lanes] * bcx[other, 0, rows, lanes].astype(jnp.float32)
            dbcx[plane, 0, rows, lanes] = (dbcx[plane, 0, rows, lanes].astype(jnp.float32) + extra).astype(dbcx.dtype)


def _fold(rows: jax.Array) -> jax.Array:
    """[time, lanes] to [8, lanes], adding every eighth row: whole registers."""
    return jnp.sum(rows.reshape(-1, 8, LANES), axis=0)


def _edges(plan: Plan, weight, bias, initial_state, dfinal=None) -> jax.Array:
    """The small inputs as one array, because each input costs every grid step some scalar work: [batch, rows, channels] float32.

    Taps and bias, what stands before the first position, and the final state's gradient on the rows of `final_window`.
    """
    rows = weight if bias is None else jnp.concatenate([weight, bias[None]])
    rows = jnp.pad(rows.astype(jnp.float32), ((0, plan.tap_rows - rows.shape[0]), (0, 0)))
    parts = [jnp.broadcast_to(rows[None], (plan.batch, *rows.shape))]
    if initial_state is None:
        parts.append(jnp.zeros((plan.batch, MARGIN, plan.channels), jnp.float32))
    else:
        parts.append(_pad_rows(initial_state, MARGIN - plan.width + 1, 0))
    if dfinal is not None:
        window = plan.final_window
        parts.append(_pad_rows(dfinal, plan.tail - plan.width + 1 - window.start, window.stop - plan.tail))
    return jnp.concatenate(parts, axis=1)


def _pad_rows(values: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(values.astype(jnp.float32), ((0, 0), (before, after), (0, 0)))


def _segment_inputs(plan: Plan, visibility: jax.Array | None, backward: bool) -> dict[str, jax.Array]:
    """flags [batch, 1, seq]: bit j says that t reads t - j, bit MARGIN + j that t + j reads t.

    mixed [blocks, 1, chunks of a block]: 1 where a chunk has a bit that is not set.
    """
    if visibility is None:
        return {}
    flags = visibility | tap_reach(visibility, plan.width) << MARGIN
    every = (1 << plan.width) - 1
    every |= every << MARGIN if backward else 0
    padding = plan.grid[2] * plan.block_time - plan.seq
    missing = jnp.pad((flags & every) != every, ((0, 0), (0, padding)))
    mixed = jnp.any(missing.reshape(plan.batch * plan.grid[2], 1, -1, plan.chunk_time), axis=-1)
    return {"flags": flags[:, None], "mixed": mixed.astype(jnp.int32)}


def _blocks(plan: Plan, edge_rows: int) -> dict[str, pl.BlockSpec]:
    time, channels = plan.block_time, plan.block_channels
    last_margin = pl.cdiv(plan.seq, MARGIN) - 1
    behind = lambda t: jnp.minimum((t + 1) * (time // MARGIN), last_margin)
    return {
        "planes": pl.BlockSpec((3, 1, time, channels), lambda b, c, t: (0, b, t, c)),
        "plane": pl.BlockSpec((1, time, channels), lambda b, c, t: (b, t, c)),
        "next_c": pl.BlockSpec((1, 1, MARGIN, channels), lambda b, c, t: (1, b, behind(t), c)),
        "next": pl.BlockSpec((1, MARGIN, channels), lambda b, c, t: (b, behind(t), c)),
        "edges": pl.BlockSpec((1, edge_rows, channels), lambda b, c, t: (b, 0, c)),
        "dtaps": pl.BlockSpec((1, plan.width + plan.biased, 8, channels), lambda b, c, t: (b, 0, 0, c)),
        "flags": pl.BlockSpec((1, 1, time), lambda b, c, t: (b, 0, t)),
        "mixed": pl.BlockSpec(
            (1, 1, time // plan.chunk_time), lambda b, c, t: (b * plan.grid[2] + t, 0, 0), memory_space=pltpu.SMEM
        ),
    }


def _call(plan: Plan, kernel: Callable, name: str, inputs: dict, outputs: dict, scratch: list, flops: int, interpret: bool):
    """inputs: block name -> array; outputs: block name -> shape; scratch: rows of float32 values."""
    blocks = _blocks(plan, inputs["edges"].shape[1])
    shapes = [pltpu.VMEM((plan.tiles, rows, LANES), jnp.float32) for rows in scratch]
    if plan.segmented:
        shapes.append(pltpu.VMEM((plan.block_time, LANES), jnp.int32))
    size = lambda array: array.size * array.dtype.itemsize
    unique = {id(array): array for array in inputs.values()}.values()
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=plan.grid,
        in_specs=[blocks[block] for block in inputs],
        out_specs=[blocks[block] for block in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * plan.batch * plan.seq * plan.channels,
            transcendentals=0,
            bytes_accessed=sum(map(size, unique)) + sum(map(size, outputs.values())),
        ),
        interpret=interpret,
        name=name,
    )(*inputs.values())


def _plan(bcx, weight, bias, visibility, **options) -> Plan:
    return make_plan(bcx, weight.shape[0], biased=bias is not None, segmented=visibility is not None, **options)


def forward(bcx, weight, bias, visibility, initial_state, *, interpret=False, block_time=None) -> jax.Array:
    """y; the arguments are those of `short_conv_reference`."""
    plan = _plan(bcx, weight, bias, visibility, backward=False, block_time=block_time)
    inputs = {"planes": bcx, "edges": _edges(plan, weight, bias, initial_state)}
    inputs |= _segment_inputs(plan, visibility, backward=False)
    outputs = {"plane": jax.ShapeDtypeStruct(bcx.shape[1:], bcx.dtype)}
    scratch = [plan.block_time + MARGIN]
    (y,) = _call(plan, _forward_kernel, "short_conv", inputs, outputs, scratch, 2 * plan.width + 2, interpret)
    return y


def backward(bcx, weight, bias, visibility, initial_state, dy, dfinal, *, interpret=False, block_time=None):
    """The gradients of bcx, weight, bias and initial_state.

    Args:
      dy: [batch, seq, channels]; dfinal: [batch, width - 1, channels], the gradient of the final state.
    """
    plan = _plan(bcx, weight, bias, visibility, backward=True, block_time=block_time)
    edges = _edges(plan, weight, bias, initial_state, dfinal)
    inputs = {"planes": bcx, "next_c": bcx, "plane": dy, "next": dy, "edges": edges}
    inputs |= _segment_inputs(plan, visibility, backward=True)
    outputs = {
        "planes": jax.ShapeDtypeStruct(bcx.shape, bcx.dtype),
        "dtaps": jax.ShapeDtypeStruct((plan.batch, plan.width + plan.biased, 8, plan.channels), jnp.float32),
    }
    scratch = [plan.block_time + MARGIN] * 2
    dbcx, dtaps = _call(plan, _backward_kernel, "short_conv_grad", inputs, outputs, scratch, 6 * plan.width + 5, interpret)
    dtaps = jnp.sum(dtaps, axis=(0, 2))
    dweight, dbias = dtaps[: plan.width], dtaps[plan.width] if plan.biased else None
    if initial_state is None:
        return dbcx, dweight, dbias, None
    from_state, dinitial = initial_gradients(bcx, weight, visibility, initial_state, dy)
    return dbcx, dweight + from_state, dbias, dinitial
