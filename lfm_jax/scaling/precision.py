"""Precision: Kumar et al. 2024 (arXiv 2411.04330, ICLR 2025), what few bits cost in training and after it.

Range of the data: 30M to 220M parameters (without embeddings), 1.5B to 26B tokens, at most a thousand tokens a parameter;
rounding after training by GPTQ. The authors say that the constants are unlikely to be useful elsewhere: that the cost of rounding
grows with the tokens that a parameter has seen is the finding. The biases that their Table 2 gives with four of the constants are
left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN, Points
from lfm_jax.scaling.fitting import fit_near

FULL_BITS = 16.0


class Precision(NamedTuple):
    """L = A / N_eff^alpha + B / D^beta + E + d_PTQ: training in few bits, and rounding after it."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma_weights: float
    gamma_activations: float
    gamma_cache: float
    C_T: float
    gamma_D: float
    gamma_N: float
    gamma_post: float

    def effective_params(self, params, weight_bits=FULL_BITS, activation_bits=FULL_BITS, cache_bits=FULL_BITS):
        """N_eff = N times the product of 1 - exp(-P / gamma) over weights, activations and the KV cache of the training."""
        share = 1.0
        for bits, gamma in (
            (weight_bits, self.gamma_weights),
            (activation_bits, self.gamma_activations),
            (cache_bits, self.gamma_cache),
        ):
            share = share * -np.expm1(-np.asarray(bits, np.float64) / gamma)
        return np.asarray(params, np.float64) * share

    def degradation(self, params, tokens, weight_bits):
        """d_PTQ = C_T (D^gamma_D / N^gamma_N) exp(-P / gamma_post), in nats: rounding the weights to P bits after training."""
        params, tokens = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        grown = tokens**self.gamma_D * params**-self.gamma_N
        return self.C_T * grown * np.exp(-np.asarray(weight_bits, np.float64) / self.gamma_post)

    def loss(self, params, tokens, **training_bits):
        """The loss before any rounding; `training_bits` are those of `effective_params`."""
        effective = self.effective_params(params, **training_bits)
        return self.E + self.A * effective**-self.alpha + self.B * np.asarray(tokens, np.float64) ** -self.beta

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`: trained in full precision, and then rounded to `weight_bits` where the points have them."""
        loss = self.loss(points.params, points.tokens)
        bits = points.weight_bits
        return loss if bits is None else loss + self.degradation(points.params, points.tokens, bits)


# Table 2 of the paper.
KUMAR = Precision(2.7648, 4.299e3, 1.806e4, 0.4965, 0.4965, 2.6745, 2.2102, 0.9578, 0.0598, 0.5068, 0.3439, 0.5907)


class Degradation(NamedTuple):
    """d_PTQ alone, for points whose `loss` is the loss that rounding added: C_T (D^gamma_D / N^gamma_N) exp(-P / gamma_post)."""

    C_T: float
    gamma_D: float
    gamma_N: float
    gamma_post: float

    def predict(self, points: Points) -> np.ndarray:
        """As `fitting.Law`, in nats."""
        return KUMAR._replace(**self._asdict()).degradation(points.params, points.tokens, points.weight_bits)


def fit_degradation(points: Points, starts: Sequence[Degradation] | None = None) -> Degradation:
    """Fits the cost of rounding by Huber's function of its logarithm.

    Args:
      points: with `weight_bits`, and as `loss` what rounding added to it.
      starts: the paper's constants where it is None.

    Raises:
      ValueError: the points have no bits.
    """
    if points.weight_bits is None:
        raise ValueError("the cost of rounding is fitted to points with weight_bits, and these have none")
    paper = Degradation(KUMAR.C_T, KUMAR.gamma_D, KUMAR.gamma_N, KUMAR.gamma_post)
    return fit_near(starts or (paper,), points)


def training_flops(params, tokens, bits):
    """C = (6 / 16) N D P: FLOPs of 16 bits that take as long, where time goes with the bits."""
    return FLOPS_PER_PARAMETER_AND_TOKEN / FULL_BITS * params * tokens * bits
