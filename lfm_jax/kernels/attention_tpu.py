"""Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) for packed sequences, whole or dealt over devices.

The kernel skips blocks of keys that no query of a block sees, by a mask that is known when the program is made: causal or a
window, by the place in the row. Segments are compared inside. So it needs neither scores nor mask in HBM.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

LANES = 128
# By the name, rematerialisation keeps the output and its normalizer: the backward pass then runs no forward kernel again.
ATTENDED = "attended"
_BLOCKS = (1024, 512, 256, 128)


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
    _, queries, heads, head_dim = query.shape
    parts = len(order) // queries
    kernel = _kernel(heads, tuple(order.tolist()), parts, window, interpret)
    kernel = jax.tree.map(lambda array: _piece(array, part, parts, len(order)), kernel)
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    heads_first = (array.swapaxes(1, 2) for array in (scaled, key, value))
    segments = None
    if query_segments is not None:
        segments = splash_attention_kernel.SegmentIds(query_segments, key_segments)
    return jax.vmap(kernel)(*heads_first, segment_ids=segments).swapaxes(1, 2)


class _Mask(splash_attention_mask._ComputableMask):
    """Causal or a window, for queries in any order; keys are in theirs."""

    def __init__(self, order: np.ndarray, window: int | None):
        visible = lambda query, key: (query >= key) if window is None else (query >= key) & (query < key + window)
        super().__init__((len(order), len(order)), visible)
        self.q_sequence = np.asarray(order, np.int32)
        self._key = window, self.q_sequence.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=16)
def _kernel(heads: int, order: tuple[int, ...], parts: int, window: int | None, interpret: bool):
    seq = len(order)
    block = next(size for size in _BLOCKS if seq // parts % size == 0)
    mask = splash_attention_mask.MultiHeadMask([_Mask(np.asarray(order), window)] * heads)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=parts, residual_checkpoint_name=ATTENDED, interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)


def _piece(array: np.ndarray, part: jax.Array | int, parts: int, seq: int) -> jax.Array:
    """What belongs to a part of the queries: of [heads, blocks, ...] its blocks, of [seq] its places."""
    array = jnp.asarray(array)
    axis = 0 if array.shape == (seq,) else 1
    size = array.shape[axis] // parts
    return array if parts == 1 else jax.lax.dynamic_slice_in_dim(array, part * size, size, axis)
