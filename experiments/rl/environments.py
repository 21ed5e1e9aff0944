"""Environments by name: tasks of one answer and episodes of several turns, all played through the same three methods."""

import functools
import importlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.tasks import Environment, Problem, Scores, Shop, Split, Step, Task, TrlEnvironment, task_named

_TRL = "trl"


class Source(NamedTuple):
    """An environment that can be played many times at once. make: an object for one episode at a time.

    task: that it is made of, where it is one answer.
    """

    name: str
    max_difficulty: int
    make: Callable[[], Environment]
    task: Task | None


class SingleTurn:
    """A `Task` as an `Environment`: the first response is the answer, and the episode is over."""

    def __init__(self, task: Task):
        self.name, self.max_difficulty, self._task = task.name, task.max_difficulty, task
        self._reference, self._response = None, ""

    def reset(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Environment.reset`."""
        problem = self._task.sample(seed, difficulty, split)
        self._reference, self._response = problem.reference, ""
        return problem

    def step(self, response: str) -> Step:
        """See `Environment.step`."""
        self._response = response
        return Step([], True)

    def score(self) -> Scores:
        """See `Environment.score`."""
        return self._task.score(self._response, self._reference)


def source_named(name: str, max_turns: int) -> Source:
    """The environment of a name, see `EnvironmentsConfig.names`.

    Raises:
      ValueError: there is none; or what stands for a class of TRL's is none.
    """
    if name == Shop.name:
        return Source(name, Shop.max_difficulty, functools.partial(Shop, max_turns=max_turns), None)
    if name.partition(":")[0] == _TRL:
        return _trl(name, max_turns)
    task = task_named(name)
    return Source(task.name, task.max_difficulty, functools.partial(SingleTurn, task), task)


def _trl(name: str, max_turns: int) -> Source:
    parts = name.split(":", 3)
    if len(parts) != 4:
        raise ValueError(f"{name!r} must be trl:MODULE:CLASS:ROWS, as in trl:my_package.games:Guess:rows.jsonl")
    _, module, class_name, path = parts
    try:
        factory = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r}: the class cannot be imported: {error}; is its folder in PYTHONPATH?") from error
    rows = _rows(epath.Path(path))
    make = functools.partial(TrlEnvironment, factory, rows, name=class_name, max_turns=max_turns)
    make()  # refuses what is no such class
    return Source(class_name, TrlEnvironment.max_difficulty, make, None)


def _rows(path: epath.Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: rows are lines of JSON, and these cannot be read: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a mapping in each line, of one line or more")
    return rows
