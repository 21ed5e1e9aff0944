"""Chinchilla's points: the minimum of Huber's function, the least absolute fit, standard errors and the optimum's intervals."""

from typing import Any

import numpy as np

from experiments.scaling_fit.parity import row
from lfm_jax.scaling import Points, chinchilla, compute_optimal, huber_objective, interval, relative_errors, resampled
from lfm_jax.scaling.chinchilla import BESIROGLU, HOFFMANN, Chinchilla

# What the grid of L-BFGS in the notebook of Besiroglu et al. comes to on the 240 points, and the objective there.
_HUBER = Chinchilla(1.817236, 477.842, 2143.864, 0.347313, 0.367183)
_HUBER_OBJECTIVE = 1.018274035e-3
# Of the notebook, in the order of the constants, and of a = beta / (alpha + beta).
_STANDARD_ERRORS = Chinchilla(0.02566, 124.522, 1293.284, 0.01540, 0.02060)
_EXPONENT_STANDARD_ERROR = 0.020
FLOPS = (1e21, 1e22, 1e23, 1e24, 1e25)
_ISOFLOP_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
_HELD_OUT_SHARE = 0.2
_NORMAL_DRAWS = 20000


def study(every: Points, points: Points, resamples: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]], Chinchilla]:
    """(figures, rows of the parity table, the law at the minimum) from all 245 points and the 240 that are fitted."""
    law = chinchilla.fit(points)
    least_absolute = chinchilla.fit_least_absolute(points, law)
    drawn = resampled(points, lambda sample: chinchilla.fit(sample, starts=[chinchilla.to_theta(HOFFMANN)]), resamples, seed)
    huber_name, absolute_name = "Chinchilla, Huber minimum", "Chinchilla, least absolute residuals (Besiroglu et al. 2024)"
    rows = [
        *(row(huber_name, key, getattr(law, key), getattr(_HUBER, key)) for key in law._fields),
        row(huber_name, "objective", huber_objective(law, points), _HUBER_OBJECTIVE),
        *(row(absolute_name, key, getattr(least_absolute, key), getattr(BESIROGLU, key)) for key in law._fields),
    ]
    deviations = np.std(np.array(drawn), axis=0)
    name = f"Chinchilla, standard error of {resamples} resamples"
    rows += [row(name, key, *pair) for key, *pair in zip(law._fields, deviations, _STANDARD_ERRORS, strict=True)]
    rows.append(row(name, "a", np.std([each.exponent for each in drawn]), _EXPONENT_STANDARD_ERROR))
    rows += [
        row("Chinchilla, least absolute residuals (Besiroglu et al. 2024)", f"tokens a parameter at {flops:g} FLOPs",
            least_absolute.tokens_per_parameter(flops), float(BESIROGLU.tokens_per_parameter(flops)), printed=False)
        for flops in FLOPS
    ]  # fmt: skip
    minima = compute_optimal.isoflop(points, np.array(_ISOFLOP_BUDGETS), width=1.2)
    rows.append(row("Chinchilla, approach 2 (Hoffmann et al. 2022)", "a", minima.power_law().exponent, 0.49))
    held_out = points.flops > np.quantile(points.flops, 1 - _HELD_OUT_SHARE)
    errors = relative_errors(chinchilla.fit(points.take(~held_out)), points.take(held_out))
    figures = {
        "chinchilla_all_points": {**chinchilla.fit(every)._asdict(), "points": len(every)},
        "chinchilla_a": law.exponent,
        "chinchilla_a_interval": interval(np.array([each.exponent for each in drawn])),
        "chinchilla_objective_published_constants": huber_objective(BESIROGLU, points),
        "chinchilla_held_out_points": int(held_out.sum()),
        "chinchilla_held_out_error_share": float(np.abs(errors).mean()),
        "chinchilla_fitted_error_share": float(np.abs(relative_errors(law, points)).mean()),
        "tokens_per_parameter": _optima(law, drawn, seed),
    }
    return figures, rows, law


def _optima(law: Chinchilla, drawn: list[Chinchilla], seed: int) -> list[dict[str, Any]]:
    """Tokens per parameter by budget: the minimum's, the published constants', the resamples', and the normal interval.

    The last is the published way: normal draws around the published constants with the resamples' covariance. A and B vary too
    much for that in themselves, so it is of their logarithms.
    """
    thetas = np.array([chinchilla.to_theta(each) for each in drawn])
    normal = np.random.RandomState(seed).multivariate_normal(chinchilla.to_theta(BESIROGLU), np.cov(thetas.T), _NORMAL_DRAWS)
    normal_law = Chinchilla(*np.exp(normal[:, [2, 0, 1]]).T, *normal[:, 3:].T)
    columns = Chinchilla(*np.array(drawn).T)
    optima = []
    for flops in FLOPS:
        values = columns.tokens_per_parameter(flops)
        low, high = interval(values)
        normal_low, normal_high = interval(normal_law.tokens_per_parameter(flops))
        optima.append(
            {
                "flops": flops, "huber_minimum": law.tokens_per_parameter(flops),
                "published_constants": BESIROGLU.tokens_per_parameter(flops),
                "hoffmann": HOFFMANN.tokens_per_parameter(flops),
                "median": float(np.median(values)), "low_95": low, "high_95": high,
                "normal_low_95": normal_low, "normal_high_95": normal_high,
                "optimal_params": law.optimum(flops)[0],
            }
        )  # fmt: skip
    return optima
