"""How many rows of which source each step has: by a formula, so that any step is known without those before it."""

import bisect
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What changes from a step on; what is None stays as it was.

    from_step: steps done before. weights: shares of the sources, see `LoaderConfig`. seq_len: positions of a row.
    batch_size: rows of a batch.
    """

    from_step: int
    weights: tuple[float, ...] | None = None
    seq_len: int | None = None
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("from_step", "seq_len", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


class Stage(NamedTuple):
    """Steps from `from_step` on: batches of batch_size rows of seq_len positions, out of the sources by their weights."""

    from_step: int
    seq_len: int
    batch_size: int
    weights: tuple[Fraction, ...]


class Share(NamedTuple):
    """Rows of a source in a step: `count` of them, from number `first` of the rows that the source has given at this length."""

    first: int
    count: int


def shares_of(rows: int, weights: Sequence[Fraction]) -> list[int]:
    """How many of the first `rows` rows of a stage each source has: never fewer of any when there are more rows.

    Each source takes its part of what those before it leave, rounded down, so a source of weight w has had n w of n rows, give or
    take less than a row for it and each source before it.
    """
    counts, left, rest = [], rows, Fraction(1)
    for weight in weights:
        count = int(left * weight / rest) if rest else 0
        counts.append(count)
        left, rest = left - count, rest - weight
    return counts


class Mixture:
    """The sources' rows, step by step. Can be pickled."""

    def __init__(self, stages: Sequence[Stage], limits: Mapping[int, Sequence[int]] | None):
        """stages: in the order of their first steps, of which the first is 0. limits: by length, rows that each source gives at
        most; None: without end."""
        self._stages, self._limits = tuple(stages), limits
        self._starts = [stage.from_step for stage in stages]

    def stage(self, step: int) -> int:
        """Which stage a step is of."""
        return bisect.bisect_right(self._starts, step) - 1

    def shares(self, step: int) -> list[Share]:
        """What each source gives to a step."""
        now = self.stage(step)
        before, after = (self._given(at, self._stages[now].seq_len) for at in (step, step + 1))
        return [Share(first, last - first) for first, last in zip(before, after, strict=True)]

    def steps(self) -> int:
        """Steps until a source has given all that it may; the last one may ask for more."""
        if self._limits is None:
            return sys.maxsize
        spent = lambda step: any(
            given >= limit
            for seq_len, limits in self._limits.items()
            for given, limit in zip(self._given(step, seq_len), limits, strict=True)
        )
        return bisect.bisect_left(range(sys.maxsize), True, key=spent)

    def _given(self, step: int, seq_len: int) -> list[int]:
        """Rows of a length that each source has given before a step."""
        totals = [0] * len(self._stages[0].weights)
        for stage, end in zip(self._stages, [*self._starts[1:], sys.maxsize], strict=True):
            steps = min(step, end) - stage.from_step
            if steps > 0 and stage.seq_len == seq_len:
                counts = shares_of(steps * stage.batch_size, stage.weights)
                totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return totals
