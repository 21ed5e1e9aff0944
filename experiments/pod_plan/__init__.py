"""The pod planner: what a training step costs on a TPU slice, by the TPU compiler's own word, and which layout to take."""

from experiments.pod_plan.config import Config, PublishedRun
from experiments.pod_plan.planner import main

__all__ = ["Config", "PublishedRun", "main"]
