"""How difficult each environment is at a time, and whether it has gone cold; all of it by what its answers were worth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.rl.settings import CurriculumConfig


@dataclasses.dataclass
class Standing:
    """Of one environment.

    difficulty: of the next batch. means: of "correct" in the batches since it changed, at most a window. failures: batches in a
    row with no answer that was right at all. cold: what is known of it while it is cold, None while it is not.
    """

    difficulty: int
    means: list[float] = dataclasses.field(default_factory=list)
    failures: int = 0
    cold: dict[str, Any] | None = None


class Curriculum:
    """The standing of every environment, after the batches so far.

    Args:
      most: the highest difficulty of each, by name. start: that of the first batch. adaptive: whether it changes.
    """

    def __init__(
        self, config: CurriculumConfig, most: Mapping[str, int], start: Mapping[str, int], adaptive: Mapping[str, bool]
    ):
        self._config, self._most, self._adaptive = config, dict(most), dict(adaptive)
        self.standings = {name: Standing(start[name]) for name in most}

    def take(self, correct: Mapping[str, Sequence[float]]) -> list[str]:
        """What the answers of a batch were worth, by environment; none of one that was not in it. Returns who has gone cold."""
        gone_cold = []
        for name, values in correct.items():
            if not len(values):
                continue
            standing = self.standings[name]
            standing.failures = 0 if max(values) > 0 else standing.failures + 1
            if standing.failures == 0:
                standing.cold = None
            elif standing.failures >= self._config.cold_after and standing.cold is None:
                gone_cold.append(name)
            if self._adaptive[name]:
                self._move(standing, math.fsum(values) / len(values), self._most[name])
        return gone_cold

    def _move(self, standing: Standing, mean: float, most: int) -> None:
        config = self._config
        standing.means = [*standing.means, mean][-config.window :]
        if len(standing.means) < config.window:
            return
        level = math.fsum(standing.means) / config.window
        step = (level > config.raise_above) - (level < config.lower_below)
        moved = min(max(standing.difficulty + step, 1), most)
        if moved != standing.difficulty:
            standing.difficulty, standing.means = moved, []

    def get_state(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {name: dataclasses.asdict(standing) for name, standing in self.standings.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another one was."""
        self.standings = {name: Standing(**state[name]) for name in self.standings}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """How likely one of k answers is right, unbiased, from how many of the samples were (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
