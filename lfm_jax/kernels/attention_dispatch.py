"""One function for attention over whole sequences, whatever computes it."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lfm_jax.arrays import Mask, SegmentIds
from lfm_jax.kernels import attention_gpu
from lfm_jax.kernels.attention_reference import attention_by_rows, attention_reference
from lfm_jax.kernels.attention_tpu import LANES, splash_attention
from lfm_jax.sharding import (
    constrain,
    dealt_order,
    in_sequence,
    map_shards,
    shard_count,
    shard_index,
    target_platform,
)

_QUERIES = ("batch", "seq", "heads", None)
_KEYS = ("batch", None, "kv_heads", None)  # every query looks at keys of the whole sequence

AttentionImplementation = Literal["auto", "splash", "cudnn", "rows", "reference"]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    segment_ids: SegmentIds | None,
    *,
    window: int | None = None,
    implementation: AttentionImplementation = "auto",
) -> jax.Array:
    """Causal attention within documents, heads sharing keys and values in groups.

    Where the mesh splits sequences over devices, they are in the order of `lfm_jax.sharding.context`.

    Args:
      query: [batch, seq, heads, head_dim]; key, value: [batch, seq, kv_heads, head_dim].
      mask: [batch, seq, seq], who sees whom; the TPU kernel does not read it, so that it need not exist.
      segment_ids: [batch, seq], documents; None: each row is one.
      window: positions that a query sees at most, itself included; None: all before it.
      implementation: "auto" (the platform's kernel where the shapes suit it), "splash" (the kernel for TPUs, emulated elsewhere),
        "cudnn" (the one for NVIDIA's GPUs), "rows" (XLA, in layouts that suit CPUs) or "reference" (XLA).
    Returns:
      [batch, seq, heads, head_dim].
    Raises:
      ValueError: "splash" or "cudnn" for a shape that the kernel does not take.
    """
    seq, head_dim, shards = query.shape[1], query.shape[3], shard_count("seq")
    splash_suits = seq % (LANES * shards) == 0 and head_dim % 64 == 0
    cudnn_suits = shards == 1 and attention_gpu.takes(query)
    if implementation == "auto":
        on = target_platform()
        if on == "tpu" and splash_suits:
            implementation = "splash"
        elif on == "gpu" and cudnn_suits and attention_gpu.available():
            implementation = "cudnn"
        else:
            implementation = "rows" if on == "cpu" else "reference"
    if implementation == "splash" and not splash_suits:
        raise ValueError(
            f"splash attention takes sequences of a multiple of {LANES * shards} and heads of a multiple of 64, got {seq} and "
            f"{head_dim}; use 'reference'"
        )
    if implementation == "cudnn" and not cudnn_suits:
        raise ValueError(
            "cuDNN's attention takes whole sequences of even length in bfloat16 or float16, and heads of a multiple of 8 up to "
            f"128, got {seq} over {shards} devices in {query.dtype}, and {head_dim}; use 'reference'"
        )
    if implementation in ("rows", "reference"):
        key, value = constrain(key, _KEYS), constrain(value, _KEYS)
        if implementation == "rows":
            return attention_by_rows(query, key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), mask)
        return attention_reference(query, key, value, mask)
    if key.shape[2] % shard_count("kv_heads"):
        # Devices cannot have whole groups: every head gets its own copy of its keys.
        key, value = (jnp.repeat(array, query.shape[2] // key.shape[2], axis=2) for array in (key, value))
    if implementation == "cudnn":
        return _cudnn(query, key, value, None if segment_ids is None else mask, window)
    return _splash(query, key, value, segment_ids, window)


def _cudnn(query, key, value, mask, window) -> jax.Array:
    arguments, axes = [query, key, value], [_QUERIES, _KEYS, _KEYS]
    if mask is not None:
        arguments, axes = [*arguments, mask], [*axes, ("batch", None, None)]
    on_shard = lambda query, key, value, mask=None: attention_gpu.cudnn_attention(query, key, value, mask, window=window)
    return map_shards(on_shard, arguments, axes, _QUERIES)


def _splash(query, key, value, segment_ids, window) -> jax.Array:
    key, value = (in_sequence(constrain(array, _KEYS)) for array in (key, value))
    arguments, axes = [query, key, value], [_QUERIES, _KEYS, _KEYS]
    if segment_ids is not None:
        arguments += [segment_ids, in_sequence(constrain(segment_ids, ("batch", None)))]
        axes += [("batch", "seq"), ("batch", None)]
    order = dealt_order(query.shape[1], shard_count("seq"))
    static = {"order": order, "window": window, "interpret": target_platform() != "tpu"}
    return map_shards(functools.partial(_splash_on_shard, **static), arguments, axes, _QUERIES)


def _splash_on_shard(query, key, value, query_segments=None, key_segments=None, **static) -> jax.Array:
    part = shard_index("seq") if query.shape[1] < key.shape[1] else 0
    return splash_attention(query, key, value, query_segments, key_segments, part=part, **static)
