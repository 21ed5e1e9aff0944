"""Projection, norm and rotation against closed forms in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.models.config import RopeConfig
from lfm_jax.models.layers import Embedding, RMSNorm, apply_rope, project, rope_phases
from lfm_jax.sharding import MeshConfig, make_mesh


@pytest.mark.parametrize(
    "formula, x, weight, contracted",
    [
        ("bse,em->bsm", (2, 5, 8), (8, 6), 1),
        ("bse,ehd->bshd", (2, 5, 8), (8, 3, 4), 1),
        ("bshd,hde->bse", (2, 5, 3, 4), (3, 4, 8), 2),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_projection_and_its_gradients_equal_einsum(formula, x, weight, contracted, dtype):
    """Against NumPy in float64, each of the three products by its own formula; they round once, to the type of the result."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x, weight))
    out, gradients = jax.vjp(lambda x, weight: project(x, weight, contracted), x, weight)
    cotangent = jnp.asarray(rng.normal(size=out.shape), dtype)
    left, right = (axes.split(",") for axes in formula.split("->"))
    wide = lambda array: np.asarray(array, np.float64)
    expected = {
        "out": (out, np.einsum(formula, wide(x), wide(weight))),
        "x": (gradients(cotangent)[0], np.einsum(f"{right[0]},{left[1]}->{left[0]}", wide(cotangent), wide(weight))),
        "weight": (gradients(cotangent)[1], np.einsum(f"{left[0]},{right[0]}->{left[1]}", wide(x), wide(cotangent))),
    }
    for name, (ours, theirs) in expected.items():
        assert ours.dtype == dtype, name
        tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(wide(ours), theirs, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_cpu_copies_nothing_for_the_gradient_of_a_weight():
    """A copy of an operand into another order, in which XLA computes what the operand is made of, value by value."""
    x, weight, gradient = jnp.ones((8, 256, 192)), jnp.ones((192, 512)), jnp.ones((8, 256, 512))
    by_weight = lambda x, weight, gradient: jax.vjp(lambda weight: project(jax.nn.silu(x), weight), weight)[1](gradient)
    text = jax.jit(by_weight).lower(x, weight, gradient).compile().as_text()
    assert "f32[192,2048]" not in text and "f32[2048,192]" in text


@pytest.mark.parametrize(
    "rows, inner, parts",
    [
        ((1, 1), 1024, 4), ((1, 1), 1022, 2), ((1, 1), 1021, 1), ((1, 1), 512, 2), ((1, 1), 128, 1),
        ((2, 1), 1024, 1), ((1, 2), 1024, 1),
    ],
)  # fmt: skip
def test_a_cpu_takes_one_row_in_parts_that_its_cores_multiply_side_by_side(rows, inner, parts):
    """Parts of 128 KiB at least, and of one length; none on two devices, which split the matrix themselves."""
    x, weight = jnp.ones((*rows, inner)), jnp.ones((inner, 128))
    side_by_side = re.compile(r"f32\[(\d+),1,128\]\S* dot\(.*lhs_batch_dims=\{0\}")
    products = lambda: side_by_side.findall(jax.jit(project).lower(x, weight).compile().as_text())
    assert products() == ([str(parts)] if parts > 1 else [])
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:2])):
        assert products() == []


@pytest.mark.parametrize(
    "formula, x, weight, contracted",
    [("bse,ehd->bshd", (1, 1, 256), (256, 16, 64), 1), ("bshd,hde->bse", (1, 1, 6, 86), (6, 86, 256), 2)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_in_parts_equals_einsum(formula, x, weight, contracted, dtype):
    """Of integers, whose sums are exact in float32: in bfloat16 the result alone is rounded."""
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-8, 9, shape) for shape in (x, weight))
    expected = jnp.asarray(np.einsum(formula, x, weight), dtype)
    np.testing.assert_array_equal(project(jnp.asarray(x, dtype), jnp.asarray(weight, dtype), contracted), expected)


def test_gradients_of_a_frequent_token_add_up_in_float32():
    """A sum of ones in bfloat16 would end at 256."""
    embedding = Embedding(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embedding)
    tokens = jnp.full((1, 4096), 3, jnp.int32)
    out, transpose = jax.vjp(lambda params: nnx.merge(graph, params)(tokens), params)
    np.testing.assert_array_equal(out[0, 0], embedding.embedding[...][3].astype(jnp.bfloat16))
    gradient = transpose(jnp.ones_like(out))[0]["embedding"][...]
    np.testing.assert_array_equal(gradient, 4096 * np.eye(8)[3][:, None] * np.ones(4))


def _rotation_float64(x, positions, theta, fraction):
    """Complex rotation of the pairs (x[i], x[i + half]), in float64."""
    half = x.shape[-1] // 2
    frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    frequency[round(fraction * half) :] = 0
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, :, None, None] * frequency)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("theta", "fraction"), [(1e6, 1.0), (1e6, 0.5), (1e4, 1.0)])
def test_rope_phase_float32_at_long_positions(dtype, theta, fraction):
    """At position 131,071 a float32 phase is off by at most 131071 * 2^-24 = 0.008; bfloat16 phases would be off by hundreds.

    Tolerance: that, plus the rounding of the values themselves (2^-8 of a value below 5 in bfloat16).
    """
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 4_095, 32_767, 131_071]])
    x = jnp.asarray(rng.normal(size=(1, 5, 2, 64)), dtype)
    ours = apply_rope(x, rope_phases(jnp.asarray(positions, jnp.int32), 64, RopeConfig(theta=theta, fraction=fraction)))
    expected = _rotation_float64(np.asarray(x, np.float64), positions, theta, fraction)
    assert ours.dtype == dtype
    tolerance = 0.03 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, atol=tolerance)


def test_rotation_of_bfloat16_values_rounds_once():
    positions = jnp.asarray([[0, 3, 4_095, 131_071]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 64)), jnp.bfloat16)
    phases = rope_phases(positions, 64, RopeConfig())
    np.testing.assert_array_equal(apply_rope(x, phases), apply_rope(x.astype(jnp.float32), phases).astype(jnp.bfloat16))


def test_rms_norm_is_computed_in_float32_for_bfloat16_input():
    """Squares of 300 sum to 9.2e7 over 1,024 features, where bfloat16 steps are 524,288 wide."""
    x = np.random.default_rng(0).normal(300, 1, size=(3, 1024))
    narrow = jnp.asarray(x, jnp.bfloat16)
    norm = RMSNorm(1024, 1e-5)
    norm.scale = nnx.Param(jnp.linspace(0.5, 2, 1024), axes=(None,))
    wide = np.asarray(narrow, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 1024)
    np.testing.assert_allclose(np.asarray(norm(narrow), np.float64), expected, rtol=2**-8)
