"""Distillation: Busbridge et al. 2025 (arXiv 2502.08606, ICML 2025), the student's loss from its own size and its teacher's loss.

Range of the data: teachers and students of 143M to 12.6B parameters (without embeddings), at most 512B tokens of C4, muP, pure
distillation at temperature 1 with the whole distribution of the teacher.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from lfm_jax.scaling.data_points import Points
from lfm_jax.scaling.fitting import fit_near

HUBER_DELTA = 1e-4  # of the paper, on ln L


class Supervised(NamedTuple):
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma (the supervised law), N without embeddings, in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float

    def loss(self, params, tokens):
        """The loss of training on text."""
        return self.E + np.exp(self.gamma * _log_sum(self.A, self.alpha, params, self.B, self.beta, tokens))

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`."""
        return self.loss(points.params, points.tokens)

    def tokens_for(self, loss: float, params):
        """The D at which N parameters reach the loss; infinite where they never do."""
        left = np.maximum(loss - self.E, 0) ** (1 / self.gamma) - self.A * np.asarray(params, np.float64) ** -self.alpha
        with np.errstate(divide="ignore"):
            return (np.maximum(left, 0) / self.B) ** (-1 / self.beta)


class Distilled(NamedTuple):
    """L_S = L_T + L_T^-c0 [1 + (L_T / (L_alone d1))^(1 / f1)]^(-c1 f1) (A / N^alpha + B / D^beta)^gamma.

    L_alone is the supervised loss of the same student on the same tokens: a teacher far better than that teaches worse.
    """

    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(self, teacher_loss, params, tokens, supervised: Supervised | None = None):
        """The student's loss.

        Args:
          teacher_loss: L_T. params, tokens: of the student. supervised: the law for L_alone, the paper's where it is None.
        """
        teacher_loss = np.asarray(teacher_loss, np.float64)
        alone = (supervised or SUPERVISED).loss(params, tokens)
        gap = -self.c1 * self.f1 * np.logaddexp(0, np.log(teacher_loss / (alone * self.d1)) / self.f1)
        own = self.gamma * _log_sum(self.A, self.alpha, params, self.B, self.beta, tokens)
        return teacher_loss + np.exp(gap + own - self.c0 * np.log(teacher_loss))

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`, with the points' `teacher_loss` and the paper's supervised law."""
        return self.loss(points.teacher_loss, points.params, points.tokens)

    def best_teacher(self, params: float, tokens: float) -> tuple[float, float]:
        """(L_T, L_S): the teacher's loss from which this student learns most, and what it comes to."""
        alone = float(SUPERVISED.loss(params, tokens))
        grid = np.linspace(0.3 * alone, 1.2 * alone, 400)
        nearest = int(np.argmin(self.loss(grid, params, tokens)))
        bounds = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]
        loss = lambda teacher: float(self.loss(teacher, params, tokens))
        found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10})
        return float(found.x), float(found.fun)


# Table 6 of the paper: 73 and 697 runs.
SUPERVISED = Supervised(1.220, 3355, 18186, 0.408, 0.431, 0.452)
DISTILLED = Distilled(2243, 24181, 0.321, 0.637, 0.764, 2.549, 522.6, 0.090, 1.315)


def fit_supervised(points: Points, starts: Sequence[Supervised] = (SUPERVISED,)) -> Supervised:
    """Fits the supervised law by Huber's function of ln L with the paper's delta of 1e-4 (appendix F.1)."""
    return fit_near(starts, points, HUBER_DELTA)


def fit_distilled(points: Points, starts: Sequence[Distilled] = (DISTILLED,)) -> Distilled:
    """Fits the law of distillation, the supervised one held, by Huber's function of ln L (appendix F.2).

    Raises:
      ValueError: the points have no teacher.
    """
    if points.teacher_loss is None:
        raise ValueError("the law of distillation is fitted to points with teacher_loss, and these have none")
    return fit_near(starts, points, HUBER_DELTA)


def training_flops(
    student_forward: float, tokens: float, teacher_forward: float, *, logits: bool, pretraining_tokens: float = 0.0
) -> float:
    """3 F(N_S) D_S + F(N_T) (D_S if the teacher's logits are computed, and 3 times the tokens that it was trained on).

    Args:
      student_forward: F(N_S), FLOPs of a forward pass for a token. tokens: D_S. teacher_forward: F(N_T).
      logits: the teacher runs beside the student; False if its logits are there already.
      pretraining_tokens: those of the teacher, where its training is on this bill.
    """
    return 3 * student_forward * tokens + teacher_forward * (tokens * logits + 3 * pretraining_tokens)


def _log_sum(A, alpha, params, B, beta, tokens):
    """ln(A / N^alpha + B / D^beta)."""
    params, tokens = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
    return np.logaddexp(np.log(A) - alpha * np.log(params), np.log(B) - beta * np.log(tokens))
