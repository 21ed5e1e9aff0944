"""Doom loops: a text that repeats itself without end. One definition, over token ids, for whole answers and for growing ones.

A stretch of tokens *loops* if it is one sequence of at most `period` tokens over and over, at least `repeats` times and over at
least `tokens` tokens; the last repetition may be cut off (`LoopConfig`). Two rules ask where such a stretch is:

- *tail loop*, the doom loop proper: the answer ends in one (`tail_loop`). The model was in it when its tokens ran out.
- *inner loop*: there is one anywhere (`inner_loop`), so that a model that loops and escapes is counted as well.

`LoopDetector` says after each token whether what there is so far ends in a loop, so it stops an answer where its first inner loop
is complete. Beside them stands what ran to its limit without looping (`classify`).

Lists, tables and code repeat as well, a few times. Whoever asks at one place, the end of an answer, may take 16 tokens for a loop
(`TAIL`); whoever asks at every token, as the inner rule and the detector do, needs more (`INNER`, the defaults). In 1.5 million
tokens of Python's standard library and of Markdown (a tokenizer of 4,096 ids) 16 tokens find loops in 11 of 215 files, such as
`| 0 | 0 | 0 | 0 | 0 | 0 ` in a table, 32 in 2 and 48 in none; of the places to end at, 0.06 % are in a loop of 16 tokens. Where
tokens are bytes, a ruler of 64 signs is a loop, as it is by the other definitions.

How others count, and what of this they are (tests/generation/test_loops.py writes each rule apart and compares):

- vLLM's `repetition_detection`: the end is a pattern of at most `max_pattern_size` tokens, `min_count` times. The tail rule with
  `tokens=0` is the same, `min_pattern_size` 1. A larger `min_pattern_size` keeps no shorter period out (12 equal tokens are also
  4 tokens 3 times); hence `tokens`, which does.
- Holtzman et al. 2020 (arXiv 1904.09751): the last phrase of at least 2 tokens stands at least 3 times at the end of 200 tokens:
  the tail rule with `LoopConfig(period=66, repeats=3, tokens=6)` on those.
- Liquid AI's antidoom (2026): a span of at most 1,024 characters at least 4 times in a row, over at least 60: the inner rule with
  `LoopConfig(period=1024, repeats=4, tokens=60)` over the characters' code points.
- "Wait, Wait, Wait... Why Do Reasoning Models Loop?" (arXiv 2512.12895): some 30 tokens stand in the answer at least 20 times,
  adjoining or not. A loop whose periods are equal only in part escapes our rules and not theirs; one that has just begun, or of
  long periods, escapes theirs.
- Welleck et al. 2020 (arXiv 1908.04319), seq-rep-n, is no rule but a share (`lfm_jax.generation.repetition`): it cannot tell a
  table from a loop.

All of ours are exact on token ids: a list that counts up, or a loop with one number changed in each period, is none.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["tail_loop", "inner_loop", "limit", "ended"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What counts as a loop: a sequence of at most `period` tokens, `repeats` times in a row, over `tokens` tokens or more."""

    period: int = 512
    repeats: int = 4
    tokens: int = 64

    def __post_init__(self):
        if self.period < 1 or self.repeats < 2 or self.tokens < 0:
            raise ValueError(
                "a loop has a period of at least 1, 2 repeats or more and no negative number of tokens, got "
                f"{self.period}, {self.repeats} and {self.tokens}"
            )

    def repeated(self) -> np.ndarray:
        """For periods 1, 2, ...: how many tokens in a row equal those a period before, in the shortest loop. [period] int64.

        The first period of a loop equals nothing before it.
        """
        periods = np.arange(1, self.period + 1)
        return np.maximum(periods * (self.repeats - 1), self.tokens - periods)


TAIL = LoopConfig(tokens=16)
INNER = LoopConfig()


class Loop(NamedTuple):
    """Tokens [start, end) repeat with a period, and neither the token before nor the one behind goes with them.

    The second repetition begins at start + period: the token there is the one that antidoom rejects.
    """

    start: int
    end: int
    period: int


class LoopDetector:
    """Of one text. After each token it knows, for every period, how long the text has repeated with it."""

    def __init__(self, config: LoopConfig):
        self._last = np.full(config.period, -1, np.int64)  # the tokens before, the latest first
        self._equal = np.zeros(config.period, np.int64)  # how many tokens in a row were those of 1, 2, ... tokens before
        self._enough = config.repeated()

    def push(self, token: int) -> bool:
        """Whether the text ends in a loop with this token: the tail rule."""
        self._equal = np.where(self._last == token, self._equal + 1, 0)
        self._last = np.roll(self._last, 1)
        self._last[0] = token
        return bool((self._equal >= self._enough).any())


def tail_loop(tokens: Sequence[int] | np.ndarray, config: LoopConfig = TAIL) -> Loop | None:
    """The loop that the tokens, [n], end in, of the shortest period; None: they do not.

    In time linear in the tokens that matter, the last max(period * repeats, tokens): read backwards, the end has a period of p
    over so many tokens as the Z-function at p says, and p more.
    """
    tokens = np.asarray(tokens)
    most = max(config.period * config.repeats, config.tokens)
    lengths = _prefix_lengths(tokens[::-1][:most].tolist(), config.period + 1)[1:]
    (periods,) = np.nonzero(lengths >= config.repeated()[: len(lengths)])
    return _stretch(tokens, len(tokens), int(periods[0]) + 1) if len(periods) else None


def inner_loop(tokens: Sequence[int] | np.ndarray, config: LoopConfig = INNER) -> Loop | None:
    """The first loop in the tokens, [n]: the one that is complete first, where `LoopDetector` stops; None: there is none.

    For each period one vectorised pass over the tokens, at most n * period comparisons: 32,768 tokens take 0.06 s.
    """
    tokens = np.asarray(tokens)
    found, end = None, len(tokens) + 1  # where the loop found so far is complete
    for period, repeated in enumerate(config.repeated().tolist(), 1):
        before = tokens[: end - 1]  # one that is complete no earlier is not wanted
        if period + repeated > len(before):
            break
        different = np.flatnonzero(before[period:] != before[:-period])
        bounds = np.concatenate([[-1], different, [len(before) - period]])
        (long,) = np.nonzero(np.diff(bounds) > repeated)
        if len(long):
            end = int(bounds[long[0]]) + 1 + repeated + period
            found = end, period
    return found and _stretch(tokens, *found)


def classify(
    tokens: Sequence[int] | np.ndarray, finish_reason: str, tail: LoopConfig = TAIL, inner: LoopConfig = INNER
) -> Verdict:
    """What became of an answer: the first that fits of these.

    tail_loop: it ends in a loop, or was stopped in one. inner_loop: it has looped and escaped. limit: it reached the limit of its
    length without a loop. ended: it came to its end. Of many answers the share in a doom loop is that of tail_loop, and the
    share that ever looped that of tail_loop and inner_loop.

    Args:
      tokens: of the answer, without its prompt, [n].
      finish_reason: as `Completion` has it.

    Raises:
      ValueError: the answer was cancelled, or the reason is unknown.
    """
    if finish_reason not in ("stop", "length", "loop"):
        raise ValueError(f"an answer that is whole has finish_reason stop, length or loop, got {finish_reason!r}; leave it out")
    if finish_reason == "loop" or tail_loop(tokens, tail):
        return "tail_loop"
    if inner_loop(tokens, inner):
        return "inner_loop"
    return "limit" if finish_reason == "length" else "ended"


def _stretch(tokens: np.ndarray, end: int, period: int) -> Loop:
    """All that repeats with the period around the tokens before `end`, which do."""
    different = np.flatnonzero(tokens[period:] != tokens[:-period])
    next_one = int(np.searchsorted(different, end - period))
    start = int(different[next_one - 1]) + 1 if next_one else 0
    return Loop(start, int(different[next_one]) + period if next_one < len(different) else len(tokens), period)


def _prefix_lengths(tokens: list[int], count: int) -> np.ndarray:
    """The Z-function at the first `count` places: how many tokens from there on equal those from the beginning on.

    Gusfield 1997, Algorithms on Strings, Trees and Sequences, section 1.4. What has been compared once, up to `right`, is not
    compared again.
    """
    size = len(tokens)
    lengths = [0] * min(count, size)
    left = right = 0
    for place in range(1, len(lengths)):
        length = min(right - place, lengths[place - left]) if place < right else 0
        while place + length < size and tokens[length] == tokens[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        lengths[place] = length
    return np.array(lengths, np.int64)
