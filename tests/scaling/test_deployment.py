"""Demand, break-even and devices: against brute force, the search of Sardana et al., published examples and closed forms."""

import numpy as np
import pytest

from lfm_jax.scaling import inference_aware, overtraining
from lfm_jax.scaling.chinchilla import BESIROGLU, HOFFMANN, Chinchilla
from lfm_jax.scaling.deployment import (
    FLOPS,
    Device,
    Prices,
    break_even,
    implied_demand,
    least_flops,
    same_gain_params,
    tokens_for_demand,
)

# The Huber minimum of Chinchilla's points (docs/scaling_laws.md).
HUBER = Chinchilla(1.817218, 477.826, 2143.417, 0.347310, 0.367172)
LAWS = (HUBER, HOFFMANN, overtraining.RED_PAJAMA.as_chinchilla())
DEARER_INFERENCE = Prices(1.9e-11, 5.6e-11)


@pytest.mark.parametrize("law", LAWS)
def test_least_flops_are_those_of_the_search_and_of_the_optimum(law):
    for loss in (law.E + 0.2, law.E + 0.6, 3.0):
        assert least_flops(law, loss) == pytest.approx(inference_aware.cheapest(law, loss, 0).cost, rel=1e-6)
        assert law.loss(*law.optimum(least_flops(law, loss))) == pytest.approx(loss, rel=1e-12)
    assert np.isinf(least_flops(law, law.E)) and np.isinf(least_flops(law, law.E - 0.1))


@pytest.mark.parametrize("prices", [FLOPS, DEARER_INFERENCE])
@pytest.mark.parametrize("law", LAWS)
def test_at_its_demand_a_budget_is_the_cheapest_of_its_loss(law, prices):
    """By brute force: of 20,001 sizes, each with the tokens that the same loss takes, none costs less."""
    params, tokens = 350e6, 2e12
    demand = implied_demand(law, params, tokens, prices)
    sizes = params * np.geomspace(0.9, 1.1, 20001)
    needed = law.tokens_for(float(law.loss(params, tokens)), sizes)
    cost = sizes * (prices.training * needed + prices.inference * demand)
    assert sizes[np.argmin(cost)] == pytest.approx(params, rel=1e-4)
    assert tokens_for_demand(law, params, demand, prices) == pytest.approx(tokens, rel=1e-10)


def test_the_search_ends_where_the_formula_says():
    for demand in (1e12, 1e14, 1e16):
        params, tokens, _ = inference_aware.cheapest(BESIROGLU, 2.4, demand)
        assert implied_demand(BESIROGLU, params, tokens) == pytest.approx(demand, rel=2e-3)


def test_without_demand_the_tokens_are_the_compute_optimal_ones():
    sizes = np.array([1e8, 1e9, 1e10])
    np.testing.assert_allclose(tokens_for_demand(HUBER, sizes, 0.0), HUBER.optimal_tokens(sizes), rtol=1e-10)
    np.testing.assert_allclose(implied_demand(HUBER, sizes, HUBER.optimal_tokens(sizes)), 0, atol=1)
    assert implied_demand(HUBER, 1e9, HUBER.optimal_tokens(1e9) / 2) < 0


def test_constants_may_be_arrays():
    """As resamples are: each is what it would be alone, at demands from none to far too much."""
    draws = Chinchilla(*np.array(LAWS).T)
    for demand in (0.0, 1e10, 1e15, 1e20):
        alone = [float(tokens_for_demand(law, 350e6, demand)) for law in LAWS]
        np.testing.assert_allclose(tokens_for_demand(draws, 350e6, demand), alone, rtol=1e-10)
        np.testing.assert_allclose(implied_demand(draws, 350e6, np.array(alone)), demand, rtol=1e-6, atol=1)


def test_sardanas_example_backwards():
    """Published: 13.6B parameters on 2.84 times the tokens of a 30B Chinchilla model are the cheapest at 1e13 served tokens."""
    law = inference_aware.SARDANA
    found = float(tokens_for_demand(law, 13.613e9, 1e13))
    assert found / float(law.optimal_tokens(30e9)) == pytest.approx(2.84, abs=0.01)
    assert law.loss(13.613e9, found) == pytest.approx(inference_aware.compute_optimal_loss(law, 30e9), abs=1e-4)


def test_what_the_laws_say_of_350m_on_28t_tokens():
    """Figures that were computed apart from this code."""
    params, tokens = 350e6, 28e12
    losses = HUBER.loss(params, np.array([7e9, 1e12, 10e12, tokens, np.inf]))
    np.testing.assert_allclose(losses, (2.8526, 2.4164, 2.3684, 2.3570, 2.3322), atol=6e-5)
    flops = least_flops(HUBER, losses[3])
    larger, fewer = HUBER.optimum(flops)
    assert (larger, fewer, flops) == pytest.approx((2.08e9, 45.2e9, 5.6e20), rel=7e-3)
    assert 6 * params * tokens / flops == pytest.approx(104, abs=0.5)
    assert larger / params == pytest.approx(5.9, abs=0.05)
    assert break_even(params, tokens, larger, fewer) == pytest.approx(1.7e13, rel=0.02)
    assert implied_demand(HUBER, params, tokens) == pytest.approx(1.6e15, rel=0.03)
    searched = {demand: inference_aware.cheapest(HUBER, float(losses[3]), demand) for demand in (1e13, 1e14, 1e15, 1.5e15, 2e15)}
    multipliers = [found.tokens / found.params for found in searched.values()]
    assert multipliers == pytest.approx((1700, 10_000, 57_000, 77_400, 95_900), rel=0.03)
    assert searched[1e15].params == pytest.approx(356e6, rel=2e-3)
    for law, gain in ((overtraining.C4, 0.024), (overtraining.RED_PAJAMA, 0.020), (overtraining.REFINED_WEB, 0.022)):
        law = law.as_chinchilla()
        assert law.data_term(10e12) - law.data_term(28e12) == pytest.approx(gain, abs=6e-4)


@pytest.mark.parametrize("prices", [FLOPS, DEARER_INFERENCE])
def test_at_break_even_both_have_cost_the_same(prices):
    demand = float(break_even(1e9, 1e12, 3e9, 6e10, prices))
    cost = lambda params, tokens, served: params * (prices.training * tokens + prices.inference * served)
    assert cost(1e9, 1e12, demand) == pytest.approx(cost(3e9, 6e10, demand))
    assert cost(1e9, 1e12, 1.01 * demand) < cost(3e9, 6e10, 1.01 * demand)
    assert cost(1e9, 1e12, 0.99 * demand) > cost(3e9, 6e10, 0.99 * demand)
    assert break_even(1e9, 1e10, 3e9, 6e10) < 0


def test_a_larger_model_that_is_not_larger_is_refused():
    with pytest.raises(ValueError, match=r"the larger model must have more parameters than 1e\+09, got 5e\+08"):
        break_even(1e9, 1e12, np.array([2e9, 5e8]), 1e11)


def test_the_same_gain_from_parameters():
    for params, tokens in ((350e6, 1e12), (2.6e9, 27e12)):
        grown = params * (1 + same_gain_params(HUBER, params, tokens, 1e12))
        assert HUBER.loss(grown, tokens) == pytest.approx(HUBER.loss(params, tokens + 1e12), rel=1e-12)


def test_a_device():
    """7B parameters of 8 bits at 0.7 J a token (MobileLLM): 50 kJ last for less than two hours of 10 tokens a second."""
    device = Device(bytes_per_second=38e9, joules_per_byte=1e-10)
    assert device.joules(7e9) == pytest.approx(0.7)
    assert 50e3 / device.joules(7e9) / 10 / 3600 == pytest.approx(1.98, abs=0.01)
    assert 1 / device.seconds(380e6) == pytest.approx(100)
