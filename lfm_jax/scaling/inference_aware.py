"""The size to train when answers are counted too: Sardana et al. 2024 (arXiv 2401.00448, ICML 2024).

Range of the data: 150M to 6B parameters, up to 10,000 tokens a parameter. A law fitted to at most 100 tokens a parameter promises
too much at extreme ratios, as they found, and the optimum goes as far as the demand tells it to.
"""

from typing import NamedTuple, Protocol

import numpy as np
from scipy import optimize

from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN

INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN = 2.0
# With these, and not with the printed 0.34 and 0.28, both examples of the paper come out.
SARDANA = Chinchilla(1.69, 406.4, 410.7, 0.336, 0.283)


class Invertible(Protocol):
    """A law that says how many tokens a loss takes."""

    E: float
    A: float
    alpha: float

    def tokens_for(self, loss: float, params):
        """The D at which N parameters reach the loss."""
        ...


class Budget(NamedTuple):
    """N, D and what training and inference cost together: FLOPs, or what the two prices are in."""

    params: float
    tokens: float
    cost: float


def cheapest(
    law: Invertible,
    loss: float,
    inference_tokens: float,
    *,
    training_price: float = FLOPS_PER_PARAMETER_AND_TOKEN,
    inference_price: float = INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN,
) -> Budget:
    """argmin over N of training_price N D + inference_price N D_inference, subject to L(N, D) = loss.

    There is no closed form; D follows from N, and N is searched.

    Args:
      law: such as `chinchilla.Chinchilla`.
      loss: to be reached, in nats a token.
      inference_tokens: D_inference, the demand over the model's life; 0 gives the compute-optimal training.
      training_price: for a parameter and token; 6 FLOPs, or these times dollars a FLOP over the utilisation.
      inference_price: the same of inference.

    Raises:
      ValueError: the loss is not above the law's E, so no model reaches it.
    """
    if loss <= law.E:
        raise ValueError(f"no model reaches a loss of {loss:.4f}: the law's E is {law.E:.4f}")
    smallest = np.log((law.A / (loss - law.E)) ** (1 / law.alpha))  # with it the loss takes infinitely many tokens

    def log_cost(log_params: float) -> float:
        params = np.exp(log_params)
        with np.errstate(divide="ignore"):
            cost = training_price * law.tokens_for(loss, params) + inference_price * inference_tokens
            return float(log_params + np.log(cost))

    grid = smallest + np.geomspace(1e-9, 20, 400)
    nearest = int(np.argmin([log_cost(value) for value in grid]))
    bounds = grid[max(nearest - 1, 0)], grid[min(nearest + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(log_cost, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    params = float(np.exp(found.x))
    return Budget(params, float(law.tokens_for(loss, params)), float(np.exp(found.fun)))


def compute_optimal_loss(law: Chinchilla, params: float) -> float:
    """The quality of "a Chinchilla model of N parameters": its loss with the tokens for which it is compute-optimal."""
    return float(law.loss(params, law.optimal_tokens(params)))


def saving(law: Chinchilla, params: float, inference_tokens: float) -> float:
    """The share of all FLOPs that the cheapest model of equal quality saves against the compute-optimal one of N parameters."""
    plain = params * (
        FLOPS_PER_PARAMETER_AND_TOKEN * law.optimal_tokens(params) + INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN * inference_tokens
    )
    return float(1 - cheapest(law, compute_optimal_loss(law, params), inference_tokens).cost / plain)
