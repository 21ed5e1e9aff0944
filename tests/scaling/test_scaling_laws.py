"""The laws against published values, closed forms and brute force."""

import numpy as np
import pytest
from scipy import special

from lfm_jax.scaling import (
    chinchilla,
    distillation,
    inference_aware,
    kaplan,
    overtraining,
    points,
    porian,
    precision,
    repeated_data,
)
from lfm_jax.scaling.chinchilla import BESIROGLU, HOFFMANN, HOFFMANN_ROUNDED
from lfm_jax.scaling.train_to_test import SampledAccuracy, TrainToTest, task_loss


def test_the_optimum_is_the_least_loss_at_a_budget():
    """By brute force over N, and its tokens are those for which N is optimal."""
    for law in (BESIROGLU, HOFFMANN):
        params, tokens = law.optimum(1e22)
        assert 6 * params * tokens == pytest.approx(1e22)
        sizes = params * np.geomspace(0.5, 2, 20001)
        best = sizes[np.argmin(law.loss(sizes, 1e22 / (6 * sizes)))]
        assert best == pytest.approx(params, rel=1e-3)
        assert law.optimal_tokens(params) == pytest.approx(tokens)
        assert law.tokens_for(float(law.loss(params, tokens)), params) == pytest.approx(tokens)
    assert np.isinf(BESIROGLU.tokens_for(1.9, 1e8))


@pytest.mark.parametrize(
    ("law", "published"),
    [
        (BESIROGLU, (21.53, 20.32, 19.17, 18.08, 17.06)),
        (HOFFMANN, (33.9, 41.4, 50.6, 61.8, 75.5)),
        (HOFFMANN_ROUNDED, (50.1, 62.6, 78.2, 97.7, 122.1)),
    ],
)
def test_tokens_per_parameter(law, published):
    """At 1e21 to 1e25 FLOPs: rounding Hoffmann's constants moves it by half."""
    np.testing.assert_allclose(law.tokens_per_parameter(np.geomspace(1e21, 1e25, 5)), published, rtol=3e-3)


def test_chinchillas_own_ratio_is_18_and_not_25():
    """The notebook of Besiroglu et al. prints 25.66, from an index into the wrong array."""
    assert BESIROGLU.tokens_per_parameter(5.88e23) == pytest.approx(18.33, abs=0.01)


def test_a_law_broadcasts_and_its_loss_at_350m_is_known():
    losses = BESIROGLU.loss(350e6, np.array([7e9, 1e12, 10e12, 28e12]))
    np.testing.assert_allclose(losses, [2.8529, 2.4162, 2.3679, 2.3564], atol=2e-4)
    assert BESIROGLU.loss(np.ones((2, 1)), np.ones(3)).shape == (2, 3)


def test_kaplans_joint_law_has_the_two_single_laws_as_limits():
    law = kaplan.KAPLAN
    assert law.loss(1e9, 1e30) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert law.loss(1e30, 1e10) == pytest.approx((5.4e13 / 1e10) ** 0.095)
    assert kaplan.compute_loss(3.1e8 * 8.64e19) == pytest.approx(1)
    assert kaplan.compute_loss(1e21) / kaplan.compute_loss(1e22) == pytest.approx(10**0.05)
    assert sum(kaplan.OPTIMAL_EXPONENTS) == pytest.approx(1)


def test_porians_tuned_optimum_has_the_published_ratio():
    for law, ratio in ((porian.REFINED_WEB, 16.5), (porian.OPEN_WEB_TEXT, 10.0)):
        params, tokens = law.optimum(5.88e23)
        assert tokens / params == pytest.approx(ratio) and 6 * params * tokens == pytest.approx(5.88e23)
    params, _ = porian.REFINED_WEB.optimum(np.array([5.88e23, 5.88e24]))
    assert params[1] / params[0] == pytest.approx(10**0.4969)
    assert porian.warmup_tokens(1e8) == 1e8


def test_leaving_out_the_head_raises_the_exponent():
    """The bias that Porian et al. found, on a law with the true exponent 0.5, head and all: FLOPs and N without the head."""
    law = chinchilla.Chinchilla(1.7, 400.0, 1500.0, 0.35, 0.35)
    width = np.geomspace(96, 1536, 9)
    body, head = 12 * 8 * width**2, 32000 * width
    flops = np.geomspace(1e17, 1e19, 5)
    sizes = np.linspace(0, np.log(16), 4000)
    body_of, head_of = (np.interp(sizes, np.log(width / 96), values) for values in (body, head))
    best = []
    for budget in flops:
        tokens = budget / porian.training_flops(body_of, 0.0, 1.0)  # the head's FLOPs forgotten
        best.append(body_of[np.argmin(law.loss(body_of + head_of, tokens))])
    exponent = np.polyfit(np.log(flops), np.log(best), 1)[0]
    assert exponent > 0.6 and law.exponent == 0.5
    assert porian.training_flops(3e6, 1e6, 1e8) == 6 * 4e6 * 1e8
    assert [step.refined_web[0] for step in porian.STEPS] == sorted((step.refined_web[0] for step in porian.STEPS), reverse=True)


@pytest.mark.parametrize(
    ("law", "multiplier"), [(overtraining.C4, 3.36), (overtraining.RED_PAJAMA, 7.42), (overtraining.REFINED_WEB, 5.85)]
)
def test_gadres_law_is_chinchillas_with_one_exponent(law, multiplier):
    """Table 6 is rounded to three digits, appendix F's M* is not."""
    params, tokens = 4e8, np.geomspace(2e9, 2.5e11, 5)
    np.testing.assert_allclose(law.loss(6 * params * tokens, tokens / params), law.as_chinchilla().loss(params, tokens))
    assert law.optimal_multiplier == pytest.approx(multiplier, rel=0.03)
    many = np.geomspace(1, 640, 100001)
    assert many[np.argmin(law.loss(1e20, many))] == pytest.approx(law.optimal_multiplier, rel=1e-3)
    assert law.as_chinchilla().tokens_per_parameter(1e20) == pytest.approx(law.optimal_multiplier)


def test_repeated_tokens_are_worth_what_muennighoff_et_al_say():
    law = repeated_data.MUENNIGHOFF
    np.testing.assert_allclose(law.effective_tokens([1, 4, 16, 40, 1e9], 1.0), [1, 3.73, 10.6, 15.2, 16.4], rtol=3e-3)
    assert law.law.A == pytest.approx(520.825, abs=1e-3) and law.law.B == pytest.approx(1487.716, abs=1e-3)
    assert law.law.E == pytest.approx(1.869144, abs=1e-6)
    assert law.law.tokens_per_parameter(1e22) == pytest.approx(19.613, abs=1e-3)
    costs = [law.loss(350e6, 28e12, unique) - law.loss(350e6, 28e12, 28e12) for unique in (7e12, 3e12)]
    np.testing.assert_allclose(costs, [0.0007, 0.0023], atol=1e-4)


def test_a_single_epoch_of_no_more_parameters_than_called_for_is_chinchilla():
    law = repeated_data.MUENNIGHOFF
    assert law.loss(1e8, 1e11, 1e11) == pytest.approx(law.law.loss(1e8, 1e11))
    params, tokens = law.law.optimum(1e21)
    assert law.effective_params(10 * params, tokens) == pytest.approx(params * (1 + law.R_N * (1 - np.exp(-9 / law.R_N))))


@pytest.mark.parametrize(
    ("params", "demand", "size", "factor", "saved"), [(30e9, 1e13, 13.6e9, 2.84, 0.28), (13e9, 2e12, 7e9, None, 0.17)]
)
def test_sardanas_examples(params, demand, size, factor, saved):
    law = inference_aware.SARDANA
    budget = inference_aware.cheapest(law, inference_aware.compute_optimal_loss(law, params), demand)
    assert budget.params == pytest.approx(size, rel=6e-3)
    assert factor is None or budget.tokens / law.optimal_tokens(params) == pytest.approx(factor, abs=0.006)
    assert inference_aware.saving(law, params, demand) == pytest.approx(saved, abs=0.005)


def test_the_cheapest_model_is_that_of_brute_force():
    loss, demand = float(BESIROGLU.loss(350e6, 28e12)), 1e15
    budget = inference_aware.cheapest(BESIROGLU, loss, demand)
    assert BESIROGLU.loss(budget.params, budget.tokens) == pytest.approx(loss)
    assert budget.tokens / budget.params == pytest.approx(57_500, rel=2e-3)
    sizes = budget.params * np.geomspace(0.99, 1.5, 100001)
    costs = sizes * (6 * BESIROGLU.tokens_for(loss, sizes) + 2 * demand)
    assert budget.cost == pytest.approx(np.nanmin(costs), rel=1e-6)
    assert sizes[np.nanargmin(costs)] == pytest.approx(budget.params, rel=1e-4)


def test_without_demand_the_cheapest_model_is_chinchillas_and_prices_count():
    params, tokens = BESIROGLU.optimum(1e22)
    loss = float(BESIROGLU.loss(params, tokens))
    plain = inference_aware.cheapest(BESIROGLU, loss, 0.0)
    assert (plain.params, plain.tokens, plain.cost) == pytest.approx((params, tokens, 1e22), rel=1e-4)
    assert inference_aware.saving(BESIROGLU, params, 0.0) == pytest.approx(0, abs=1e-6)
    cheap = inference_aware.cheapest(BESIROGLU, loss, 1e12, inference_price=0.2)
    dear = inference_aware.cheapest(BESIROGLU, loss, 1e12, inference_price=20.0)
    assert dear.params < cheap.params < params
    twice = inference_aware.cheapest(BESIROGLU, loss, 1e12, training_price=12.0, inference_price=40.0)
    assert twice.params == pytest.approx(dear.params, rel=1e-6) and twice.cost == pytest.approx(2 * dear.cost)
    with pytest.raises(ValueError, match="no model reaches a loss of 1.8000: the law's E is 1.8169"):
        inference_aware.cheapest(BESIROGLU, 1.8, 1e12)


def test_more_samples_from_a_smaller_model():
    law = TrainToTest(0.3, 400.0, 900.0, 0.35, 0.37, 1.2, 0.4)
    assert law.loss(1e8, 1e10, 1) == pytest.approx(chinchilla.Chinchilla(1.5, 400.0, 900.0, 0.35, 0.37).loss(1e8, 1e10))
    params, tokens, samples = law.optimum(2.56e19, 2e9)
    assert 6 * params * tokens == pytest.approx(2.56e19) and 2 * params * samples == pytest.approx(2e9)
    sizes = np.geomspace(1e6, 1e9, 200001)
    losses = law.loss(sizes, 2.56e19 / (6 * sizes), 2e9 / (2 * sizes))
    assert sizes[losses.argmin()] == pytest.approx(params, rel=1e-3)
    plain = chinchilla.Chinchilla(*law[:5]).optimum(2.56e19)[0]
    assert params < plain
    assert law._replace(G=1e-12).optimum(2.56e19, 1e12)[0] == pytest.approx(plain, rel=1e-3)


def test_pass_at_k_is_the_expectation_over_a_beta_distribution():
    """By numerical integration, and at k = 1 the mean; and the task's loss by its definition."""
    law = SampledAccuracy(3.0, 1.2, 0.9, 0.5, 0.3)
    loss = 2.5
    mean, strength = 0.9 / (1 + np.exp(1.2 * (loss - 3.0))), np.exp(0.5 + 0.3 * loss)
    assert law.accuracy(loss, 1) == pytest.approx(mean)
    edges = np.linspace(0, 1, 200001)
    weights = np.diff(special.betainc(mean * strength, (1 - mean) * strength, edges))
    chances = (edges[1:] + edges[:-1]) / 2
    for samples in (1, 4, 64):
        assert law.accuracy(loss, samples) == pytest.approx((weights * (1 - (1 - chances) ** samples)).sum(), abs=1e-5)
    assert task_loss([0.5, 0.25], 1) == pytest.approx((np.log(2) + np.log(4)) / 2)
    assert task_loss([0.5, 0.25], 2) == pytest.approx(-(np.log(0.75) + np.log(1 - 0.75**2)) / 2)
    assert task_loss([1e-9], 10) == pytest.approx(-np.log(1e-8), rel=1e-6)


@pytest.mark.parametrize(
    ("params", "tokens", "supervised", "teacher", "student"),
    [
        (1e9, 2e10, 2.3747, 1.723, 2.2523),
        (300e6, 6e9, 2.6705, 1.833, 2.4589),
        (300e6, 1e12, 2.3417, 2.158, 2.3319),
        (350e6, 28e12, 2.2746, 2.122, 2.2755),
    ],
)
def test_busbridges_law(params, tokens, supervised, teacher, student):
    """Values computed apart from this code from the constants of Table 6."""
    assert distillation.SUPERVISED.loss(params, tokens) == pytest.approx(supervised, abs=6e-5)
    best, loss = distillation.DISTILLED.best_teacher(params, tokens)
    assert (best, loss) == pytest.approx((teacher, student), abs=1e-3)
    losses = distillation.DISTILLED.loss(best * np.array([0.98, 1.0, 1.02]), params, tokens)
    assert losses.argmin() == 1 and losses[1] == pytest.approx(loss)
    reached = distillation.SUPERVISED.tokens_for(supervised, params)
    assert distillation.SUPERVISED.loss(params, reached) == pytest.approx(supervised)


def test_a_teacher_can_be_too_good_and_its_forward_passes_count():
    assert distillation.DISTILLED.loss(1.9, 350e6, 28e12) == pytest.approx(2.319, abs=1e-3)
    assert np.isinf(distillation.SUPERVISED.tokens_for(1.3, 1e6))
    assert distillation.training_flops(2.0, 10.0, 5.0, logits=False) == 60
    assert distillation.training_flops(2.0, 10.0, 5.0, logits=True, pretraining_tokens=7.0) == 60 + 50 + 105


def test_rounding_costs_more_the_more_tokens_a_model_has_seen():
    law = precision.KUMAR
    costs = [law.degradation(350e6, 28e12, bits) for bits in (4, 5, 6, 8)]
    np.testing.assert_allclose(costs, [0.5, 0.09, 0.02, 6e-4], rtol=0.15)
    assert law.degradation(350e6, 28e12, 4) / law.degradation(350e6, 7e9, 4) == pytest.approx(67, abs=0.5)
    halved = law.effective_params(1e8, weight_bits=law.gamma_weights * np.log(2), activation_bits=1e3, cache_bits=1e3)
    assert halved == pytest.approx(5e7)
    product = (1 - np.exp(-4 / 2.6745)) * (1 - np.exp(-8 / 2.2102)) * (1 - np.exp(-16 / 0.9578))
    assert law.effective_params(1e8, weight_bits=4, activation_bits=8) == pytest.approx(1e8 * product)
    assert law.loss(1e8, 1e10, weight_bits=4) > law.loss(1e8, 1e10) > law.E
    assert precision.training_flops(1e8, 1e10, 16) == 6e18 and precision.training_flops(1e8, 1e10, 8) == 3e18


def test_kumars_loss_after_rounding_is_the_loss_and_its_cost():
    law = precision.KUMAR
    bare, rounded = points(1e8, 1e10, 3.0), points(1e8, 1e10, 3.0, weight_bits=4)
    assert law.predict(rounded)[0] == pytest.approx(law.predict(bare)[0] + law.degradation(1e8, 1e10, 4))
