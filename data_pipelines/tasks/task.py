"""What a task is: problems drawn by seed and difficulty, with a split that content decides, and a score in named parts."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

Split = Literal["train", "held_out"]
# A response in named parts of [0, 1]; None where a part does not apply. "correct" is always among them.
Scores = dict[str, float | None]

_HELD_OUT_ONE_IN = 8
# By chance alone so many draws miss a held-out problem once in 10^11 times.
_MOST_DRAWS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem, all of it plain values of JSON.

    messages: the chat so far, each with "role" and "content". tools: JSON schemas of the functions that may be called, as chat
    templates take them; None where there are none. reference: what `Task.score` compares a response with. solution: a worked
    answer, the assistant's whole turn, that scores 1 in every part that applies; None where there is none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    reference: Any
    solution: str | None = None


class Task(Protocol):
    """A source of problems and the judge of the answers to them.

    name: how configs and metrics call it. max_difficulty: difficulties are 1 (the easiest) to this.
    """

    name: str
    max_difficulty: int

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """The problem of this seed: the same for the same arguments on every machine, and never one of the other split."""
        ...

    def score(self, response: str, reference: Any) -> Scores:
        """How good a response is. Whatever the text, nothing is raised and nothing hangs: what cannot be read scores low."""
        ...


def draw(
    task: Task, seed: int, difficulty: int, split: Split, make: Callable[[random.Random], tuple[Problem, Any]]
) -> Problem:
    """The problem of (task, seed, difficulty, split): `make` is called again until its content is of the split.

    Args:
      make: draws one problem from the generator that it is given and nothing else. With it comes what is asked, as plain values
        of JSON: the content, without what may differ between two wordings of the same question (names, order, politeness). The
        content's hash decides the split, so that a question that was trained on is never held out at another seed or difficulty.

    Raises:
      ValueError: the split or difficulty is none of the task's, or no problem of the split was found.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    if not 1 <= difficulty <= task.max_difficulty:
        raise ValueError(f"{task.name} has difficulties 1 to {task.max_difficulty}, got {difficulty}")
    for attempt in range(_MOST_DRAWS):
        problem, content = make(random.Random(json.dumps([task.name, seed, difficulty, split, attempt])))
        if split_of(content) == split:
            return problem
    asked = f"{task.name}, difficulty {difficulty}, seed {seed}"
    raise ValueError(f"{asked}: of {_MOST_DRAWS} problems none is {split}; make it draw more different ones")


def in_turn(task: Task, count: int, difficulties: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """(seed, difficulty) of so many problems: the difficulties in turn (none: all of the task's), each with the seeds from `seed`
    on. So of a task with a set of problems that seeds count through, all of a difficulty come before one comes again.
    """
    each = difficulties or range(1, task.max_difficulty + 1)
    for number in range(count):
        yield seed + number // len(each), each[number % len(each)]


def split_of(content: Any) -> Split:
    """Where a question belongs: one in eight is held out, by a hash of its content (plain values of JSON)."""
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0 else "train"
