"""Sampling from a trained model."""

from lfm_jax.generation.sample import SamplingConfig, generate

__all__ = ["SamplingConfig", "generate"]
