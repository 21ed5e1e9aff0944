"""Renders what is needed to run a command of run.py on TPU slices: nothing here talks to a cloud."""

from experiments.launch.render import SCHEDULERS, Rendered, render
from experiments.launch.settings import LaunchConfig, describe

__all__ = ["SCHEDULERS", "LaunchConfig", "Rendered", "describe", "render"]
