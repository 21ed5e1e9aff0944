"""The tasks by name, and a mixture of them by weights."""

import difflib
import json
import random
from collections.abc import Mapping, Sequence

from data_pipelines.tasks.arithmetic import Arithmetic
from data_pipelines.tasks.extraction import Extraction
from data_pipelines.tasks.gsm8k import Gsm8k
from data_pipelines.tasks.instructions import Instructions
from data_pipelines.tasks.numbers_game import NumbersGame
from data_pipelines.tasks.outside import ReasoningGym
from data_pipelines.tasks.task import Task
from data_pipelines.tasks.tool_use import ToolUse
from data_pipelines.tasks.word_problems import WordProblems

_OURS = (
    Arithmetic(), WordProblems(), Extraction(), Instructions(), ToolUse(), ToolUse("lfm3", name="tool_use_lfm3"), NumbersGame(),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _OURS}


def task_named(name: str) -> Task:
    """The task of a name in `TASKS`, of "gsm8k:PATH", PATH being a file of GSM8K, or of "reasoning_gym:NAME".

    Raises:
      ValueError: there is none of this name; the message has the nearest.
    """
    kind, _, path = name.partition(":")
    if kind == Gsm8k.name and path:
        return Gsm8k(path)
    if kind == "reasoning_gym" and path:
        return ReasoningGym(path)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}, gsm8k:PATH and reasoning_gym:NAME"
        raise ValueError(f"no task is named {name!r}; {hint}")
    return TASKS[name]


def tasks_named(names: Sequence[str]) -> list[Task]:
    """`task_named` of each.

    Raises:
      ValueError: there is none of a name, or two have one, as two files of GSM8K do: what is written of them is told apart by it.
    """
    tasks = [task_named(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"two tasks have one name, of {', '.join(task.name for task in tasks)}; take one of them")
    return tasks


def pick(weights: Mapping[str, float], seed: int) -> str:
    """One of the names, by their weights: the same for the same weights and seed, in whatever order the names are.

    Raises:
      ValueError: a weight is not positive, or there is none.
    """
    if not weights or not all(weight > 0 for weight in weights.values()):
        raise ValueError(f"expected names with positive weights, got {dict(weights)}")
    names = sorted(weights)
    return random.Random(json.dumps(["mixture", seed])).choices(names, [weights[name] for name in names])[0]
