"""Over-training by the token multiplier M = D / N, and what it does to downstream errors: Gadre et al. 2024 (arXiv 2403.08540).

Range of the data: 11M to 6.9B parameters (embeddings counted), M of 5 to 640, on C4, RedPajama and RefinedWeb; the law of the
loss is fitted to M >= 20. It is Chinchilla's with alpha = beta: over-training by one M moves the line of the reducible loss on a
log-log plot in parallel.
"""

from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.chinchilla import Chinchilla, need_spread
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points
from lfm_jax.scaling.fitting import fit_linear_given


class Overtraining(NamedTuple):
    """L(C, M) = E + (a M^eta + b M^-eta) C^-eta (equation 4); C = 6 N D with all parameters. Table 6 prints C^eta, by mistake."""

    E: float
    a: float
    b: float
    eta: float

    def loss(self, flops, multiplier):
        """The loss in nats a token at C FLOPs and M tokens a parameter; the arguments broadcast."""
        flops, multiplier = np.asarray(flops, np.float64), np.asarray(multiplier, np.float64)
        return self.E + (self.a * multiplier**self.eta + self.b * multiplier**-self.eta) * flops**-self.eta

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`."""
        return self.loss(points.flops, points.tokens / points.params)

    @property
    def optimal_multiplier(self) -> float:
        """M* = (b / a)^(1 / (2 eta)), of least loss at any C (appendix F, whose 3.4 to 7.4 contradicts the paper's figure 9)."""
        return (self.b / self.a) ** (1 / (2 * self.eta))

    def as_chinchilla(self) -> Chinchilla:
        """The same law over N and D: alpha = beta = 2 eta, A = a 6^-eta, B = b 6^-eta."""
        factor = FLOPS_PER_PARAMETER_AND_TOKEN**-self.eta
        return Chinchilla(self.E, self.a * factor, self.b * factor, 2 * self.eta, 2 * self.eta)


class DownstreamError(NamedTuple):
    """Err(L) = epsilon - k exp(-gamma L) (equation 5): the mean of 1 - accuracy over tasks, from the loss."""

    k: float
    gamma: float
    epsilon: float

    def error(self, loss):
        """The error at a loss in nats a token, as a share."""
        return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss, np.float64))


# Table 6 of the paper: the laws of the loss on C4's evaluation set, and of the error over 17 tasks, by training corpus.
C4 = Overtraining(1.51, 141, 190, 0.121)
RED_PAJAMA = Overtraining(1.84, 212, 367, 0.136)
REFINED_WEB = Overtraining(1.73, 157, 246, 0.127)
C4_ERROR = DownstreamError(2.08, 0.756, 0.850)
RED_PAJAMA_ERROR = DownstreamError(2.21, 0.715, 0.857)
REFINED_WEB_ERROR = DownstreamError(2.21, 0.707, 0.865)


def fit(points: Points) -> Overtraining:
    """Fits the law as the paper did, unweighted least squares on the loss itself, not its logarithm.

    The authors' code (scaling/laws.py) starts a local search 128 times; E, a and b are linear, so here eta alone is searched, and
    the minimum is the global one. Alpha between 0.02 and 2.

    Raises:
      ValueError: there are too few points, or all have the same N or D.
    """
    need_spread(points, 4)

    def columns(alpha: float) -> np.ndarray:
        return np.stack([points.params**-alpha, points.tokens**-alpha, np.ones(len(points))], axis=1)

    alpha, (A, B, E), _ = fit_linear_given(columns, points.loss, 0.02, 2)
    factor = FLOPS_PER_PARAMETER_AND_TOKEN ** (alpha / 2)
    return Overtraining(float(E), float(A * factor), float(B * factor), alpha / 2)


def fit_error(loss: np.ndarray, error: np.ndarray) -> DownstreamError:
    """Fits the law of the error by unweighted least squares, as the paper did; gamma between 0.01 and 100.

    Args:
      loss: measured, [models]. error: of the same models.

    Raises:
      ValueError: there are fewer than three models.
    """
    loss, error = np.asarray(loss, np.float64), np.asarray(error, np.float64)
    if len(loss) < 3:
        raise ValueError(f"the law of the error has three constants and needs as many models, got {len(loss)}")
    columns = lambda gamma: np.stack([-np.exp(-gamma * loss), np.ones(len(loss))], axis=1)
    gamma, (k, epsilon), _ = fit_linear_given(columns, error, 0.01, 100)
    return DownstreamError(float(k), gamma, float(epsilon))
