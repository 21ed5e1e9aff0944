"""What a policy is asked for preference data: problems of tasks, and the questions of conversations."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data_pipelines.conversations import Conversation, ConversationsConfig, read_conversations
from data_pipelines.tasks import Split, Task, in_turn, task_named


class Prompt(NamedTuple):
    """number: among all. about: where it is from. task: that can tell what is right by the reference; None: nobody can."""

    number: int
    conversation: Conversation
    about: dict[str, Any]
    task: Task | None
    reference: Any


class Source(NamedTuple):
    """Which prompts there are.

    tasks: by name, or gsm8k:PATH; of each so many `prompts`, of the difficulties in turn (none: all of the task's) and of each
    the seeds from `seed` on. conversations: files, folders or patterns of JSON lines; the prompt of one is what stands before its
    last answer. held_out_share: of them (see `ConversationsConfig`), which is left out, or, of the split "held_out", taken.
    """

    tasks: Sequence[str]
    prompts: int
    difficulties: Sequence[int]
    conversations: Sequence[str]
    held_out_share: float
    split: Split
    seed: int


def shards(source: Source, size: int) -> Iterator[list[Prompt]]:
    """All prompts in shards, the same on every host; a shard is made when it is asked for.

    Raises:
      ValueError: a task of no such name or difficulty, or a conversation that is none.
      FileNotFoundError: no such file.
    """
    every = (Prompt(number, *found) for number, found in enumerate(_prompts(source)))
    while shard := list(itertools.islice(every, size)):
        yield shard


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of what is asked and where it is from: the same only for the same prompts."""
    asked = [[prompt.number, prompt.conversation.messages, prompt.conversation.tools, prompt.about] for prompt in prompts]
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _prompts(source: Source) -> Iterator[tuple[Conversation, dict[str, Any], Task | None, Any]]:
    for name in source.tasks:
        task = task_named(name)
        for seed, difficulty in in_turn(task, source.prompts, source.difficulties, source.seed):
            problem = task.sample(seed, difficulty, source.split)
            about = {"task": name, "difficulty": difficulty, "seed": seed, "split": source.split}
            named = Conversation(problem.messages, problem.tools or (), f"{name}, difficulty {difficulty}, seed {seed}")
            yield named, about, task, problem.reference
    for name in source.conversations:
        config = ConversationsConfig(source=name, held_out_share=source.held_out_share)
        for found in read_conversations(config, source.split):
            last = max(index for index, message in enumerate(found.messages) if message["role"] == "assistant")
            yield found._replace(messages=list(found.messages[:last])), {"conversation": found.name}, None, None
