"""What a grouped matmul is, in plain JAX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def grouped_matmul_reference(lhs: jax.Array, rhs: Sequence[jax.Array], group_sizes: jax.Array) -> tuple[jax.Array, ...]:
    """See `lfm_jax.kernels.grouped_matmul`."""
    grouped = (jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes))[:, None]
    # What a ragged dot leaves behind its last group need not be a number, nor what its gradient does.
    lhs = jnp.where(grouped, lhs, 0)
    return tuple(jnp.where(grouped, jax.lax.ragged_dot(lhs, matrices, group_sizes), 0) for matrices in rhs)


def reference_backward(
    lhs: jax.Array, rhs: Sequence[jax.Array], group_sizes: jax.Array, gradients: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of lhs and of each of rhs."""
    _, transpose = jax.vjp(lambda lhs, rhs: grouped_matmul_reference(lhs, rhs, group_sizes), lhs, tuple(rhs))
    return transpose(tuple(gradients))
