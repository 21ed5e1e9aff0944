"""The laws fitted to a sweep of one's own: constants with intervals, the error on points held out, and the optimum."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lfm_jax.scaling import Law, Points, chinchilla, interval, kaplan, overtraining, relative_errors, repeated_data, resampled
from lfm_jax.scaling import train_to_test as test_time

# From points, and a law near which to search or None.
Fit = Callable[[Points, Any], Law]
_ONCE = 1.001  # fewer tokens than this many times the unique ones are not repeated


def applicable(points: Points) -> dict[str, Fit]:
    """How to fit each law whose variables the points have: the laws of samples, of repetition, or of N and D alone."""
    if points.samples is not None and np.ptp(points.samples) > 0:
        return {"train_to_test": lambda sample, near: test_time.fit(sample, near=near)}
    if points.unique_tokens is not None and (points.tokens > _ONCE * points.unique_tokens).any():
        return {"repeated_data": _fit_repeated}
    return {
        "chinchilla": lambda sample, near: _fit_chinchilla(sample, near, tied=False),
        "chinchilla_alpha_is_beta": lambda sample, near: _fit_chinchilla(sample, near, tied=True),
        "overtraining": lambda sample, near: overtraining.fit(sample),
        "kaplan": lambda sample, near: kaplan.fit(sample, (near or kaplan.KAPLAN,)),
    }


def study(points: Points, resamples: int, seed: int, held_out_share: float) -> list[dict[str, Any]]:
    """A row for each law: constants, their intervals, and relative errors in the fit and on the points of most compute.

    Args:
      points: one's own.
      resamples: of the bootstrap, 0 for no intervals.
      seed: of the bootstrap.
      held_out_share: of the points, those of the most FLOPs are left out of one more fit, which then predicts them.
    """
    held_out = points.flops > np.quantile(points.flops, 1 - held_out_share)
    return [_row(name, fit, points, held_out, resamples, seed) for name, fit in applicable(points).items()]


def _row(name: str, fit: Fit, points: Points, held_out: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    law = fit(points, None)
    row: dict[str, Any] = {
        "law": name, "points": len(points), "constants": _constants(law),
        "fitted_error_share": float(np.abs(relative_errors(law, points)).mean()),
    }  # fmt: skip
    if held_out.any():
        errors = relative_errors(fit(points.take(~held_out), None), points.take(held_out))
        row |= {
            "held_out_points": int(held_out.sum()), "held_out_error_share": float(np.abs(errors).mean()),
            "held_out_worst_error_share": float(errors[np.abs(errors).argmax()]),
        }  # fmt: skip
    if resamples:
        drawn = [_constants(each) for each in resampled(points, lambda sample: fit(sample, law), resamples, seed)]
        row["intervals_95"] = {key: interval(np.array([each[key] for each in drawn])) for key in drawn[0]}
    if isinstance(law, chinchilla.Chinchilla):
        params, tokens = law.optimum(points.flops.max())
        row["optimum_of_most_flops"] = {"flops": points.flops.max(), "params": params, "tokens": tokens}
    return row


def _fit_chinchilla(points: Points, near: chinchilla.Chinchilla | None, *, tied: bool) -> chinchilla.Chinchilla:
    return chinchilla.fit(points, starts=None if near is None else [chinchilla.to_theta(near)], tied=tied)


def _fit_repeated(points: Points, near: repeated_data.RepeatedData | None) -> repeated_data.RepeatedData:
    """Chinchilla's law with alpha = beta from the runs that repeat nothing, then the two constants of repetition from all.

    The paper's order; its first step had runs around the optimum, and is biased where many have too few tokens.
    """
    once = points.take(points.tokens <= _ONCE * points.unique_tokens)
    return repeated_data.fit(points, _fit_chinchilla(once, near and near.law, tied=True), near=near)


def _constants(law: Any) -> dict[str, float]:
    """A law's constants by name, those of a law inside it as well."""
    constants: dict[str, float] = {}
    for key, value in law._asdict().items():
        constants |= _constants(value) if hasattr(value, "_asdict") else {key: value}
    return constants
