"""Conversations of tasks that a program can check, with worked solutions: files for configs/sft.py.

    python run.py --config=configs/task_data.py --workdir=workdirs/tasks --config.tasks=arithmetic,word_problems,extraction
    python run.py --config=configs/sft.py --workdir=workdirs/sft --config.init_from=workdirs/quickstart \
        --config.data.sources=workdirs/tasks/conversations/arithmetic.jsonl,workdirs/tasks/conversations/word_problems.jsonl

A file for each task, 1,000 conversations of all its difficulties in turn, in the workdir's folder conversations/. GSM8K's own
solutions: `--config.tasks=gsm8k:FILE`. What is drawn with `--config.split=held_out` never meets what is trained on. Seconds.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "task_data", "tasks": ("arithmetic", "word_problems", "extraction", "instructions")})
