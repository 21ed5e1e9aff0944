"""Kernels, each beside the plain-JAX reference that specifies it and the dispatcher that chooses."""

from lfm_jax.kernels.attention_dispatch import attention
from lfm_jax.kernels.attention_reference import attention_by_rows, attention_reference
from lfm_jax.kernels.attention_tpu import ATTENDED
from lfm_jax.kernels.grouped_matmul_dispatch import grouped_matmul
from lfm_jax.kernels.short_conv_dispatch import IMPLEMENTATIONS, short_conv

__all__ = ["ATTENDED", "IMPLEMENTATIONS", "attention", "attention_reference", "attention_by_rows", "grouped_matmul", "short_conv"]
