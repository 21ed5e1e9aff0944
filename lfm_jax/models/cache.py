"""What a decoder remembers between calls."""

from typing import Any, NamedTuple

import jax


class AttentionState(NamedTuple):
    """Keys (after norm and rotation) and values; the row's token p is in slot p % capacity, so that the last `capacity` stay.

    keys: [batch, kv_heads, head_dim, capacity]; values: [batch, kv_heads, capacity, head_dim]; see `attention_by_rows`.
    """

    keys: jax.Array
    values: jax.Array


class ConvState(NamedTuple):
    """The last width - 1 values of B * x of each row, oldest first; zeros stand for "before the start".

    window: [batch, width - 1, channels].
    """

    window: jax.Array


class DecoderCache(NamedTuple):
    """One sequence a row. lengths: [batch] int32, tokens seen so far; layers: the state of each block's operator."""

    lengths: jax.Array
    layers: tuple[Any, ...]


class CacheBytes(NamedTuple):
    """Of one sequence.

    per_token: growth with each token (full attention); windows: the most that sliding attention holds; constant: convolutions.
    """

    per_token: float = 0
    windows: float = 0
    constant: float = 0

    def total(self, context: int, window: int | None) -> float:
        """Bytes of one sequence at `context` tokens."""
        filled = 1.0 if window is None else min(1.0, context / window)
        return self.per_token * context + self.windows * filled + self.constant
