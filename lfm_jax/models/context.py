"""What every block of one forward pass shares: who may look at whom, and where each token stands."""

import jax
import jax.numpy as jnp
from flax import struct

from lfm_jax.arrays import Mask, Positions, SegmentIds
from lfm_jax.models.cache import AttentionState, DecoderCache
from lfm_jax.models.config import ModelConfig
from lfm_jax.models.layers import rope_phases


@struct.dataclass
class Context:
    """Shared inputs of the blocks.

    segment_ids: [batch, seq], or None when every row is one document without padding.
    masks: attention kind -> [batch, queries, keys].
    rope: attention kind -> cos and sin.
    slots: attention kind -> [batch, seq] int32, cache slot of each token (the number of slots for padding); None without a cache.
    new_lengths: [batch] int32, tokens of this call in each row; None without a cache.
    """

    segment_ids: SegmentIds | None
    masks: dict[str, Mask]
    rope: dict[str, tuple[jax.Array, jax.Array]]
    slots: dict[str, jax.Array] | None
    new_lengths: jax.Array | None


def _window(mask: Mask, distance: jax.Array, kind: str, config: ModelConfig) -> Mask:
    return mask & (distance < config.sliding_window) if kind == "sliding_attention" else mask


def _attention_kinds(config: ModelConfig) -> list[str]:
    return [kind for kind in ("full_attention", "sliding_attention") if kind in config.layer_types]


def _rope(config: ModelConfig, positions: Positions) -> dict[str, tuple[jax.Array, jax.Array]]:
    settings = {"full_attention": config.full_rope, "sliding_attention": config.sliding_rope}
    return {kind: rope_phases(positions, config.head_dim, settings[kind]) for kind in _attention_kinds(config)}


def training_context(config: ModelConfig, segment_ids: SegmentIds | None, positions: Positions) -> Context:
    """The context of a forward pass over whole sequences, in whatever order: causal, within each document."""
    distance = positions[:, :, None] - positions[:, None, :]
    mask = distance >= 0
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    masks = {kind: _window(mask, distance, kind, config) for kind in _attention_kinds(config)}
    return Context(segment_ids=segment_ids, masks=masks, rope=_rope(config, positions), slots=None, new_lengths=None)


def cached_context(config: ModelConfig, valid: jax.Array, cache: DecoderCache) -> Context:
    """The context of a call that continues `cache`; row r's tokens are the first sum(valid[r]) of it.

    Args:
      valid: [batch, seq] bool, True for a prefix of each row.
    """
    new_lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    positions = cache.lengths[:, None] + jnp.arange(valid.shape[1])[None, :]
    last = (cache.lengths + new_lengths)[:, None] - 1
    masks, slots = {}, {}
    for kind, state in zip(config.layer_types, cache.layers, strict=True):
        if not isinstance(state, AttentionState) or kind in masks:
            continue
        capacity = state.keys.shape[3]
        # The newest position up to the row's last that slot s can hold; it is negative while the slot is unused.
        held = last - (last - jnp.arange(capacity)[None, :]) % capacity
        distance = positions[:, :, None] - held[:, None, :]
        masks[kind] = _window((distance >= 0) & (held >= 0)[:, None, :], distance, kind, config)
        slots[kind] = jnp.where(valid, positions % capacity, capacity)
    return Context(
        segment_ids=valid.astype(jnp.int32), masks=masks, rope=_rope(config, positions), slots=slots, new_lengths=new_lengths
    )
