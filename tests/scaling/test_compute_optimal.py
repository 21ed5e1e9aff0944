"""Approaches 1 and 2 find the optimum of a law that they do not know."""

import numpy as np
import pytest

from lfm_jax.scaling import points
from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.compute_optimal import Minima, PowerOptimum, envelope, isoflop

LAW = Chinchilla(1.7, 400.0, 1500.0, 0.34, 0.38)
BUDGETS = np.geomspace(1e18, 1e20, 5)


def columns(factors):
    """Runs of each budget, of sizes that are these factors of the optimum."""
    flops, factor = (axis.ravel() for axis in np.meshgrid(BUDGETS, factors))
    params = factor * LAW.optimum(flops)[0]
    tokens = flops / (6 * params)
    return points(params, tokens, LAW.loss(params, tokens))


def test_the_parabolas_minimum_is_the_optimum():
    minima = isoflop(columns(np.geomspace(0.5, 2, 7)), BUDGETS)
    np.testing.assert_allclose(minima.params, LAW.optimum(BUDGETS)[0], rtol=0.02)
    np.testing.assert_allclose(minima.loss, LAW.loss(*LAW.optimum(BUDGETS)), rtol=1e-3)
    power = minima.power_law()
    assert power.exponent == pytest.approx(LAW.exponent, abs=0.003)
    params, tokens = power.optimum(1e21)
    assert params == pytest.approx(LAW.optimum(1e21)[0], rel=0.03) and 6 * params * tokens == pytest.approx(1e21)


def test_runs_near_a_budget_count_to_it():
    made = columns((0.5, 1.0, 2.0))
    near = points(made.params, made.tokens * 1.05, LAW.loss(made.params, made.tokens * 1.05))
    assert len(isoflop(near, BUDGETS, width=1.1).params) == len(BUDGETS)
    with pytest.raises(ValueError, match="the budget of 1e\\+18 FLOPs has 0 sizes; a parabola needs three"):
        isoflop(near, BUDGETS, width=1.01)


def test_a_budget_without_a_minimum_among_its_sizes_is_refused():
    with pytest.raises(ValueError, match="the runs of 1e\\+18 FLOPs have no minimum between .* run sizes on both sides"):
        isoflop(columns((2.0, 3.0, 4.0)), BUDGETS)
    made = columns((0.5, 1.0, 2.0))
    with pytest.raises(ValueError, match="have no minimum between"):
        isoflop(points(made.params, made.tokens, 9 - made.loss), BUDGETS)  # a maximum


def test_the_envelope_of_training_curves_grows_as_the_optimum_does():
    sizes = np.geomspace(1e7, 1e9, 41)
    params, tokens = (axis.ravel() for axis in np.meshgrid(sizes, np.geomspace(1e8, 1e12, 200)))
    minima = envelope(points(params, tokens, LAW.loss(params, tokens)))
    expected = LAW.optimum(minima.flops)[0]
    assert np.abs(np.log(minima.params / expected)).max() < 0.09  # sizes are 12 % apart
    assert minima.power_law().exponent == pytest.approx(LAW.exponent, abs=0.01)
    assert set(minima.params) < set(sizes[1:-1])


def test_curves_that_do_not_cross_have_no_envelope():
    tokens = np.geomspace(1e8, 1e10, 20)
    with pytest.raises(ValueError, match="of 1 sizes none is best between others"):
        envelope(points(1e7, tokens, LAW.loss(1e7, tokens)))


def test_a_power_law_goes_through_its_points():
    minima = Minima(np.array([1e18, 1e20]), np.array([1e7, 1e8]), np.ones(2))
    assert minima.power_law() == pytest.approx(PowerOptimum(10**7.5, 1e19, 0.5))
    with pytest.raises(ValueError, match="at least two budgets, got 1"):
        Minima(np.array([1e18]), np.array([1e7]), np.ones(1)).power_law()
