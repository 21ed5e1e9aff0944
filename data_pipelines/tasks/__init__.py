"""Tasks: problems with answers that a program can check, drawn by seed and difficulty, for fine-tuning, preferences and RL."""

from data_pipelines.tasks.gsm8k import Gsm8k
from data_pipelines.tasks.multi_turn import Environment, Step, Turns
from data_pipelines.tasks.outside import ReasoningGym, TrlEnvironment
from data_pipelines.tasks.registry import TASKS, pick, task_named, tasks_named
from data_pipelines.tasks.shop import Shop
from data_pipelines.tasks.task import Problem, Scores, Split, Task, in_turn
from data_pipelines.tasks.tool_use import ToolUse

__all__ = [
    "TASKS", "Environment", "Gsm8k", "Problem", "ReasoningGym", "Scores", "Shop", "Split", "Step", "Task", "ToolUse",
    "TrlEnvironment", "Turns", "in_turn", "pick", "task_named", "tasks_named",
]
