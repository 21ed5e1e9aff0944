"""A run of two processes in which one thing after the other goes wrong: what is lost, who is named, and how soon."""

from experiments.benchmarks.faults.campaign import Config, main

__all__ = ["Config", "main"]
