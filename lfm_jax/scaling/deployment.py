"""A budget seen from its use: the demand for which it is right, the demand from which it pays, and a token's cost on a device.

All of it is algebra on a law of the loss; nothing here knows how far beyond its data a law is asked. Sardana et al. 2024
(arXiv 2401.00448) search for the cheapest model of a given quality (`inference_aware.cheapest`); the condition that its result
fulfils is a formula, which these functions solve for the demand and for the tokens.
"""

from typing import NamedTuple

import numpy as np

from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN
from lfm_jax.scaling.inference_aware import INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN

_ITERATIONS = 60


class Prices(NamedTuple):
    """Of a parameter and token, in training and in inference, in one unit: FLOPs, dollars, joules."""

    training: float
    inference: float


FLOPS = Prices(FLOPS_PER_PARAMETER_AND_TOKEN, INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN)


class Device(NamedTuple):
    """Decodes one sequence at a time, so that reading the weights is what a token costs.

    bytes_per_second: that it reads in decoding. joules_per_byte: for all that the byte entails, arithmetic included.
    """

    bytes_per_second: float
    joules_per_byte: float

    def seconds(self, bytes_read):
        """Of a token for which so many bytes are read."""
        return bytes_read / self.bytes_per_second

    def joules(self, bytes_read):
        """Of the same token."""
        return bytes_read * self.joules_per_byte


def least_flops(law: Chinchilla, loss):
    """C at which the compute-optimal model comes to the loss; infinite where that is not above E.

    With N* and D* of `Chinchilla.optimum` the loss is E + (A / G^alpha + B G^beta) (C / 6)^(-alpha beta / (alpha + beta)).
    """
    reducible = np.maximum(np.asarray(loss, np.float64) - law.E, 0)
    scale = law.A * law.balance**-law.alpha + law.B * law.balance**law.beta
    with np.errstate(divide="ignore"):
        return FLOPS_PER_PARAMETER_AND_TOKEN * (reducible / scale) ** -(1 / law.alpha + 1 / law.beta)


def implied_demand(law: Chinchilla, params, tokens, prices: Prices = FLOPS):
    """D_inference for which N parameters on D tokens are the cheapest model of their loss.

    On a line of equal loss dD/dN = -(D / N) r with r = alpha A N^-alpha / (beta B D^-beta), so the cost N (p D + q D_inference)
    is least where q D_inference = p D (r - 1). Below zero for fewer tokens than are compute-optimal: no demand makes that right.
    """
    ratio = law.alpha * law.A * np.power(params, -law.alpha) / (law.beta * law.data_term(tokens))
    return prices.training / prices.inference * tokens * (ratio - 1)


def tokens_for_demand(law: Chinchilla, params, inference_tokens, prices: Prices = FLOPS):
    """The D with which N parameters are the cheapest model of their loss at that demand: the inverse of `implied_demand`.

    It is the root of k D^(1 + beta) - D - (q / p) D_inference, a convex function, to which Newton's steps come from above.
    """
    k = law.alpha * law.A * np.power(params, -law.alpha) / (law.beta * law.B)
    served = prices.inference / prices.training * np.asarray(inference_tokens, np.float64)
    tokens = np.maximum((2 / k) ** (1 / law.beta), (2 * served / k) ** (1 / (1 + law.beta)))
    for _ in range(_ITERATIONS):
        grown = k * tokens**law.beta
        tokens = tokens - (tokens * (grown - 1) - served) / ((1 + law.beta) * grown - 1)
    return tokens


def break_even(params, tokens, larger_params, larger_tokens, prices: Prices = FLOPS):
    """D_inference from which the smaller model, trained for longer, has cost less in all than the larger one.

    Zero or below where its training alone is no dearer.

    Raises:
      ValueError: the larger model has not more parameters, so that serving it costs no more.
    """
    saved = np.asarray(larger_params, np.float64) - params
    if (saved <= 0).any():
        raise ValueError(f"the larger model must have more parameters than {params:g}, got {np.min(larger_params):g}")
    return prices.training * (params * tokens - larger_params * larger_tokens) / (prices.inference * saved)


def same_gain_params(law: Chinchilla, params, tokens, more_tokens):
    """By how much N would have to grow, as a share of it, for the gain that `more_tokens` beyond D bring."""
    gain = law.data_term(tokens) - law.data_term(np.asarray(tokens, np.float64) + more_tokens)
    return (1 - gain / (law.A * np.power(params, -law.alpha))) ** (-1 / law.alpha) - 1
