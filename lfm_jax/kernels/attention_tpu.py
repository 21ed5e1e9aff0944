"""Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) for packed sequences, whole or dealt over devices.

The kernel skips blocks of keys that no query of a block sees, by a mask that is known when the program is made: causal or a
window, by the place in the row. Segments are compared inside. So it needs neither scores nor mask in HBM.

Heads that share keys stand in one row of queries, those of a place beside one another: of a group of 4 heads, a block of 1,024
queries spans 256 places, so that fewer scores are computed only to be masked, and keys are read once for the group. Each group
is a call to the kernel of its own, so that the two cores of a v5p share the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import BlockSizes

LANES = 128
# By the name, rematerialisation keeps the output and its normalizer: the backward pass then runs no forward kernel again.
ATTENDED = "attended"
# Bytes that a backward pass in one kernel may have for its partial sums; beyond, the queries' gradient has its own kernel.
PARTIAL_SUMS = 2**31


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    order: np.ndarray,
    part: jax.Array | int,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """Causal attention within segments, as `attention_reference`; keys are whole sequences, queries may be a part of each.

    Args:
      query: [batch, queries, heads, head_dim]; key, value: [batch, keys, kv_heads, head_dim].
      query_segments: [batch, queries]; key_segments: [batch, keys]; None: all are one.
      order: [keys], which place of the sequence each query has; this shard has the `part`-th piece of `queries` of them.
      window: keys that a query sees at most, itself included; None: all before it.
    Returns:
      [batch, queries, heads, head_dim].
    """
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    group, parts = heads // kv_heads, len(order) // queries
    sizes = block_sizes(queries * group, keys, head_dim, window, calls=batch * kv_heads)
    kernel = make_kernel(tuple(order.tolist()), group, parts, window, sizes, interpret)
    kernel = jax.tree.map(lambda array: _piece(array, part, parts, group * len(order)), kernel)
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    grouped = scaled.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    rows = grouped.reshape(batch, kv_heads, 1, queries * group, head_dim)
    segments = None
    if query_segments is not None:
        segments = splash_attention_kernel.SegmentIds(jnp.repeat(query_segments, group, axis=1), key_segments)
    of_groups = jax.vmap(lambda *arrays: kernel(*arrays[:3], segment_ids=arrays[3]), in_axes=(0, 0, 0, None))
    out = jax.vmap(of_groups)(rows, key.swapaxes(1, 2), value.swapaxes(1, 2), segments)
    return out.reshape(grouped.shape).transpose(0, 2, 1, 3, 4).reshape(query.shape)


def block_sizes(queries: int, keys: int, head_dim: int, window: int | None, calls: int) -> BlockSizes:
    """The kernels' blocks, and whether the backward pass is one kernel: by schedules, see docs/benchmarks/attention.md.

    Args:
      queries: of a call to the kernel, those of all heads of a group; keys: that they see; calls: to the kernel, in one program.
    """
    divide = lambda length, most: next(size for size in (2048, 1024, 512, 256, 128) if size <= most and length % size == 0)
    block_q = divide(queries, 1024)
    # Of longer blocks more is computed to be masked, least of it in long sequences and most in a window. Forward, 2,048 keys of
    # 128 values do not fit into the VMEM of a v5p.
    block_kv = divide(keys, 1024 if window is None else 256)
    block_kv_dkv = divide(keys, 2048) if window is None and keys > 16_384 else block_kv
    # One kernel makes each product once, but every block of keys leaves its part of the queries' gradient in HBM, in rows of
    # whole lanes. Of a window nearly all these parts are zeros, and writing them takes longer than it saves.
    partial_sums = calls * keys // block_kv_dkv * queries * 2 * -(-head_dim // LANES) * LANES
    fused = window is None and partial_sums <= PARTIAL_SUMS
    return BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=divide(block_kv, 512),
        block_q_dkv=block_q, block_kv_dkv=block_kv_dkv, block_kv_dkv_compute=divide(block_kv_dkv, 512),
        block_q_dq=None if fused else block_q, block_kv_dq=None if fused else block_kv_dkv, use_fused_bwd_kernel=fused,
    )  # fmt: skip


class _Mask(splash_attention_mask._ComputableMask):
    """Causal or a window, for queries whose places are given; keys are in their order."""

    def __init__(self, places: np.ndarray, keys: int, window: int | None):
        visible = lambda query, key: (query >= key) if window is None else (query >= key) & (query < key + window)
        super().__init__((len(places), keys), visible)
        self.q_sequence = np.asarray(places, np.int32)
        self._key = window, self.q_sequence.tobytes()
        self._window = np.inf if window is None else window

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """As the base class has it; but no border of the mask crosses most blocks, and then its ends say all, not each pair."""
        places, keys = self.q_sequence[index[0]], index[1]
        first, last = int(places.min()), int(places.max())
        if last < keys.start or first >= keys.stop - 1 + self._window:
            return _block(len(places), keys.stop - keys.start, False)
        if keys.stop - 1 <= first and last < keys.start + self._window:
            return _block(len(places), keys.stop - keys.start, True)
        return super().__getitem__(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.cache
def _block(queries: int, keys: int, visible: bool) -> np.ndarray:
    block = np.full((queries, keys), visible)
    block.flags.writeable = False
    return block


@functools.lru_cache(maxsize=16)
def make_kernel(order: tuple[int, ...], group: int, parts: int, window: int | None, sizes: BlockSizes, interpret: bool):
    """Splash attention of a group of heads: (queries [1, len(order) * group, head_dim], key, value [keys, head_dim]).

    Args:
      order: which place of the sequence each query has; parts: pieces that they are dealt in.
    """
    mask = splash_attention_mask.MultiHeadMask([_Mask(np.repeat(order, group), len(order), window)])
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mqa(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, residual_checkpoint_name=ATTENDED, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)


def _piece(array: np.ndarray, part: jax.Array | int, parts: int, queries: int) -> jax.Array:
    """What belongs to a part of the queries: of [heads, blocks, ...] its blocks, of [queries] its places."""
    array = jnp.asarray(array)
    axis = 0 if array.shape == (queries,) else 1
    size = array.shape[axis] // parts
    return array if parts == 1 else jax.lax.dynamic_slice_in_dim(array, part * size, size, axis)
