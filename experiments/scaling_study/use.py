"""What a trained model costs, apart for who trains it and for the devices that run it; and several samples in place of size."""

import math
from collections.abc import Sequence
from typing import Any

from experiments.scaling_study import budgets
from experiments.scaling_study.costs import Costs
from experiments.scaling_study.laws import StudyLaw
from lfm_jax.models import preset
from lfm_jax.models.accounting import cache_bytes, training_flops_per_token
from lfm_jax.scaling.deployment import FLOPS, Prices, least_flops
from lfm_jax.scaling.train_to_test import SampledAccuracy

JOULES_PER_MWH = 3.6e9
# Roberts et al. 2026, table 1 (C_train 2.56e19, C_inference 2e9 FLOPs): task, N and pass@k in % of the best over-trained model,
# and of the compute-optimal one.
_TEST_TIME_FLOPS, _TEST_TIME_TRAINING_FLOPS = 2e9, 2.56e19
_TEST_TIME = (
    ("LAMBADA", 37e6, 49.90, 455e6, 27.30), ("OpenBookQA", 37e6, 1.40, 901e6, 0.30), ("SciQ", 37e6, 1.20, 611e6, 0.22),
    ("ARC-Easy", 149e6, 0.14, 611e6, 0.07),
)  # fmt: skip
_MEAN_CHANCE = 0.3
_SPREADS = (0.5, 2.0, 8.0)


def trainers(params: dict[str, int]) -> list[dict[str, Any]]:
    """What whoever trains pays for each size on 28T tokens and for the next trillion, by the pod planner's estimate."""
    rows = []
    for name, size in params.items():
        exact = training_flops_per_token(preset(name), 4096)
        hours = budgets.chip_hours(name, budgets.MOST_TOKENS)
        rows.append(
            {
                "model": name, "params": size, "flops_of_6ND": budgets.training_flops(size, budgets.MOST_TOKENS),
                "model_flops": exact * budgets.MOST_TOKENS, "chip_hours": hours,
                "days": hours / budgets.PLANNED_CHIPS / 24,
                "chip_hours_of_a_trillion": budgets.chip_hours(name, budgets.TRILLION),
            }
        )  # fmt: skip
    return rows


def devices(params: dict[str, int], larger: float, costs: Costs) -> list[dict[str, Any]]:
    """What a decoded token costs the device: bytes, seconds, joules, tokens that a battery lasts for.

    The last row is a model of `larger` parameters of which no more is known, so its cache is left out.
    """
    rows = []
    reads = {name: size * costs.weight_bits / 8 + _cache(name, costs) for name, size in params.items()}
    reads |= {f"{larger / 1e9:.2f}B, without its cache": larger * costs.weight_bits / 8}
    for (model, read), size in zip(reads.items(), (*params.values(), larger), strict=True):
        joules = costs.device.joules(read)
        rows.append(
            {
                "model": model, "file_bytes": size * costs.weight_bits / 8, "read_bytes": read,
                "milliseconds": 1000 * costs.device.seconds(read), "tokens_per_second": 1 / costs.device.seconds(read),
                "joules": joules, "battery_tokens": costs.battery_joules / joules,
            }
        )  # fmt: skip
    return rows


def _cache(name: str, costs: Costs) -> float:
    """Bytes that a token reads of its sequence's cache, in bfloat16."""
    return cache_bytes(preset(name)).total(costs.context, preset(name).sliding_window)


def totals(law: StudyLaw, params: dict[str, int], costs: Costs) -> list[dict[str, Any]]:
    """Budgets side by side: loss, training, and what training and inference come to at each demand, served and on devices."""
    small = params[budgets.SMALLEST]
    loss = law.law.loss(small, budgets.MOST_TOKENS)
    larger, fewer = (float(value) for value in law.law.optimum(least_flops(law.law, loss)))
    compared = [(f"{budgets.SMALLEST}, 28T", small, budgets.MOST_TOKENS), (f"{budgets.SMALLEST}, 1T", small, budgets.TRILLION)]
    compared.append((f"{larger / 1e9:.2f}B, optimal, of the first one's loss", larger, fewer))
    compared += [(f"{name}, optimal", size, float(law.law.optimal_tokens(size))) for name, size in params.items()]
    rows = []
    for name, size, tokens in compared:
        row = {"budget": name, "tokens": tokens, "loss": float(law.law.loss(size, tokens))}
        row |= {"training_flops": budgets.training_flops(size, tokens)}
        row |= {"training_mwh": row["training_flops"] * costs.joules_per_flop / JOULES_PER_MWH}
        for demand in budgets.DEMANDS:
            row[f"flops_{budgets.demand_name(demand)}"] = _total(size, tokens, demand, costs.served)
            row[f"mwh_{budgets.demand_name(demand)}"] = _total(size, tokens, demand, costs.on_devices) / JOULES_PER_MWH
        rows.append(row)
    return rows


def _total(params: float, tokens: float, demand: float, prices: Prices) -> float:
    return params * (prices.training * tokens + prices.inference * demand)


def samples(law: StudyLaw, params: dict[str, int], costs: Costs) -> list[dict[str, Any]]:
    """How many answers of the smallest model cost as much as one of a larger model.

    By FLOPs, k = N_larger / N; on a device k answers that are drawn together read the weights once and a cache each.
    """
    small, cache = params[budgets.SMALLEST], _cache(budgets.SMALLEST, costs)
    loss = law.law.loss(small, budgets.MOST_TOKENS)
    spent = budgets.training_flops(small, budgets.MOST_TOKENS)
    rows = []
    for name, flops in (("the same loss", least_flops(law.law, loss)), ("the same training FLOPs", spent)):
        larger, tokens = (float(value) for value in law.law.optimum(flops))
        together = (larger - small) * costs.weight_bits / 8 / cache
        found = {"compared_with": name, "params": larger, "tokens": tokens, "loss": float(law.law.loss(larger, tokens))}
        rows.append({**found, "samples": larger / small, "samples_on_device": together})
    return rows


def sampled_accuracy(samples: Sequence[float]) -> list[dict[str, Any]]:
    """pass@k of questions whose chances are Beta-distributed around 0.3, three spreads: an illustration, fitted to nothing."""
    rows = []
    for spread in _SPREADS:
        law = SampledAccuracy(0.0, 0.0, 2 * _MEAN_CHANCE, math.log(spread), 0.0)  # a mean of 0.3 and a + b = spread at any loss
        rows.append({"spread": spread, **{f"k={k:.3g}": float(law.accuracy(0.0, k)) for k in (1, *samples)}})
    return rows


def published_samples() -> list[dict[str, Any]]:
    """Table 1 of Roberts et al. 2026, with the samples that each model's share of 2e9 FLOPs makes."""
    of = lambda params: _TEST_TIME_FLOPS / (FLOPS.inference * params)
    return [
        {"task": task, "params": small, "multiplier": _TEST_TIME_TRAINING_FLOPS / (FLOPS.training * small**2),
         "samples": of(small), "pass_percent": over, "optimal_params": large,
         "optimal_samples": of(large), "optimal_pass_percent": optimal}
        for task, small, over, large, optimal in _TEST_TIME
    ]  # fmt: skip
