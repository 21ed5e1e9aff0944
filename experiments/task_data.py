"""Conversations of tasks with worked solutions, to be fine-tuned on."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

from etils import epath
from rich.progress import track

from data_pipelines.tasks import in_turn, tasks_named
from experiments.results import write_results
from lfm_jax.configuration import mistakes_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """tasks: names of tasks, or gsm8k:PATH; each gets a file of so many `conversations`.

    difficulties: that are drawn, each as often; none: all that a task has. split: never meets the other one. seed: of the first
    problem of each difficulty, the others have the numbers behind it.
    """

    tasks: tuple[str, ...]
    conversations: int = 1000
    difficulties: tuple[int, ...] = ()
    split: Literal["train", "held_out"] = "train"
    seed: int = 0

    def __post_init__(self):
        if not self.tasks or self.conversations < 1:
            raise ValueError(f"give at least one task and one conversation, got {self.tasks} and {self.conversations}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes conversations/TASK.jsonl of each task."""
    folder = workdir / "conversations"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    with mistakes_in("tasks"):
        tasks = tasks_named(config.tasks)
    for task in tasks:
        with mistakes_in("tasks"):
            part = folder / f".{task.name}.jsonl"
            with part.open("w") as file:
                for record in track(_records(config, task), description=task.name, total=config.conversations):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        files[task.name] = str(part.replace(folder / f"{task.name}.jsonl"))
    write_results(workdir, {"conversations": config.conversations, "files": files}, config)


def _records(config: Config, task: Any) -> Iterator[dict[str, Any]]:
    for seed, difficulty in in_turn(task, config.conversations, config.difficulties, config.seed):
        problem = task.sample(seed, difficulty, config.split)
        if problem.solution is None:
            raise ValueError(f"{task.name} has no worked solutions, so there is nothing to learn from it by imitation")
        record = {"messages": [*problem.messages, {"role": "assistant", "content": problem.solution}]}
        about = {"task": task.name, "difficulty": difficulty, "seed": seed, "reference": problem.reference}
        yield record | ({"tools": problem.tools} if problem.tools else {}) | about
