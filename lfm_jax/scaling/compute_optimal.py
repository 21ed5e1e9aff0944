"""Where the compute-optimal size lies without a law of the loss: approaches 1 and 2 of Hoffmann et al. 2022 (arXiv 2203.15556).

Approach 1 takes the lower envelope of training curves, approach 2 the minimum of a parabola through the runs of one budget; both
then fit a power law N* ~ C^a. Each holds inside the budgets that it was fitted to: neither says what the loss will be.
"""

from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points

_ENVELOPE_BUDGETS = 1500  # of Hoffmann et al. 2022, section 3.1


class PowerOptimum(NamedTuple):
    """N*(C) = params (C / flops)^exponent and D* = C / (6 N*): a line through one optimum."""

    params: float
    flops: float
    exponent: float

    def optimum(self, flops):
        """(N*, D*) at a training budget in FLOPs."""
        params = self.params * (np.asarray(flops, np.float64) / self.flops) ** self.exponent
        return params, flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params)


class Minima(NamedTuple):
    """The best run of each budget: C, N* and the loss there, arrays of [budgets]."""

    flops: np.ndarray
    params: np.ndarray
    loss: np.ndarray

    def power_law(self) -> PowerOptimum:
        """Least squares of ln N* on ln C, given through the middle of the budgets.

        Raises:
          ValueError: there are fewer than two budgets.
        """
        if len(self.flops) < 2:
            raise ValueError(f"a power law needs the minima of at least two budgets, got {len(self.flops)}")
        log_flops, log_params = np.log(self.flops), np.log(self.params)
        exponent = float(np.polyfit(log_flops - log_flops.mean(), log_params, 1)[0])
        return PowerOptimum(float(np.exp(log_params.mean())), float(np.exp(log_flops.mean())), exponent)


def isoflop(points: Points, budgets: np.ndarray, width: float = 1.1) -> Minima:
    """Approach 2: for each budget a parabola of the loss over ln N through the runs near it (Hoffmann et al. 2022, section 3.2).

    Args:
      points: runs, each with a schedule as long as itself.
      budgets: FLOPs [budgets].
      width: runs count to a budget when their FLOPs lie within this factor of it.

    Raises:
      ValueError: a budget has fewer than three sizes, or its parabola has no minimum among them.
    """
    params, loss = [], []
    for budget in budgets:
        column = points.take(np.abs(np.log(points.flops / budget)) <= np.log(width))
        sizes = len(np.unique(column.params))
        if sizes < 3:
            raise ValueError(f"the budget of {budget:.3g} FLOPs has {sizes} sizes; a parabola needs three: run more sizes there")
        size = np.log(column.params)
        curve = np.polynomial.Polynomial.fit(size, column.loss, 2)
        lowest = curve.deriv().roots()[0]
        if curve.convert().coef[2] <= 0 or not size.min() <= lowest <= size.max():
            raise ValueError(
                f"the runs of {budget:.3g} FLOPs have no minimum between {column.params.min():.3g} and {column.params.max():.3g} "
                "parameters; run sizes on both sides of it"
            )
        params.append(np.exp(lowest))
        loss.append(curve(lowest))
    return Minima(np.asarray(budgets, np.float64), np.array(params), np.array(loss))


def envelope(points: Points) -> Minima:
    """Approach 1: at each of 1,500 budgets the size whose training curve is lowest there (Hoffmann et al. 2022, section 3.1).

    Args:
      points: along training curves, all those with one number of parameters being one curve.

    Returns:
      Only budgets at which the best curve is neither the smallest nor the largest that reaches so far: there the sizes that would
      have been better are not among the runs.

    Raises:
      ValueError: no budget is left.
    """
    sizes = np.unique(points.params)
    budgets = np.geomspace(points.flops.min(), points.flops.max(), _ENVELOPE_BUDGETS)
    curves = np.full((len(sizes), len(budgets)), np.inf)
    for row, size in zip(curves, sizes, strict=True):
        curve = points.take(points.params == size)
        order = np.argsort(curve.flops)
        row[:] = np.interp(np.log(budgets), np.log(curve.flops[order]), curve.loss[order], left=np.inf, right=np.inf)
    best = curves.argmin(axis=0)
    there = np.isfinite(curves)
    first, last = there.argmax(axis=0), len(sizes) - 1 - there[::-1].argmax(axis=0)
    inside = there.any(axis=0) & (best > first) & (best < last)
    if not inside.any():
        raise ValueError(f"of {len(sizes)} sizes none is best between others; approach 1 needs three curves or more that cross")
    return Minima(budgets[inside], sizes[best[inside]], curves[best, np.arange(len(budgets))][inside])
