"""Conversations that have been read, for those who continue them."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lfm_jax.models import DecoderCache, ModelConfig


class Known(NamedTuple):
    """What has been read. length: its tokens. routing: their experts, [length, moe layers, top_k], or None."""

    length: int
    cache: DecoderCache
    routing: np.ndarray | None


class Prefixes:
    """Caches of one row by the tokens that they have read, the least recently used forgotten first.

    One can only be continued from its end: the window of a convolution after fewer tokens is not in it. So what a prompt has in
    common with one is of use only where it is all of it.

    Args:
      max_bytes: of all together.
    """

    def __init__(self, config: ModelConfig, max_bytes: int):
        self._config, self._max_bytes = config, max_bytes
        self._known: collections.OrderedDict[tuple[int, ...], Known] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, tokens: Sequence[int], cache: DecoderCache, routing: np.ndarray | None = None) -> None:
        """Remembers the cache of a row that has read exactly these tokens, and which experts they went to, where that is told.

        Raises:
          ValueError: the state of some block is not there.
        """
        for index, (kind, state) in enumerate(zip(self._config.layer_types, cache.layers, strict=True)):
            if state is None or any(array is None for array in state):
                raise ValueError(f"block {index} ({kind}) has no state in the cache; it would go on as if nothing had been read")
        key, known = tuple(tokens), Known(len(tokens), cache, routing)
        size = _bytes(known)
        if size > self._max_bytes or not key:
            return
        self._forget(key)
        self._known[key] = known
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._forget(next(iter(self._known)))

    def longest(self, prompt: Sequence[int]) -> Known | None:
        """The longest one that the prompt begins with and goes on after."""
        prompt = tuple(prompt)
        fitting = [key for key in self._known if len(key) < len(prompt) and prompt[: len(key)] == key]
        if not fitting:
            return None
        key = max(fitting, key=len)
        self._known.move_to_end(key)
        return self._known[key]

    def _forget(self, key: tuple[int, ...]) -> None:
        if key in self._known:
            self.bytes -= _bytes(self._known.pop(key))


def _bytes(known: Known) -> int:
    return sum(array.nbytes for array in jax.tree.leaves((known.cache, known.routing)))
