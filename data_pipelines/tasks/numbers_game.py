"""A numbers game for models small enough for two cores: which two of four numbers make the target, found by trying.

    3 7 12 5 -> 84        the question
    3+5=8 low             an attempt: two of the numbers, what they make, and how that compares with the target
    12*5=60 low
    12*7=84 yes           the last one is right

All that a model can do is try, remember what it has tried, and stop. That is as much of reasoning as it takes for doom loops:
drawn at random, attempts differ and one of them is right before long; the most likely attempt is likely to be the most likely one
again (docs/doom_loop.md).
"""

import collections
import itertools
import random
import re
from typing import Any, NamedTuple

from data_pipelines.tasks.answers import MOST_CHARACTERS
from data_pipelines.tasks.task import Problem, Scores, Split, draw

_NUMBERS, _LARGEST = 4, 12
# Of wrong attempts before the right one. A geometric number of them can end after any, so that no length is the last one.
_MEAN_WRONG = 6.0
# In a rough search, how often an attempt is followed by the last one, two or three over again.
_STUTTER = 0.05
_MOST_ROUGH = 60  # lines; one search in 5,000 would have more
_LINE = re.compile(r"([0-9]{1,3})([-+*])([0-9]{1,3})=([0-9]{1,4}) (low|high|yes)")


class Attempt(NamedTuple):
    """Two numbers and what is done with them."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        """What they make."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.operation]

    def line(self, target: int) -> str:
        """As it is written, and how it compares with the target."""
        verdict = "yes" if self.result == target else "low" if self.result < target else "high"
        return f"{self.left}{self.operation}{self.right}={self.result} {verdict}"


class NumbersGame:
    """Four numbers from 1 to 12, and a sum, difference or product of two of them as the target. Difficulties: 1 several attempts
    are right, 2 just one is.
    """

    name = "numbers_game"
    max_difficulty = 2

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the numbers, in whatever order, and the target. The solution is a search at random
        that tries nothing twice.
        """

        def make(rng: random.Random) -> tuple[Problem, Any]:
            numbers, target = _question(rng, difficulty)
            wrong, right = _attempts(numbers, target)
            rng.shuffle(wrong)
            search = [*wrong[: _geometric(rng, _MEAN_WRONG)], rng.choice(right)]
            problem = Problem(
                messages=[{"role": "user", "content": f"{' '.join(map(str, numbers))} -> {target}"}],
                reference={"numbers": numbers, "target": target},
                solution="\n".join(_either_way(rng, attempt).line(target) for attempt in search),
            )
            return problem, [sorted(numbers), target]

        return draw(self, seed, difficulty, split, make)

    def rough_text(self, seed: int, difficulty: int) -> str:
        """A training problem and a search as one finds it in the wild, to be pre-trained on: nothing keeps it from trying again
        what it has tried, and at times it stutters. It still ends with what is right.
        """
        problem = self.sample(seed, difficulty)
        numbers, target = problem.reference["numbers"], problem.reference["target"]
        rng = random.Random(f"{self.name} {seed} {difficulty}")
        wrong, right = _attempts(numbers, target)
        lines: list[str] = []
        for _ in range(_geometric(rng, _MEAN_WRONG)):
            lines.append(_either_way(rng, rng.choice(wrong)).line(target))
            if rng.random() < _STUTTER:
                lines += lines[-rng.randrange(1, 4) :] * _geometric(rng, 2.0)
        lines = [*lines[:_MOST_ROUGH], _either_way(rng, rng.choice(right)).line(target)]
        return "\n".join([problem.messages[0]["content"], *lines])

    def score(self, response: str, reference: Any) -> Scores:
        """correct: the last line is an attempt of two of the numbers that makes the target, and says so. format: every line is an
        attempt in form, whether it is true or not, and the last one alone says yes.
        """
        if len(response) > MOST_CHARACTERS:
            return {"correct": 0.0, "format": 0.0}
        lines = [_LINE.fullmatch(line) for line in response.strip("\n").split("\n")]
        form = None not in lines and [line[5] == "yes" for line in lines] == [False] * (len(lines) - 1) + [True]
        return {"correct": float(_is_right(lines[-1], **reference)), "format": float(form)}


def _is_right(line: re.Match[str] | None, numbers: list[int], target: int) -> bool:
    if line is None or line[5] != "yes":
        return False
    attempt = Attempt(int(line[1]), line[2], int(line[3]))
    given = not collections.Counter([attempt.left, attempt.right]) - collections.Counter(numbers)
    return given and attempt.result == int(line[4]) == target


def _question(rng: random.Random, difficulty: int) -> tuple[list[int], int]:
    """Numbers, and a target that so many attempts make."""
    while True:
        numbers = [rng.randrange(1, _LARGEST + 1) for _ in range(_NUMBERS)]
        ways = collections.Counter(attempt.result for attempt in _every_attempt(numbers))
        targets = [target for target, count in ways.items() if target > 0 and (count == 1) == (difficulty == 2)]
        if targets:
            return numbers, rng.choice(sorted(targets))


def _every_attempt(numbers: list[int]) -> list[Attempt]:
    """All different ones; of two that differ only in their order, the one with the larger number first."""
    pairs = sorted({(max(pair), min(pair)) for pair in itertools.combinations(numbers, 2)})
    return [Attempt(left, operation, right) for left, right in pairs for operation in "+-*"]


def _attempts(numbers: list[int], target: int) -> tuple[list[Attempt], list[Attempt]]:
    """The wrong ones and the right ones."""
    every = _every_attempt(numbers)
    return [each for each in every if each.result != target], [each for each in every if each.result == target]


def _either_way(rng: random.Random, attempt: Attempt) -> Attempt:
    """A sum or a product in either order."""
    turned = attempt.operation != "-" and rng.random() < 0.5
    return Attempt(attempt.right, attempt.operation, attempt.left) if turned else attempt


def _geometric(rng: random.Random, mean: float) -> int:
    """0, 1, 2, ...: how often it goes on, when it ends each time with the same probability."""
    count = 0
    while rng.random() < mean / (mean + 1):
        count += 1
    return count
