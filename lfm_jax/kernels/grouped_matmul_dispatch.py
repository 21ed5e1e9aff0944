"""One function for matmuls of rows in groups, whatever computes them."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lfm_jax.kernels import grouped_matmul_blocks, grouped_matmul_tpu
from lfm_jax.kernels.grouped_matmul_reference import grouped_matmul_reference, reference_backward

GroupedMatmulImplementation = Literal["auto", "pallas", "blocks", "reference"]


def _by_platform(kernel: Callable, blocks: Callable, reference: Callable) -> dict[str, dict[str, Callable]]:
    """For each implementation what computes it on which platform, "default" on the others; see `short_conv_dispatch`.

    "auto" takes the kernel on TPUs always: XLA's own gradient of the matrices multiplies every row for every group there, 45
    times the work for 32 experts. On CPUs XLA does so in all three products (docs/benchmarks/grouped_matmul.md).
    """
    return {
        "auto": {"tpu": kernel, "cpu": blocks, "default": reference},
        "pallas": {"tpu": kernel, "default": functools.partial(kernel, interpret=True)},
        "blocks": {"default": blocks},
        "reference": {"default": reference},
    }


_FORWARD = _by_platform(grouped_matmul_tpu.forward, grouped_matmul_blocks.forward, grouped_matmul_reference)
_BACKWARD = _by_platform(grouped_matmul_tpu.backward, grouped_matmul_blocks.backward, reference_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation, lhs, rhs, group_sizes):
    return jax.lax.platform_dependent(lhs, rhs, group_sizes, **_FORWARD[implementation])


def _grouped_matmul_forward(implementation, *inputs):
    return _grouped_matmul(implementation, *inputs), inputs


def _grouped_matmul_backward(implementation, inputs, gradients):
    return *jax.lax.platform_dependent(*inputs, gradients, **_BACKWARD[implementation]), None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


def grouped_matmul(
    lhs: jax.Array,
    rhs: Sequence[jax.Array],
    group_sizes: jax.Array,
    *,
    implementation: GroupedMatmulImplementation = "auto",
) -> tuple[jax.Array, ...]:
    """out[i][r] = lhs[r] @ rhs[i][g] for every row r of group g, and zero for the rows behind the last group.

    Rows are sorted by group. Sums are float32 in both directions. Several matrices of a group that meet the same rows go into one
    call, which adds up the gradient of lhs without writing the parts.

    Args:
      lhs: [rows, k], float32 or bfloat16. rhs: each [groups, k, columns], of the same type.
      group_sizes: [groups] int32, rows of each; a group may be empty, and they may add up to less than `rows`.
      implementation: "auto" (the kernel where the program is for TPUs, blocks where it is for CPUs), "pallas" (the kernel,
        emulated elsewhere), "blocks" (of rows, one after the other) or "reference" (`jax.lax.ragged_dot`).

    Returns:
      For each of rhs [rows, columns] in the type of lhs.

    Raises:
      ValueError: a shape or type that does not fit the others, or an implementation that is not one.
    """
    if implementation not in get_args(GroupedMatmulImplementation):
        known = ", ".join(get_args(GroupedMatmulImplementation))
        raise ValueError(f"implementation must be one of {known}, got {implementation!r}")
    if lhs.ndim != 2 or lhs.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"lhs must be float32 or bfloat16 of [rows, k], got {lhs.dtype} of {list(lhs.shape)}")
    for matrices in rhs:
        if matrices.ndim != 3 or matrices.shape[1] != lhs.shape[1] or matrices.dtype != lhs.dtype:
            raise ValueError(
                f"rhs must be {lhs.dtype} of [groups, {lhs.shape[1]}, columns], got {matrices.dtype} of {list(matrices.shape)}"
            )
        if group_sizes.shape != matrices.shape[:1]:
            raise ValueError(f"group_sizes must be [{matrices.shape[0]}], one a group, got {list(group_sizes.shape)}")
    return _grouped_matmul(implementation, lhs, tuple(rhs), group_sizes)
