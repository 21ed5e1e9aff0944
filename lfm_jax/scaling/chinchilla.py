"""Chinchilla: the parametric law of Hoffmann et al. 2022 (arXiv 2203.15556, approach 3) and its refit by Besiroglu et al. 2024.

Range of the data: 70M to 16B parameters, 6e18 to 3e21 FLOPs, a few to some hundreds of tokens for each parameter; MassiveText, N
with embeddings, a cosine schedule as long as the run.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points
from lfm_jax.scaling.fitting import HUBER_DELTA, fit_log_sum


class Chinchilla(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2). Loss in nats a token, D in tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params, tokens):
        """The loss at N parameters and D tokens; the arguments broadcast."""
        return self.E + self.A * np.power(params, -self.alpha, dtype=np.float64) + self.data_term(tokens)

    def data_term(self, tokens):
        """B / D^beta: what of the loss is due to the number of tokens."""
        return self.B * np.power(tokens, -self.beta, dtype=np.float64)

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`."""
        return self.loss(points.params, points.tokens)

    @property
    def exponent(self) -> float:
        """a = beta / (alpha + beta): the compute-optimal N grows as C^a, D as C^(1 - a)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def balance(self) -> float:
        """G = (alpha A / (beta B))^(1 / (alpha + beta)) (Hoffmann et al. 2022, equation 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimum(self, flops):
        """(N*, D*), the least loss under C = 6 N D (Hoffmann et al. 2022, equation 4)."""
        pairs = np.asarray(flops, np.float64) / FLOPS_PER_PARAMETER_AND_TOKEN
        return self.balance * pairs**self.exponent, pairs ** (1 - self.exponent) / self.balance

    def tokens_per_parameter(self, flops):
        """D* / N* at a training budget in FLOPs."""
        params, tokens = self.optimum(flops)
        return tokens / params

    def optimal_tokens(self, params):
        """The D for which N parameters are compute-optimal: D = N^(alpha / beta) / G^((alpha + beta) / beta)."""
        return (np.asarray(params, np.float64) / self.balance) ** (self.alpha / self.beta) / self.balance

    def tokens_for(self, loss: float, params):
        """The D at which N parameters reach the loss; infinite where they never do."""
        left = loss - self.E - self.A * np.power(params, -self.alpha, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return (np.maximum(left, 0) / self.B) ** (-1 / self.beta)


# The unrounded constants are (A, B and E as logarithms) those of the paper's source; rounded as printed they move D*/N* by half.
HOFFMANN = Chinchilla(math.exp(0.5267228), math.exp(6.0073404), math.exp(6.0179186), 0.33917084, 0.2849083)
HOFFMANN_ROUNDED = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
# Table 1 of Besiroglu et al. 2024 (arXiv 2404.10102), with the digits of their notebook. It is a fit of least absolute residuals,
# not the minimum of Huber's function: a jointly fitted scale shrinks delta to 5e-9.
BESIROGLU = Chinchilla(1.81686, 482.00572, 2085.43420, 0.34781, 0.36585)


def fit(
    points: Points, *, delta: float = HUBER_DELTA, starts: Iterable[np.ndarray] | None = None, tied: bool = False
) -> Chinchilla:
    """Approach 3: fits the law as the paper did (section D.2), Huber's function of ln L, from a grid of starts.

    Args:
      points: at least as many as there are constants; with one D / N for all of them alpha and beta are not determined.
      delta: of Huber's function.
      starts: constants as `to_theta` gives them; None for those of the grid of Hoffmann et al. that lie nearest to the points.
      tied: alpha = beta.

    Raises:
      ValueError: there are too few points, or all have the same N or D.
    """
    need_spread(points, 4 if tied else 5)
    if starts is None:
        starts = nearest_starts(points)
    found = fit_log_sum(_terms(points, tied), points.loss, (np.asarray(start)[: 4 if tied else 5] for start in starts), delta)
    return from_theta(found.theta)


def fit_least_absolute(points: Points, start: Chinchilla) -> Chinchilla:
    """The law of least absolute residuals of ln L, near `start`: Huber's function with a delta that shrinks to 1e-8.

    This is what the constants of Besiroglu et al. are, although they set out to find the minimum of Huber's function at 1e-3.
    """
    for delta in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        start = fit(points, delta=delta, starts=[to_theta(start)])
    return start


def to_theta(law: Chinchilla) -> np.ndarray:
    """(ln A, ln B, ln E, alpha, beta), in which the law is fitted."""
    return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])


def from_theta(theta: np.ndarray) -> Chinchilla:
    """The law of (ln A, ln B, ln E, alpha, beta); without beta it is alpha."""
    a, b, e, alpha = theta[:4]
    return Chinchilla(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), float(alpha), float(theta[-1]))


def grid() -> np.ndarray:
    """The 4,500 starts of Hoffmann et al. 2022, section D.2, [starts, 5]."""
    axes = np.arange(0, 26, 5), np.arange(0, 26, 5), np.arange(-1, 1.1, 0.5), np.arange(0, 2.1, 0.5), np.arange(0, 2.1, 0.5)
    return np.array(list(itertools.product(*axes)))


def nearest_starts(points: Points, count: int = 8) -> np.ndarray:
    """Those of the grid with the least summed residual of ln L: from others the search ends in worse minima or in the same."""
    starts = grid()
    values = np.einsum("ptc,sc->spt", _terms(points, False), starts)
    residuals = np.logaddexp.reduce(values, axis=2) - np.log(points.loss)
    return starts[np.argsort(np.abs(residuals).sum(axis=1), kind="stable")[:count]]


def need_spread(points: Points, constants: int) -> None:
    """Raises ValueError where the points cannot determine that many constants of a law of N and D."""
    if len(points) < constants:
        raise ValueError(f"{constants} constants need at least as many points, got {len(points)}")
    for name, values in (("params", points.params), ("tokens", points.tokens)):
        if np.ptp(np.log(values)) < 1e-9:
            raise ValueError(f"all points have {name} = {values[0]:g}: the law's dependence on it cannot be fitted")


def _terms(points: Points, tied: bool) -> np.ndarray:
    """[points, 3, constants]: A / N^alpha, B / D^beta and E, as logarithms that are linear in theta."""
    terms = np.zeros((len(points), 3, 4 if tied else 5))
    terms[:, 0, 0] = terms[:, 1, 1] = terms[:, 2, 2] = 1
    terms[:, 0, 3], terms[:, 1, -1] = -np.log(points.params), -np.log(points.tokens)
    return terms
