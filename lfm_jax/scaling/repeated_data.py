"""Repeated tokens: Muennighoff et al. 2023 (arXiv 2305.16264), Chinchilla's law with tokens that are worth less each time.

Range of the data: 7M to 9B parameters, 0.1B to 178B unique tokens of C4; the paper says 1 to 500 epochs, some of its runs have
thousands. The law says that repetition stops helping; that it ends in harm, as it did in their longest runs, it cannot say.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.data_points import Points
from lfm_jax.scaling.fitting import HUBER_DELTA, huber_objective

_MOST = 10.0  # of ln R: at exp(10) repeated tokens are as good as fresh ones
_SEARCH = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 2000}


class RepeatedData(NamedTuple):
    """L = E + A / N'^alpha + B / D'^beta (equations 5 and 6).

    law: of unique tokens. R_D: how many repetitions it takes until 1 - 1/e of all that they can add is there. R_N: the same of
    parameters, in multiples of those that are optimal for the unique tokens.
    """

    law: Chinchilla
    R_D: float
    R_N: float

    def effective_tokens(self, tokens, unique_tokens):
        """D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)): as many fresh tokens would do as much; at most U (1 + R_D)."""
        unique = np.asarray(unique_tokens, np.float64)
        return _diminished(unique, np.asarray(tokens, np.float64) / unique - 1, self.R_D)

    def effective_params(self, params, unique_tokens):
        """N' = U_N + U_N R_N (1 - exp(-(N / U_N - 1) / R_N)), U_N the smaller of N and what is optimal for the unique tokens."""
        params, law = np.asarray(params, np.float64), self.law
        optimal = law.balance * (law.balance * np.asarray(unique_tokens, np.float64)) ** (law.beta / law.alpha)
        used = np.minimum(params, optimal)
        return _diminished(used, params / used - 1, self.R_N)

    def loss(self, params, tokens, unique_tokens):
        """The loss at N parameters and D tokens of which U are different, in nats a token."""
        return self.law.loss(self.effective_params(params, unique_tokens), self.effective_tokens(tokens, unique_tokens))

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`; points without `unique_tokens` repeat none."""
        unique = points.tokens if points.unique_tokens is None else points.unique_tokens
        return self.loss(points.params, points.tokens, unique)


# ln A 6.255414, ln B 7.3049974, ln E 0.6254804 (huggingface/datablations, utils/parametric_fit.ipynb; appendix A of the paper).
C4 = Chinchilla(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596)
# A local minimum of the paper's objective on its 182 runs; R_D of 47 with R_N of 2.3, and 95 with 1.7, lie below it
# (docs/scaling_laws.md). What these two leave open is how R_D and R_N share the blame.
MUENNIGHOFF = RepeatedData(C4, 15.387756, 5.309743)


def fit(
    points: Points, law: Chinchilla, *, delta: float = HUBER_DELTA, near: RepeatedData | None = None
) -> RepeatedData:
    """Fits R_D and R_N with the law of unique tokens held, as in appendix A: Huber's function of ln L, starts 0, 4, ... 20.

    Args:
      points: with `unique_tokens`, some of them repeated; runs that got worse by repetition should be left out.
      law: fitted to runs without repetition, none of them with more parameters than are optimal for its tokens: those count as
        excess here also in a single epoch.
      delta: of Huber's function.
      near: where to start instead, once.

    Raises:
      ValueError: no point repeats a token.
    """
    if points.unique_tokens is None or not (points.tokens > 1.001 * points.unique_tokens).any():
        raise ValueError("the worth of a repeated token can be fitted only to points with unique_tokens below tokens")

    of = lambda theta: RepeatedData(law, *np.exp(np.clip(theta, -_MOST, _MOST)).tolist())
    objective = lambda theta: huber_objective(of(theta), points, delta) / delta
    begins = starts(law) if near is None else [near]
    found = [
        optimize.minimize(objective, np.log((start.R_D, start.R_N)), method="Nelder-Mead", options=_SEARCH) for start in begins
    ]
    return of(min(found, key=lambda fit: fit.fun).x)


def starts(law: Chinchilla) -> list[RepeatedData]:
    """The 36 starts of appendix A, R_D and R_N of 0, 4, ... 20 each, with 0.1 for 0, where the law has no slope."""
    axis = [max(float(value), 0.1) for value in range(0, 21, 4)]
    return [RepeatedData(law, r_d, r_n) for r_d in axis for r_n in axis]


def _diminished(once, repetitions, constant):
    return once + once * constant * -np.expm1(-repetitions / constant)
