"""Every law is recovered from points made with known constants, and the searches agree with others' least squares."""

import numpy as np
import pytest
from scipy import optimize

from lfm_jax.scaling import (
    chinchilla,
    distillation,
    fitting,
    interval,
    kaplan,
    overtraining,
    points,
    precision,
    relative_errors,
    repeated_data,
    resampled,
    train_to_test,
)
from lfm_jax.scaling.chinchilla import Chinchilla

TRUE = Chinchilla(1.8, 400.0, 1500.0, 0.34, 0.36)


def grid(law=None, noise=0.0, **others):
    """48 runs of 10M to 1B parameters with 5 to 600 tokens a parameter, all pairs, with the law's loss."""
    params, multiplier = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(5, 600, 8)))
    generator = np.random.default_rng(0)
    bare = points(params, multiplier * params, 1.0, **{name: value(generator, params) for name, value in others.items()})
    loss = law.predict(bare) * np.exp(noise * generator.standard_normal(len(params)))
    fields = {name: getattr(bare, name) for name in others}
    return points(bare.params, bare.tokens, loss, **fields)


def test_huber_is_squares_near_zero_and_amounts_beyond():
    residuals = np.array([-3.0, -0.5, 0.0, 1.0, 4.0])
    value, slope = fitting.huber(residuals, 1.0)
    np.testing.assert_allclose(value, [2.5, 0.125, 0.0, 0.5, 3.5])
    np.testing.assert_allclose(slope, [-1.0, -0.5, 0.0, 1.0, 1.0])
    steps = 1e-6
    np.testing.assert_allclose((fitting.huber(residuals + steps, 1.0)[0] - value) / steps, slope, atol=1e-5)


@pytest.mark.parametrize("delta", [1e-3, np.inf])
def test_chinchilla_is_recovered(delta):
    found = chinchilla.fit(grid(TRUE), delta=delta)
    np.testing.assert_allclose(found, TRUE, rtol=1e-4)
    assert fitting.huber_objective(found, grid(TRUE)) < 1e-10


def test_alpha_and_beta_are_tied():
    tied = TRUE._replace(beta=TRUE.alpha)
    found = chinchilla.fit(grid(tied), tied=True)
    assert found.alpha == found.beta
    np.testing.assert_allclose(found, tied, rtol=1e-4)


def test_huber_forgives_points_that_least_squares_do_not():
    """Three of 48 runs are 20 % off."""
    made = grid(TRUE, noise=1e-3)
    made.loss[[5, 20, 40]] *= 1.2
    robust, squares = chinchilla.fit(made), chinchilla.fit(made, delta=np.inf)
    assert np.abs(relative_errors(robust, grid(TRUE))).max() < 2e-3 < 1e-2 < np.abs(relative_errors(squares, grid(TRUE))).max()


def test_the_fit_on_ln_l_is_that_of_scipys_least_squares():
    made = grid(TRUE, noise=0.01)
    ours = chinchilla.fit(made, delta=np.inf)
    residuals = lambda theta: np.log(chinchilla.from_theta(theta).predict(made) / made.loss)
    theirs = optimize.least_squares(residuals, chinchilla.to_theta(TRUE), xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac")
    np.testing.assert_allclose(chinchilla.to_theta(ours), theirs.x, rtol=1e-4)


def test_the_fit_on_l_is_that_of_scipys_least_squares():
    """Train-to-Test's, on noisy points, where a wrong gradient would stop elsewhere."""
    true = train_to_test.TrainToTest(0.3, 400.0, 900.0, 0.35, 0.37, 1.2, 0.4)
    made = grid(true, noise=0.02, samples=lambda generator, params: 2.0 ** generator.integers(0, 8, len(params)))
    ours = train_to_test.fit(made)
    residuals = lambda theta: train_to_test.TrainToTest(*np.exp(theta)).predict(made) - made.loss
    theirs = optimize.least_squares(residuals, np.log(true), xtol=1e-14, ftol=1e-14, gtol=1e-14, x_scale="jac")
    assert ((ours.predict(made) - made.loss) ** 2).sum() == pytest.approx(2 * theirs.cost, rel=1e-6)


def test_the_law_of_a_tasks_loss_is_that_of_scipys_weighted_curve_fit():
    """At the best of the 40 values of E, and no other is better."""
    made = grid(TRUE, noise=0.01)
    deviations = np.random.default_rng(3).uniform(0.5, 5.0, len(made))
    ours = train_to_test.fit_task_loss(made, deviations)

    def theirs(floor):
        law = lambda x, *theta: floor + np.exp(theta[0] - theta[2] * x[0]) + np.exp(theta[1] - theta[3] * x[1])
        x, start = np.log([made.params, made.tokens]), chinchilla.to_theta(TRUE)[[0, 1, 3, 4]]
        theta, _, found, *_ = optimize.curve_fit(law, x, made.loss, start, sigma=deviations, full_output=True)
        return (found["fvec"] ** 2).sum(), theta

    floors = np.linspace(0.01, 0.95, 40) * made.loss.min()
    costs, constants = zip(*map(theirs, floors), strict=True)
    best = int(np.argmin(costs))
    assert 0 < best < 39 and ours.E == pytest.approx(floors[best])
    np.testing.assert_allclose(chinchilla.to_theta(ours)[[0, 1, 3, 4]], constants[best], rtol=1e-4)
    assert train_to_test.fit_task_loss(made, np.ones(len(made))) != ours


def test_gadres_fit_is_that_of_scipys_curve_fit():
    """Which is how the authors' code fits it: five points, from a start near the minimum."""
    made = grid(overtraining.RED_PAJAMA, noise=0.01).take(np.array([0, 3, 17, 30, 45]))
    ours = overtraining.fit(made)
    law = lambda x, E, a, b, eta: overtraining.Overtraining(E, 100 * a, 100 * b, eta).loss(*x)
    start = (1.84, 2.12, 3.67, 0.136)
    theirs, _ = optimize.curve_fit(law, (made.flops, made.tokens / made.params), made.loss, start, ftol=1e-14, xtol=1e-14)
    np.testing.assert_allclose(ours, theirs * [1, 100, 100, 1], rtol=1e-4)


def test_the_error_law_is_recovered():
    loss = np.linspace(2.4, 5.5, 6)
    found = overtraining.fit_error(loss, overtraining.C4_ERROR.error(loss))
    np.testing.assert_allclose(found, overtraining.C4_ERROR, rtol=1e-5)


@pytest.mark.parametrize(
    ("law", "start", "fit", "others"),
    [
        (kaplan.Kaplan(5e13, 3e13, 0.08, 0.1), kaplan.KAPLAN, kaplan.fit, {}),
        (distillation.Supervised(1.5, 2000.0, 15000.0, 0.4, 0.42, 0.5), distillation.SUPERVISED, distillation.fit_supervised, {}),
        (distillation.DISTILLED._replace(A=2000.0, c0=2.0), distillation.DISTILLED, distillation.fit_distilled,
         {"teacher_loss": lambda generator, params: generator.uniform(1.6, 2.6, len(params))}),
        (precision.Degradation(0.1, 0.45, 0.3, 0.7), None, precision.fit_degradation,
         {"weight_bits": lambda generator, params: generator.integers(3, 8, len(params))}),
        (train_to_test.TrainToTest(0.3, 400.0, 900.0, 0.35, 0.37, 1.2, 0.4), None, train_to_test.fit,
         {"samples": lambda generator, params: 2.0 ** generator.integers(0, 8, len(params))}),
        (overtraining.C4, None, overtraining.fit, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, tuple) else "",
)  # fmt: skip
def test_laws_are_recovered(law, start, fit, others):
    """From the published constants, from random starts or from none; the fit gives the law's own type."""
    found = fit(grid(law, **others))
    assert type(found) is type(law)
    np.testing.assert_allclose(found, law, rtol=1e-3)
    assert start is None or not np.allclose(start, law, rtol=0.03)


def test_the_worth_of_repetition_is_recovered():
    true = repeated_data.RepeatedData(repeated_data.C4, 8.0, 3.0)
    unique = lambda generator, params: np.minimum(5 * params, 10 ** generator.uniform(7.5, 9.5, len(params)))
    made = grid(true, unique_tokens=unique)
    found = repeated_data.fit(made, repeated_data.C4)
    np.testing.assert_allclose((found.R_D, found.R_N), (8.0, 3.0), rtol=1e-4)
    again = repeated_data.fit(made, repeated_data.C4, near=found)
    np.testing.assert_allclose((again.R_D, again.R_N), (8.0, 3.0), rtol=1e-4)


def test_sampled_accuracy_is_recovered():
    true = train_to_test.SampledAccuracy(3.0, 1.2, 0.9, 0.5, 0.3)
    generator = np.random.default_rng(1)
    loss, samples = generator.uniform(1, 6, 60), 2.0 ** generator.integers(0, 8, 60)
    np.testing.assert_allclose(train_to_test.fit_accuracy(loss, samples, true.accuracy(loss, samples)), true, rtol=1e-4)


def test_resamples_spread_as_fits_to_new_noise_do():
    """The bootstrap's deviation of alpha against that over 40 sets of points with noise of their own."""
    starts = [chinchilla.to_theta(TRUE)]
    drawn = resampled(grid(TRUE, noise=0.01), lambda sample: chinchilla.fit(sample, delta=np.inf, starts=starts), 60, seed=1)
    clean, generator = grid(TRUE), np.random.default_rng(2)
    fresh = []
    for _ in range(60):
        noisy = points(clean.params, clean.tokens, clean.loss * np.exp(0.01 * generator.standard_normal(len(clean))))
        fresh.append(chinchilla.fit(noisy, delta=np.inf, starts=starts))
    ratio = np.std([law.alpha for law in drawn]) / np.std([law.alpha for law in fresh])
    assert 0.6 < ratio < 1.6
    low, high = interval(np.array([law.alpha for law in drawn]))
    assert low < TRUE.alpha < high


def test_resamples_are_those_of_the_seed_and_replace_what_cannot_be_fitted():
    made = points([1e6, 1e6, 2e6], [1e7, 2e7, 4e7], [3.0, 2.9, 2.8])

    def fit(sample):
        chinchilla.need_spread(sample, 2)
        return sorted(sample.loss.tolist())

    generator, expected = np.random.RandomState(3), []
    while len(expected) < 5:
        which = generator.choice(3, 3, replace=True)
        if len({made.params[i] for i in which}) > 1 and len({made.tokens[i] for i in which}) > 1:
            expected.append(sorted(made.loss[which].tolist()))
    assert resampled(made, fit, 5, seed=3) == expected
    with pytest.raises(ValueError, match="all points have params = 1e\\+06"):
        resampled(made.take(np.array([0, 1])), fit, 5, seed=3)


def test_an_interval_leaves_out_as_much_on_either_side():
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))


def test_errors_on_points_that_were_not_fitted_have_their_sign():
    made = points([1e8, 1e9], 2e10, [float(TRUE.loss(1e8, 2e10)) / 1.1, float(TRUE.loss(1e9, 2e10)) / 0.8])
    np.testing.assert_allclose(relative_errors(TRUE, made), [0.1, -0.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chinchilla.fit(grid(TRUE).take(np.arange(4))), "5 constants need at least as many points, got 4"),
        (lambda: chinchilla.fit(points(1e6, np.geomspace(1e7, 1e9, 6), 3.0)), "all points have params = 1e\\+06: the law's dep"),
        (lambda: overtraining.fit(points(np.geomspace(1e6, 1e8, 6), 1e9, 3.0)), "all points have tokens = 1e\\+09"),
        (lambda: overtraining.fit_error([2.0, 3.0], [0.5, 0.6]), "three constants and needs as many models, got 2"),
        (lambda: repeated_data.fit(grid(TRUE), TRUE), "only to points with unique_tokens below tokens"),
        (lambda: train_to_test.fit(grid(TRUE)), "only to points with different numbers of samples"),
        (lambda: train_to_test.fit_task_loss(grid(TRUE), np.zeros(48)), "one has a deviation of 0"),
        (lambda: train_to_test.fit_accuracy([1.0], [1], [0.5]), "five constants and needs as many runs, got 1"),
        (lambda: distillation.fit_distilled(grid(TRUE)), "points with teacher_loss, and these have none"),
        (lambda: precision.fit_degradation(grid(TRUE)), "points with weight_bits, and these have none"),
        (lambda: chinchilla.fit(grid(TRUE), starts=[np.full(5, np.nan)]), "comes to no finite value from any start"),
    ],
)
def test_points_that_cannot_determine_a_law_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
