"""Schedules against optax's and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfm_jax.training.schedule import ScheduleConfig, make_schedule

STEPS, PEAK = 60, 3e-3


def _rates(steps=STEPS, **settings):
    schedule = jax.jit(make_schedule(ScheduleConfig(**settings), PEAK, steps))
    return np.asarray([schedule(jnp.int32(step)) for step in range(steps)])


def _close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 1, 17])
def test_cosine_equals_optax(warmup):
    theirs = optax.warmup_cosine_decay_schedule(PEAK / (warmup + 1), PEAK, warmup, STEPS, 0.1 * PEAK)
    _close(_rates(kind="cosine", warmup_steps=warmup, final_ratio=0.1), [theirs(step) for step in range(STEPS)])


def test_linear_decay_equals_optax():
    theirs = optax.join_schedules(
        [
            optax.linear_schedule(PEAK / 11, PEAK, 10),
            optax.constant_schedule(PEAK),
            optax.linear_schedule(PEAK, 0.2 * PEAK, 15),
        ],
        [10, 45],
    )
    ours = _rates(kind="wsd", warmup_steps=10, decay_share=0.25, decay_shape="linear", final_ratio=0.2)
    _close(ours, [theirs(step) for step in range(STEPS)])


def test_square_root_decay_by_its_formula():
    """Hägele et al. 2024, equation 1, with N = 60 steps, 12 of decay and a final rate of 5 %."""
    expected = [PEAK if n < 48 else PEAK * (0.05 + 0.95 * (1 - ((n - 48) / 12) ** 0.5)) for n in range(STEPS)]
    _close(_rates(decay_share=0.2, final_ratio=0.05), expected)


def test_no_update_has_a_rate_of_zero_and_the_peak_is_reached():
    for settings in ({"kind": "cosine"}, {"decay_shape": "linear"}, {"decay_shape": "sqrt"}):
        rates = _rates(warmup_steps=20, **settings)
        assert np.all(rates > 0) and rates.max() == pytest.approx(PEAK) and rates.argmax() == 20


def test_without_decay_the_peak_is_held():
    _close(_rates(decay_share=0.0), np.full(STEPS, PEAK))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"decay_share": 1.5}, "decay_share must be between 0 and 1, got 1.5"),
        ({"final_ratio": -0.1}, "final_ratio must be between 0 and 1, got -0.1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup_steps": 50, "decay_share": 0.2}, "a warm-up of 50 and a decay of 12 steps do not fit into 60 steps; lower"),
        ({"warmup_steps": 61, "kind": "cosine"}, "a warm-up of 61 and a decay of 0 steps do not fit into 60 steps; lower"),
    ],
)
def test_a_warmup_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(ScheduleConfig(**settings), PEAK, STEPS)
