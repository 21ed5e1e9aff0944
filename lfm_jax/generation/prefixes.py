"""Conversations that have been read, for those who continue them."""

import collections
from collections.abc import Sequence

import jax

from lfm_jax.models import DecoderCache, ModelConfig


class Prefixes:
    """Caches of one row by the tokens that they have read, the least recently used forgotten first.

    One can only be continued from its end: the window of a convolution after fewer tokens is not in it. So what a prompt has in
    common with one is of use only where it is all of it.

    Args:
      max_bytes: of all together.
    """

    def __init__(self, config: ModelConfig, max_bytes: int):
        self._config, self._max_bytes = config, max_bytes
        self._caches: collections.OrderedDict[tuple[int, ...], DecoderCache] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._caches)

    def keep(self, tokens: Sequence[int], cache: DecoderCache) -> None:
        """Remembers the cache of a row that has read exactly these tokens.

        Raises:
          ValueError: the state of some block is not there.
        """
        for index, (kind, state) in enumerate(zip(self._config.layer_types, cache.layers, strict=True)):
            if state is None or any(array is None for array in state):
                raise ValueError(f"block {index} ({kind}) has no state in the cache; it would go on as if nothing had been read")
        key, size = tuple(tokens), _bytes(cache)
        if size > self._max_bytes or not key:
            return
        self._forget(key)
        self._caches[key] = cache
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._forget(next(iter(self._caches)))

    def longest(self, prompt: Sequence[int]) -> tuple[int, DecoderCache] | None:
        """(tokens, cache) of the longest one that the prompt begins with and goes on after."""
        prompt = tuple(prompt)
        fitting = [key for key in self._caches if len(key) < len(prompt) and prompt[: len(key)] == key]
        if not fitting:
            return None
        key = max(fitting, key=len)
        self._caches.move_to_end(key)
        return len(key), self._caches[key]

    def _forget(self, key: tuple[int, ...]) -> None:
        if key in self._caches:
            self.bytes -= _bytes(self._caches.pop(key))


def _bytes(cache: DecoderCache) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
