"""Norm and rotation against closed forms in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.models.config import RopeConfig
from lfm_jax.models.layers import RMSNorm, apply_rope, rope_phases


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
