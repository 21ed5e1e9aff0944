"""Grouped matmuls against a loop over groups in float64, values and gradients; the TPU kernel in its emulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.kernels import grouped_matmul, grouped_matmul_tpu

IMPLEMENTATIONS = ("pallas", "blocks", "reference")
# Rows and the sizes of groups: one group; empty ones, first and last too; a group that ends within a chunk, within a block, with
# either; groups smaller than a chunk; rows behind the last group, up to all of them; rows that no block divides.
CASES = {
    "one group": (512, [512]),
    "empty groups": (700, [0, 300, 0, 0, 400, 0]),
    "on the borders": (1536, [128, 384, 512, 512]),
    "across the borders": (1100, [100, 500, 17, 483]),
    "rows of no group": (1400, [1, 600, 0, 5]),
    "no rows in any group": (300, [0, 0]),
    "few rows": (5, [2, 0, 3]),
}


def _arrays(rows, sizes, k=24, columns=(40, 16), dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 6))
    lhs = jax.random.normal(next(keys), (rows, k), dtype)
    rhs = tuple(jax.random.normal(next(keys), (len(sizes), k, width), dtype) for width in columns)
    gradients = tuple(jax.random.normal(next(keys), (rows, width), dtype) for width in columns)
    return lhs, rhs, jnp.asarray(sizes, jnp.int32), gradients


def _loop(lhs, rhs, sizes, gradients):
    """Outputs, gradient of lhs, gradients of rhs."""
    lhs, *others = (np.asarray(array, np.float64) for array in (lhs, *rhs, *gradients))
    rhs, gradients = others[: len(rhs)], others[len(rhs) :]
    outs, dlhs, drhs = [np.zeros_like(gradient) for gradient in gradients], np.zeros_like(lhs), [np.zeros_like(w) for w in rhs]
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        own = slice(start, start + size)
        for index, matrices in enumerate(rhs):
            outs[index][own] = lhs[own] @ matrices[group]
            dlhs[own] += gradients[index][own] @ matrices[group].T
            drhs[index][group] = lhs[own].T @ gradients[index][own]
        start += size
    return outs, dlhs, drhs


def _computed(lhs, rhs, sizes, gradients, implementation):
    multiply = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation=implementation)
    outs, transpose = jax.vjp(multiply, lhs, rhs)
    return outs, *transpose(gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_loop(case, implementation):
    arrays = _arrays(*CASES[case])
    found, expected = _computed(*arrays, implementation), _loop(*arrays)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-4), found, jax.tree.map(jnp.asarray, (
        tuple(expected[0]), expected[1], tuple(expected[2]),
    )))  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_no_group_may_be_anything_and_get_zeros(implementation):
    lhs, rhs, sizes, gradients = _arrays(700, [100, 200], dtype=jnp.bfloat16)
    spoiled = lhs.at[300:].set(jnp.nan), rhs, sizes, tuple(gradient.at[300:].set(jnp.nan) for gradient in gradients)
    outs, dlhs, drhs = _computed(*spoiled, implementation)
    for array in (*outs, dlhs):
        np.testing.assert_array_equal(array[300:], 0)
    clean = _computed(lhs, rhs, sizes, gradients, implementation)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[:300], other[:300]), (outs, dlhs), clean[:2])
    jax.tree.map(np.testing.assert_array_equal, drhs, clean[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_bfloat16_are_summed_in_float32(implementation):
    """A sum of 8,192 ones in bfloat16 stands still at 256."""
    rows = 8192
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    inputs = ones(rows, 8), (ones(2, 8, 8),), jnp.asarray([rows // 2] * 2, jnp.int32), (ones(rows, 8),)
    *_, (drhs,) = _computed(*inputs, implementation)
    assert drhs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(drhs, rows // 2)


def test_columns_are_split_evenly_between_two_cores_as_far_as_they_fit():
    assert grouped_matmul_tpu._block_columns(1792, 2 * 2048) == 896
    assert grouped_matmul_tpu._block_columns(2048, 2 * 1792) == 1024
    assert grouped_matmul_tpu._block_columns(2048, 2 * 2 * 1792) == 1024
    assert grouped_matmul_tpu._block_columns(1536, 2 * 2048) == 768
    assert grouped_matmul_tpu._block_columns(2048, 4 * 16384) == 128
    assert grouped_matmul_tpu._block_columns(40, 48) == 128


def test_what_does_not_fit_is_refused():
    lhs, rhs, sizes, _ = _arrays(8, [3, 5])
    with pytest.raises(ValueError, match="implementation must be one of auto, pallas, blocks, reference, got 'palas'"):
        grouped_matmul(lhs, rhs, sizes, implementation="palas")
    with pytest.raises(ValueError, match=r"lhs must be float32 or bfloat16 of \[rows, k\], got float16 of \[8, 24\]"):
        grouped_matmul(lhs.astype(jnp.float16), rhs, sizes)
    with pytest.raises(ValueError, match=r"rhs must be float32 of \[groups, 24, columns\], got float32 of \[2, 16, 24\]"):
        grouped_matmul(lhs, [rhs[1].swapaxes(1, 2)], sizes)
    with pytest.raises(ValueError, match=r"rhs must be float32 of \[groups, 24, columns\], got bfloat16"):
        grouped_matmul(lhs, [rhs[1].astype(jnp.bfloat16)], sizes)
    with pytest.raises(ValueError, match=r"group_sizes must be \[2\], one a group, got \[3\]"):
        grouped_matmul(lhs, rhs, jnp.zeros(3, jnp.int32))
