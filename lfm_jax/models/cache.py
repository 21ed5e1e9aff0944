"""What a decoder remembers between calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.models.config import ModelConfig


class AttentionState(NamedTuple):
    """Keys (after norm and rotation) and values; slot s holds the row's s-th token, later slots are unused.

    keys, values: [batch, capacity, kv_heads, head_dim].
    """

    keys: jax.Array
    values: jax.Array


class ConvState(NamedTuple):
    """The last width - 1 values of B * x of each row, oldest first; zeros stand for "before the start".

    window: [batch, width - 1, channels].
    """

    window: jax.Array


class DecoderCache(NamedTuple):
    """One sequence a row. lengths: [batch] int32, tokens seen so far; layers: one state a block."""

    lengths: jax.Array
    layers: tuple[AttentionState | ConvState, ...]


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> DecoderCache:
    """An empty cache with room for `capacity` tokens a row.

    Tokens beyond the capacity are not stored, and a traced program cannot say so: whoever decodes checks the length first.
    """
    attention = jnp.zeros((batch, capacity, config.num_kv_heads, config.head_dim), dtype)
    conv = jnp.zeros((batch, config.conv_width - 1, config.embed_dim), dtype)
    layers = tuple(ConvState(conv) if kind == "conv" else AttentionState(attention, attention) for kind in config.layer_types)
    return DecoderCache(lengths=jnp.zeros(batch, jnp.int32), layers=layers)
