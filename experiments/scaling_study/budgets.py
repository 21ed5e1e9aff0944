"""What the laws say of three sizes: their optimum, the loss over tokens, the next trillion, the demand that a budget is for."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.scaling_study.costs import Costs
from experiments.scaling_study.laws import Estimate, StudyLaw
from lfm_jax.models import preset
from lfm_jax.models.accounting import parameter_groups
from lfm_jax.scaling import FLOPS_PER_PARAMETER_AND_TOKEN, distillation, overtraining
from lfm_jax.scaling.deployment import (
    Prices,
    break_even,
    implied_demand,
    least_flops,
    same_gain_params,
    tokens_for_demand,
)

MODELS = ("lfm2_350m", "lfm2_1_2b", "lfm2_2_6b")
SMALLEST = MODELS[0]
MOST_TOKENS = 28e12  # of LFM2.5-350M
TRILLION = 1e12
TOKENS = (1e12, 2e12, 4e12, 7e12, 10e12, 14e12, 20e12, MOST_TOKENS)
DEMANDS = (1e13, 1e14, 1e15, 1e16)
NEXT = (1e12, 4e12, 10e12, 27e12)
DISTILLATION_TOKENS = 512e9  # at most, in the runs of Busbridge et al. 2025
_ERRORS = (
    ("C4", overtraining.C4, overtraining.C4_ERROR),
    ("RedPajama", overtraining.RED_PAJAMA, overtraining.RED_PAJAMA_ERROR),
    ("RefinedWeb", overtraining.REFINED_WEB, overtraining.REFINED_WEB_ERROR),
)
# Tokens a second on 512 chips of v5p (v5p:8x8x8), estimated by the pod planner: docs/benchmarks/pod_plan.md.
PLANNED_CHIP, PLANNED_CHIPS = "v5p", 512
PLANNED_TOKENS_PER_SECOND = {"lfm2_350m": 49_918_024, "lfm2_1_2b": 18_364_939, "lfm2_2_6b": 9_290_790}


def sizes() -> dict[str, int]:
    """N of each model, embeddings counted once."""
    return {name: sum(_groups(name).values()) for name in MODELS}


def body_params(name: str) -> int:
    """N without embeddings, which the laws of rounding and of distillation count."""
    return sum(_groups(name).values()) - _groups(name)["embeddings"]


@functools.cache
def _groups(name: str) -> dict[str, int]:
    return parameter_groups(preset(name))


def chip_hours(name: str, tokens: float) -> float:
    """Of training a model, by the pod planner's estimate."""
    return tokens / PLANNED_TOKENS_PER_SECOND[name] * PLANNED_CHIPS / 3600


def training_flops(params: float, tokens: float) -> float:
    """6 N D."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens


def fits(laws: Sequence[StudyLaw]) -> list[dict[str, Any]]:
    """Constants, their intervals, and how far the runs reached."""
    return [
        {
            "law": each.name, "source": each.source, "points": each.points,
            **{key: each.estimate(lambda law, key=key: getattr(law, key)) for key in each.law._fields},
            "most_tokens": each.range.tokens, "most_multiplier": each.range.multiplier,
        }
        for each in laws
    ]  # fmt: skip


def optima(laws: Sequence[StudyLaw], params: dict[str, int]) -> list[dict[str, Any]]:
    """The tokens for which each size is compute-optimal."""
    rows = []
    for name, size in params.items():
        for each in laws:
            tokens = each.estimate(lambda law, size=size: law.optimal_tokens(size))
            rows.append(
                {
                    "model": name, "law": each.name, "tokens": tokens, "tokens_per_parameter": _over(tokens, size),
                    "flops": training_flops(size, tokens.value),
                    "loss": each.estimate(lambda law, size=size: law.loss(size, law.optimal_tokens(size))),
                }
            )  # fmt: skip
    return rows


def losses(laws: Sequence[StudyLaw], params: dict[str, int]) -> list[dict[str, Any]]:
    """The loss by tokens, `limit` that of endless ones, and how far beyond the runs of the fit the last column is."""
    rows = []
    for name, size in params.items():
        for each in laws:
            at = {_trillions(tokens): each.estimate(_loss(size, tokens)) for tokens in TOKENS}
            limit = each.estimate(_loss(size, np.inf))
            rows.append({"model": name, "law": each.name, **at, "limit": limit, "beyond": each.beyond(size, MOST_TOKENS)})
    return rows


def next_trillion(laws: Sequence[StudyLaw], params: dict[str, int]) -> list[dict[str, Any]]:
    """Nats that the next trillion tokens bring, the same at every size; the share by which each N would have to grow for them."""
    rows = []
    for each in laws:
        row: dict[str, Any] = {"law": each.name}
        for tokens in NEXT:
            row[_trillions(tokens)] = each.estimate(_gain(tokens, tokens + TRILLION))
            for name, size in params.items():
                row[f"{_trillions(tokens)}_{name}_share"] = float(same_gain_params(each.law, size, tokens, TRILLION))
        row["10T_to_28T"] = each.estimate(_gain(10e12, MOST_TOKENS))
        rows.append(row)
    return rows


def next_trillion_coupled() -> list[dict[str, Any]]:
    """The same by a law in which size and tokens are not apart: Busbridge et al. 2025, supervised, N without embeddings."""
    rows = []
    for name in MODELS:
        size, loss = body_params(name), distillation.SUPERVISED.loss
        row: dict[str, Any] = {"model": name}
        row |= {_trillions(tokens): float(loss(size, tokens) - loss(size, tokens + TRILLION)) for tokens in NEXT}
        row["10T_to_28T"] = float(loss(size, 10e12) - loss(size, MOST_TOKENS))
        rows.append({**row, "beyond_tokens": MOST_TOKENS / DISTILLATION_TOKENS})
    return rows


def equals(laws: Sequence[StudyLaw], params: float, tokens: float, costs: Costs) -> list[dict[str, Any]]:
    """The compute-optimal model of the same loss, and from which demand the smaller one has cost less in all."""

    def optimum(law: Any):
        return law.optimum(least_flops(law, law.loss(params, tokens)))

    spent, on_devices = training_flops(params, tokens), costs.on_devices
    wanted: dict[str, Callable] = {
        "loss": _loss(params, tokens),
        "params": lambda law: optimum(law)[0],
        "tokens": lambda law: optimum(law)[1],
        "multiplier": lambda law: optimum(law)[1] / optimum(law)[0],
        "training_ratio": lambda law: spent / least_flops(law, law.loss(params, tokens)),
        "params_ratio": lambda law: optimum(law)[0] / params,
        "break_even_tokens": lambda law: break_even(params, tokens, *optimum(law), costs.served),
        "break_even_tokens_on_devices": lambda law: break_even(params, tokens, *optimum(law), on_devices),
        "implied_demand": lambda law: implied_demand(law, params, tokens, costs.served),
        "implied_demand_on_devices": lambda law: implied_demand(law, params, tokens, on_devices),
    }
    return [
        {
            "law": each.name, **{key: each.estimate(figure) for key, figure in wanted.items()},
            "beyond": each.beyond(params, tokens),
        }
        for each in laws
    ]  # fmt: skip


def demanded(laws: Sequence[StudyLaw], params: float, prices: Prices) -> list[dict[str, Any]]:
    """The tokens on which N parameters are the cheapest model of their loss, by demand."""
    rows = []
    for each in laws:
        tokens = {demand_name(demand): each.estimate(_tokens(params, demand, prices)) for demand in DEMANDS}
        rows.append({"law": each.name, **{key: _over(value, params) for key, value in tokens.items()}})
    return rows


def errors(params: float) -> list[dict[str, Any]]:
    """The mean error over Gadre et al.'s 17 tasks, from the loss by their printed constants: a share."""
    rows = []
    for corpus, law, error in _ERRORS:
        found = {_trillions(tokens): law.as_chinchilla().loss(params, tokens) for tokens in (1e12, 10e12, MOST_TOKENS)}
        rows.append({"corpus": corpus, **{key: float(error.error(loss)) for key, loss in found.items()}})
    return rows


def demand_name(demand: float) -> str:
    """As 1e13, in the names of figures."""
    return f"{demand:.0e}".replace("e+", "e")


def _loss(params: float, tokens: float) -> Callable:
    return lambda law: law.loss(params, tokens)


def _gain(tokens: float, more: float) -> Callable:
    return lambda law: law.data_term(tokens) - law.data_term(more)


def _trillions(tokens: float) -> str:
    return f"{tokens / TRILLION:g}T"


def _tokens(params: float, demand: float, prices: Prices) -> Callable:
    return lambda law: tokens_for_demand(law, params, demand, prices)


def _over(estimate: Estimate, divisor: float) -> Estimate:
    return Estimate(*(None if value is None else value / divisor for value in estimate))
