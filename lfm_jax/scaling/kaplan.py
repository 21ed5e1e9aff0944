"""Kaplan et al. 2020 (arXiv 2001.08361): the first laws, with parameters counted without embeddings.

Range of the data: 768 to 1.5e9 parameters, 22M to 23B tokens of WebText2, 1,024 tokens of context. Their compute-optimal exponent
is known to be too high: Porian et al. 2024 (`porian`) take it apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.data_points import Points
from lfm_jax.scaling.fitting import fit_near

PETAFLOP_DAY = 1e15 * 24 * 3600  # FLOPs
COMPUTE_SCALE, COMPUTE_EXPONENT = 3.1e8, 0.050  # equation 1.3, Cc in PetaFLOP-days
OPTIMAL_EXPONENTS = 0.73, 0.27  # of N and D; their C leaves out the head. With C = 6 N D it is 0.88 for N (Porian et al. 2024)


class Kaplan(NamedTuple):
    """L(N, D) = [(Nc / N)^(alpha_n / alpha_d) + Dc / D]^alpha_d (equation 1.5); N without embeddings, D in tokens, L in nats."""

    Nc: float
    Dc: float
    alpha_n: float
    alpha_d: float

    def loss(self, params, tokens):
        """The loss; for D without limit it is (Nc / N)^alpha_n (equation 1.1), for N without limit (Dc / D)^alpha_d (1.2)."""
        params, tokens = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return ((self.Nc / params) ** (self.alpha_n / self.alpha_d) + self.Dc / tokens) ** self.alpha_d

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`."""
        return self.loss(points.params, points.tokens)


KAPLAN = Kaplan(8.8e13, 5.4e13, 0.076, 0.095)  # equations 1.1 and 1.2


def compute_loss(flops):
    """L(C) = (Cc / C)^0.050 with compute used at its best, C in FLOPs (equation 1.3)."""
    return (COMPUTE_SCALE * PETAFLOP_DAY / np.asarray(flops, np.float64)) ** COMPUTE_EXPONENT


def fit(points: Points, starts: Sequence[Kaplan] = (KAPLAN,)) -> Kaplan:
    """Fits the joint law by least squares on ln L."""
    return fit_near(starts, points, np.inf)
