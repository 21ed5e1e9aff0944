"""Parameters, tokens and samples a question together: Train-to-Test, Roberts et al. 2026 (arXiv 2604.01411).

min over N, D, k of the loss, subject to 6 N D <= C_train and 2 N k <= C_inference: a smaller model draws more answers. Range of
the data: 5M to 901M parameters, 1.25e16 to 2.56e19 FLOPs, 8 tasks. The paper prints no fitted constants, so there are none here.
Read it with care: pass@k needs a perfect verifier, and 2 N k leaves out the prompt, the cache and the traffic of memory.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from lfm_jax.scaling import chinchilla
from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points
from lfm_jax.scaling.fitting import fit_log_sum
from lfm_jax.scaling.inference_aware import INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN

_RESTARTS = 32  # the paper took 500
_TASK_FLOORS = np.linspace(0.01, 0.95, 40)  # E tried, as shares of the least loss


class TrainToTest(NamedTuple):
    """Approach 1: L(N, D, k) = E + A / N^alpha + B / D^beta + G / k^gamma, L the mean of -ln pass@k over questions."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    G: float
    gamma: float

    def loss(self, params, tokens, samples):
        """The loss at N parameters, D tokens and k samples; at k = 1 it is Chinchilla's with E + G for E."""
        params, tokens, samples = (np.asarray(value, np.float64) for value in (params, tokens, samples))
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta + self.G * samples**-self.gamma

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`; points without `samples` draw one."""
        return self.loss(points.params, points.tokens, 1.0 if points.samples is None else points.samples)

    def optimum(self, training_flops: float, inference_flops: float) -> tuple[float, float, float]:
        """(N, D, k) of least loss with both budgets used up; k is not rounded.

        Args:
          training_flops: 6 N D. inference_flops: 2 N k, for one token of each sample.
        """
        most = np.log(inference_flops / INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN)  # one sample

        def loss(log_params: float) -> float:
            return float(self.loss(*_budgeted(np.exp(log_params), training_flops, inference_flops)))

        # Convex in ln N, a sum of exponentials.
        found = optimize.minimize_scalar(loss, bounds=(most - 40, most), method="bounded", options={"xatol": 1e-10})
        return tuple(float(value) for value in _budgeted(np.exp(found.x), training_flops, inference_flops))


class SampledAccuracy(NamedTuple):
    """Approach 2: a question's chance is Beta-distributed with a = mu nu and b = (1 - mu) nu, both given by the task's loss.

    mu = theta2 / (1 + exp(theta1 (L - theta0))), nu = exp(theta3 + theta4 L), L the loss that Chinchilla's law gives the task.
    """

    theta0: float
    theta1: float
    theta2: float
    theta3: float
    theta4: float

    def accuracy(self, loss, samples):
        """pass@k = 1 - Beta(a, b + k) / Beta(a, b): the expectation of 1 - (1 - p)^k."""
        loss = np.asarray(loss, np.float64)
        mean = self.theta2 * special.expit(-self.theta1 * (loss - self.theta0))
        strength = np.exp(self.theta3 + self.theta4 * loss)
        a, b = mean * strength, (1 - mean) * strength
        return -np.expm1(special.betaln(a, b + samples) - special.betaln(a, b))


def task_loss(chances: np.ndarray, samples) -> float:
    """The mean over questions of -ln(1 - (1 - p)^k): what approach 1 is fitted to.

    Args:
      chances: p, of each question in one sample, above 0; [questions].
      samples: k.
    """
    return float(-np.log(-np.expm1(samples * np.log1p(-np.asarray(chances, np.float64)))).mean())


def fit(points: Points, *, seed: int = 0, near: TrainToTest | None = None) -> TrainToTest:
    """Fits approach 1 by the sum of squares of the loss, from random starts, as the paper did.

    Args:
      points: with `samples`, not all the same.
      seed: of the starts.
      near: where to start instead, once.

    Raises:
      ValueError: all points have the same number of samples.
    """
    if points.samples is None or np.ptp(points.samples) == 0:
        raise ValueError("the worth of a sample can be fitted only to points with different numbers of samples")
    terms = np.zeros((len(points), 4, 7))
    for term, (constant, slope, values) in enumerate(((0, 3, points.params), (1, 4, points.tokens), (5, 6, points.samples))):
        terms[:, term, constant], terms[:, term, slope] = 1, -np.log(values)
    terms[:, 3, 2] = 1  # E
    starts = _random_starts(points, seed) if near is None else [_to_theta(near)]
    found = fit_log_sum(terms, points.loss, starts, np.inf, on_loss=True)
    a, b, e, alpha, beta, g, gamma = found.theta.tolist()
    return TrainToTest(math.exp(e), math.exp(a), math.exp(b), alpha, beta, math.exp(g), gamma)


def fit_task_loss(points: Points, deviations: np.ndarray) -> Chinchilla:
    """Chinchilla's law of a task's loss with one sample, as approach 2 asks for it.

    For each of the paper's 40 values of E the other constants by least squares, each point weighted by one over its variance; the
    best of the 40. (That E keeps a value of the grid is how its words were read here.)

    Args:
      points: of the task's loss.
      deviations: the standard error of each, [points]; only their ratios matter.

    Raises:
      ValueError: there are too few points, all have the same N or D, or a deviation is not above 0.
    """
    if np.min(deviations) <= 0:
        raise ValueError(f"points are weighted by one over their variance, and one has a deviation of {np.min(deviations):g}")
    log_params, log_tokens = np.log(points.params), np.log(points.tokens)
    deviations = np.asarray(deviations, np.float64) / np.mean(deviations)

    def terms(theta: np.ndarray) -> np.ndarray:
        a, b, alpha, beta = theta
        return np.exp([a - alpha * log_params, b - beta * log_tokens])

    def slopes(theta: np.ndarray) -> np.ndarray:
        of_params, of_tokens = terms(theta) / deviations
        return np.stack([of_params, of_tokens, -of_params * log_params, -of_tokens * log_tokens], axis=1)

    theta, best = chinchilla.to_theta(chinchilla.fit(points))[[0, 1, 3, 4]], None
    for floor in _TASK_FLOORS[::-1] * points.loss.min():
        residuals = lambda theta, floor=floor: (floor + terms(theta).sum(axis=0) - points.loss) / deviations
        found = optimize.least_squares(residuals, theta, jac=slopes, x_scale="jac", ftol=1e-14, xtol=1e-12, gtol=1e-14)
        theta = found.x  # where the next, lower E begins
        if best is None or found.cost < best[0]:
            best = found.cost, floor, theta
    _, floor, (a, b, alpha, beta) = best
    return Chinchilla(float(floor), math.exp(a), math.exp(b), float(alpha), float(beta))


def fit_accuracy(loss: np.ndarray, samples: np.ndarray, accuracy: np.ndarray) -> SampledAccuracy:
    """Fits approach 2 by the sum of squares of the accuracy.

    Args:
      loss: of the task, as Chinchilla's law gives it, [runs]. samples: k of each. accuracy: pass@k, as a share.

    Raises:
      ValueError: there are fewer than five runs.
    """
    loss, samples, accuracy = (np.asarray(value, np.float64) for value in (loss, samples, accuracy))
    if len(loss) < 5:
        raise ValueError(f"approach 2 has five constants and needs as many runs, got {len(loss)}")
    residuals = lambda theta: SampledAccuracy(*theta).accuracy(loss, samples) - accuracy
    bounds = ([-np.inf, 0, 1e-6, -20, -20], [np.inf, 50, 1 - 1e-9, 20, 20])
    best = None
    for middle in np.quantile(loss, [0.1, 0.5, 0.9]):
        for slope in (0.5, 2.0, 8.0):
            start = [middle, slope, 0.9, 0.0, 0.0]
            found = optimize.least_squares(residuals, start, bounds=bounds, x_scale="jac", ftol=1e-14, xtol=1e-12, gtol=1e-14)
            best = found if best is None or found.cost < best.cost else best
    return SampledAccuracy(*(float(value) for value in best.x))


def _to_theta(law: TrainToTest) -> np.ndarray:
    """(ln A, ln B, ln E, alpha, beta, ln G, gamma), in which the law is fitted."""
    return np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta, math.log(law.G), law.gamma])


def _random_starts(points: Points, seed: int) -> list[np.ndarray]:
    """Exponents of 0.1 to 1, and in the middle of the points each term is a random share of the loss."""
    generator, starts = np.random.RandomState(seed), []
    middles = [float(np.exp(np.log(values).mean())) for values in (points.params, points.tokens, points.samples)]
    for _ in range(_RESTARTS):
        shares = generator.dirichlet(np.ones(4)) * points.loss.mean()
        alpha, beta, gamma = generator.uniform(0.1, 1.0, 3)
        A, B, G = (
            float(share * middle**power) for share, middle, power in zip(shares[:3], middles, (alpha, beta, gamma), strict=True)
        )
        starts.append(_to_theta(TrainToTest(float(shares[3]), A, B, alpha, beta, G, gamma)))
    return starts


def _budgeted(params, training_flops, inference_flops):
    """(N, D, k) with both budgets used up."""
    tokens = training_flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params)
    return params, tokens, inference_flops / (INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN * params)
