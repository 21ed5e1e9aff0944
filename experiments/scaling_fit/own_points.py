"""The laws fitted to a sweep of one's own: constants with intervals, the error on points held out, and the optimum."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lfm_jax.scaling import (
    Law,
    Points,
    chinchilla,
    distillation,
    interval,
    kaplan,
    overtraining,
    precision,
    relative_errors,
    repeated_data,
    resampled,
)
from lfm_jax.scaling import train_to_test as test_time

# From points, and a law near which to search or None.
Fit = Callable[[Points, Any], Law]
_ONCE = 1.001  # fewer tokens than this many times the unique ones are not repeated


def applicable(points: Points) -> dict[str, Fit]:
    """How to fit each law whose variables the points have: of samples, a teacher, bits, repetition, or of N and D alone."""
    if points.samples is not None and np.ptp(points.samples) > 0:
        return {"train_to_test": lambda sample, near: test_time.fit(sample, near=near)}
    if points.teacher_loss is not None:
        return {"distillation": lambda sample, near: distillation.fit_distilled(sample, (near or distillation.DISTILLED,))}
    if points.weight_bits is not None:
        return {"precision": lambda sample, near: precision.fit_degradation(sample, near and (near,))}
    if points.unique_tokens is not None and (points.tokens > _ONCE * points.unique_tokens).any():
        return {"repeated_data": _fit_repeated}
    return {
        "chinchilla": lambda sample, near: _fit_chinchilla(sample, near, tied=False),
        "chinchilla_alpha_is_beta": lambda sample, near: _fit_chinchilla(sample, near, tied=True),
        "overtraining": _determined(lambda sample, near: overtraining.fit(sample)),
        "kaplan": _determined(lambda sample, near: kaplan.fit(sample, (near or kaplan.KAPLAN,))),
    }


def _determined(fit: Fit) -> Fit:
    """The fit of a law of four constants, which refuses points that do not determine them."""

    def checked(sample: Points, near: Any) -> Law:
        chinchilla.need_spread(sample, 4)
        return fit(sample, near)

    return checked


def study(
    points: Points, resamples: int, seed: int, held_out_share: float, unseen: Points | None = None
) -> list[dict[str, Any]]:
    """A row for each law: constants, their intervals, relative errors of the fit and on points held out; or why there is none.

    Args:
      points: one's own.
      resamples: of the bootstrap, 0 for no intervals.
      seed: of the bootstrap.
      held_out_share: of the points, those of the most FLOPs are left out of one more fit, which then predicts them.
      unseen: points that were held out beforehand, to be predicted instead.

    Raises:
      ValueError: no law can be fitted.
    """
    if unseen is None:
        most = points.flops > np.quantile(points.flops, 1 - held_out_share)
        known, unseen = points.take(~most), points.take(most)
    else:
        known = points
    rows, refused = [], []
    for name, fit in applicable(points).items():
        try:
            rows.append({"law": name} | _row(fit, points, known, unseen, resamples, seed))
        except ValueError as error:
            refused.append({"law": name, "points": len(points), "not_fitted": str(error)})
    if not rows:
        raise ValueError(refused[0]["not_fitted"])
    return rows + refused


def _row(fit: Fit, points: Points, known: Points, unseen: Points, resamples: int, seed: int) -> dict[str, Any]:
    law = fit(points, None)
    row: dict[str, Any] = {
        "points": len(points), "constants": _constants(law),
        "fitted_error_share": float(np.abs(relative_errors(law, points)).mean()),
    }  # fmt: skip
    if len(unseen):
        row |= {"held_out_points": len(unseen)} | _foreseen(fit, law, points, known, unseen)
    if resamples:
        drawn = [_constants(each) for each in resampled(points, lambda sample: fit(sample, law), resamples, seed)]
        row["intervals_95"] = {key: interval(np.array([each[key] for each in drawn])) for key in drawn[0]}
    if isinstance(law, chinchilla.Chinchilla) and min(law) > 0:
        params, tokens = law.optimum(points.flops.max())
        row["optimum_of_most_flops"] = {"flops": points.flops.max(), "params": params, "tokens": tokens}
    return row


def _foreseen(fit: Fit, law: Law, points: Points, known: Points, unseen: Points) -> dict[str, Any]:
    """The errors on points that were not fitted, of the law of the others; or why that cannot be fitted to these."""
    try:
        errors = relative_errors(law if known is points else fit(known, None), unseen)
    except ValueError as error:
        return {"held_out_not_fitted": f"to the {len(known)} points that are not held out: {error}"}
    return {
        "held_out_error_share": float(np.abs(errors).mean()), "held_out_worst_error_share": float(errors[np.abs(errors).argmax()])
    }  # fmt: skip


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
