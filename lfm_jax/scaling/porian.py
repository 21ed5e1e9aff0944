"""Porian et al. 2024 (arXiv 2406.19146): what separates Kaplan's compute-optimal exponent from Chinchilla's, step by step.

Range of the data: 5.2M to 902M parameters, budgets of 1.25e16 to 2.56e19 FLOPs, RefinedWeb and OpenWebText2. A sweep that leaves
out the head's FLOPs or warms up too long measures an exponent of 0.84 where 0.50 is right.
"""

from typing import NamedTuple

from lfm_jax.scaling.compute_optimal import PowerOptimum
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN

CHINCHILLA_FLOPS = 5.88e23


class Step(NamedTuple):
    """The exponent a of N* ~ C^a after a correction, with its 95 % bootstrap interval, on two corpora."""

    name: str
    refined_web: tuple[float, float, float]
    open_web_text: tuple[float, float, float]


# (a, low, high), the files data/summary_* of the paper's repository, formll/resolving-scaling-law-discrepancies.
STEPS = (
    Step("Kaplan's set-up", (0.8353, 0.824, 0.846), (0.8635, 0.819, 0.897)),
    Step("and the head's FLOPs counted", (0.7065, 0.691, 0.717), (0.6985, 0.664, 0.724)),
    Step("and warm-up in proportion to N", (0.6020, 0.591, 0.617), (0.6032, 0.570, 0.629)),
    Step("and the cosine as long as the run", (0.5715, 0.560, 0.589), (0.5743, 0.542, 0.606)),
    Step("or rate, batch and beta2 tuned, at a constant rate", (0.4969, 0.491, 0.505), (0.5185, 0.493, 0.541)),
)


def power_optimum(tokens_per_parameter: float, exponent: float, flops: float = CHINCHILLA_FLOPS) -> PowerOptimum:
    """The power law N* ~ C^exponent with that D* / N* at those FLOPs: N* = sqrt(C / (6 D*/N*)) there."""
    return PowerOptimum((flops / (FLOPS_PER_PARAMETER_AND_TOKEN * tokens_per_parameter)) ** 0.5, flops, exponent)


REFINED_WEB = power_optimum(16.5, 0.4969)
OPEN_WEB_TEXT = power_optimum(10.0, 0.5185)


def training_flops(body_params, head_params, tokens):
    """C = 6 (body + head) D: the head multiplies, an embedding only looks up.

    Args:
      body_params: those of the layers. head_params: width times vocabulary, also where the head shares the embedding's matrix.
      tokens: D.
    """
    return FLOPS_PER_PARAMETER_AND_TOKEN * (body_params + head_params) * tokens


def warmup_tokens(params):
    """Warm-up for as many tokens as there are parameters: a fixed number is most of a small model's run."""
    return params
