"""A text that repeats itself without end, noticed while it is generated."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What counts as a loop: the last `tokens` tokens or more are one sequence of at most `period` tokens, `repeats` times over.

    Lists and tables repeat as well, a few times; a loop goes on.
    """

    period: int = 128
    repeats: int = 4
    tokens: int = 64

    def __post_init__(self):
        if self.period < 1 or self.repeats < 2 or self.tokens < 2:
            raise ValueError(
                f"a loop has a period of at least 1, 2 repeats and 2 tokens, got {self.period}, {self.repeats} and {self.tokens}"
            )


class LoopDetector:
    """Of one text. After each token it knows, for every period, how long the text has repeated with it."""

    def __init__(self, config: LoopConfig):
        self._config = config
        self._last = np.full(config.period, -1, np.int64)  # the tokens before, the latest first
        self._equal = np.zeros(config.period, np.int64)  # how many tokens in a row were those of 1, 2, ... tokens before
        periods = np.arange(1, config.period + 1)
        # Of a stretch that repeats, the first period equals nothing before it.
        self._enough = np.maximum(periods * (config.repeats - 1), config.tokens - periods)

    def push(self, token: int) -> bool:
        """Whether the text has come to loop with this token."""
        self._equal = np.where(self._last == token, self._equal + 1, 0)
        self._last = np.roll(self._last, 1)
        self._last[0] = token
        return bool((self._equal >= self._enough).any())
