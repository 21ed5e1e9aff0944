"""How laws are fitted: objectives, many starts, intervals by resampling, and the error on points that the fit has not seen.

Everything is float64 NumPy. Most laws of the loss are a sum of powers, whose logarithm is ln L = logsumexp over terms that are
linear in the constants (Hoffmann et al. 2022, arXiv 2203.15556, section D.2); these have their gradient here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import optimize

from lfm_jax.scaling.data_points import Points

HUBER_DELTA = 1e-3  # of Hoffmann et al.; on ln L, so everything above 0.1 % counts by its amount
_SEARCH = {"maxiter": 2000, "gtol": 1e-7}
_GRID = 100


class Law(Protocol):
    """The constants of a law: fitted to points or taken from a paper, used in the same way."""

    def predict(self, points: Points) -> np.ndarray:
        """The loss [points] that the law gives to the runs; their own is not looked at."""
        ...


class Fit(NamedTuple):
    """theta: the constants in the form in which they were fitted. objective: what it came to."""

    theta: np.ndarray
    objective: float


def huber(residuals: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(value, slope) of Huber's function, r^2 / 2 up to |r| = delta and delta (|r| - delta / 2) beyond."""
    small = np.clip(residuals, -delta, delta)
    return small * (residuals - small / 2), small


def huber_objective(law: Law, points: Points, delta: float = HUBER_DELTA) -> float:
    """The sum of Huber's function of the residuals of ln L: what the fits of most laws make least."""
    return float(huber(np.log(law.predict(points) / points.loss), delta)[0].sum())


def minimise(objective: Callable[[np.ndarray], tuple[float, np.ndarray]], starts: Iterable[np.ndarray]) -> Fit:
    """The best of BFGS from every start.

    The papers take L-BFGS, which comes to the same minimum; but of its small matrices SciPy's threads make many times the work.

    Args:
      objective: gives (value, gradient).
      starts: arrays of constants.

    Raises:
      ValueError: from no start does it come to a finite value.
    """
    best: Fit | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for start in starts:
            found = optimize.minimize(objective, start, jac=True, method="BFGS", options=_SEARCH)
            if np.isfinite(found.fun) and (best is None or found.fun < best.objective):
                best = Fit(found.x, float(found.fun))
    if best is None:
        raise ValueError("the fit comes to no finite value from any start; look at the points, and give other starts")
    return best


def fit_log_sum(
    terms: np.ndarray, loss: np.ndarray, starts: Iterable[np.ndarray], delta: float = HUBER_DELTA, *, on_loss: bool = False
) -> Fit:
    """Fits ln L = logsumexp over j of (terms[:, j] @ theta), by the sum of Huber's function of the residuals.

    Args:
      terms: [points, terms, constants].
      loss: [points].
      starts: arrays of constants [constants].
      delta: where Huber's function turns from squares to amounts; infinity gives least squares.
      on_loss: the residuals are those of L, not of ln L.
    """
    by_term = np.ascontiguousarray(terms.swapaxes(0, 1))  # [terms, points, constants]
    target = loss if on_loss else np.log(loss)
    # In units of delta, so that the tolerances of the search mean the same for every delta.
    scale = 1.0 if np.isinf(delta) else delta

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        values = np.einsum("tpc,c->tp", by_term, theta)
        highest = values.max(axis=0)
        weights = np.exp(values - highest)
        total = weights.sum(axis=0)
        found = highest + np.log(total)  # ln L
        found, weights = (np.exp(found), weights * np.exp(highest)) if on_loss else (found, weights / total)
        value, slope = huber(found - target, delta)
        return float(value.sum()) / scale, np.einsum("tp,tpc->c", weights * (slope / scale), by_term)

    found = minimise(objective, starts)
    return Fit(found.theta, found.objective * scale)


def fit_near(starts: Iterable[Law], points: Points, delta: float = HUBER_DELTA) -> Law:
    """Fits any law whose constants are all above zero (a NamedTuple of them), by Huber's function of the residuals of ln L.

    The constants are searched as logarithms by SciPy's trust-region least squares, with numerical derivatives, from every start.

    Args:
      starts: laws near which to search; published ones will do.
      points: with the fields that the law reads.
      delta: as above.
    """
    starts, best = list(starts), None
    kind = type(starts[0])
    residuals = lambda theta: np.log(kind(*np.exp(theta)).predict(points) / points.loss)
    loss = {"loss": "linear"} if np.isinf(delta) else {"loss": "huber", "f_scale": delta}
    with np.errstate(over="ignore"):
        for start in starts:
            found = optimize.least_squares(
                residuals, np.log(np.asarray(start, np.float64)), jac="3-point", x_scale="jac",
                ftol=1e-14, xtol=1e-12, gtol=1e-14, max_nfev=2000, **loss,
            )  # fmt: skip
            best = found if best is None or found.cost < best.cost else best
    return kind(*(float(value) for value in np.exp(best.x)))


def fit_linear_given(
    columns: Callable[[float], np.ndarray], target: np.ndarray, low: float, high: float
) -> tuple[float, np.ndarray, float]:
    """Unweighted least squares where all constants but one are linear: (that one, the others, the sum of squares).

    For each value of the one the others follow exactly, so what is left is a search along a line: a grid, and then between the
    neighbours of its best.

    Args:
      columns: from the one constant to the matrix [points, others].
      target: [points].
      low, high: between which the one is searched, both above zero.
    """

    def solve(log_value: float) -> tuple[np.ndarray, float]:
        matrix = columns(float(np.exp(log_value)))
        others = np.linalg.lstsq(matrix, target, rcond=None)[0]
        return others, float(((matrix @ others - target) ** 2).sum())

    grid = np.linspace(np.log(low), np.log(high), _GRID)
    nearest = int(np.argmin([solve(value)[1] for value in grid]))
    bounds = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(lambda value: solve(value)[1], bounds=bounds, method="bounded", options={"xatol": 1e-12})
    return float(np.exp(found.x)), *solve(found.x)


def resampled(points: Points, fit: Callable[[Points], Any], resamples: int, seed: int) -> list[Any]:
    """The law fitted to each of `resamples` drawings with replacement of as many points as there are (the bootstrap).

    The drawings are those of NumPy's legacy generator, whose sequence is fixed for good and which Besiroglu et al. 2024 used. One
    that the law cannot be fitted to (all of one size) is replaced by the next.

    Raises:
      ValueError: of the fit, when as many drawings as were wanted have been refused: the points are too few or too alike.
    """
    generator = np.random.RandomState(seed)
    laws, refused = [], 0
    while len(laws) < resamples:
        sample = points.take(generator.choice(len(points), len(points), replace=True))
        try:
            laws.append(fit(sample))
        except ValueError:
            refused += 1
            if refused >= resamples:
                raise
    return laws


def interval(values: np.ndarray, coverage: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values that has this share of them in its middle."""
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def relative_errors(law: Law, points: Points) -> np.ndarray:
    """(predicted - measured) / measured [points]; on points that were not fitted it is the error of the extrapolation."""
    return law.predict(points) / points.loss - 1
