"""Kernels, each beside the plain-JAX reference that specifies it and the dispatcher that chooses."""

from lfm_jax.kernels.short_conv_dispatch import IMPLEMENTATIONS, short_conv

__all__ = ["IMPLEMENTATIONS", "short_conv"]
