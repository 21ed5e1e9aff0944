"""The planner of a training budget: on how many tokens to train a model of a size for a demand, by each scaling law."""

import dataclasses
from typing import Any

from etils import epath

from experiments.results import read_results, write_results
from experiments.scaling_study import laws
from experiments.scaling_study.costs import Costs
from experiments.scaling_study.laws import StudyLaw
from experiments.scaling_study.tables import amount, estimate, power, powers, times
from lfm_jax.configuration import ConfigError, mistakes_in
from lfm_jax.models import preset
from lfm_jax.models.accounting import parameter_count
from lfm_jax.scaling import repeated_data
from lfm_jax.scaling.deployment import FLOPS, implied_demand, tokens_for_demand

_QUANTITIES = {"multiplier": "tokens a parameter are", "tokens": "tokens are", "params": "parameters are"}
_WIDTH = 150
_SAME_SIZE = 0.1  # by which share a planned model's N may differ from the one asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """params: N, with embeddings. inference_tokens: the demand over the model's life; 0 gives compute-optimal training.

    tokens: a budget that one has in mind, None for none: its loss, and the demand that it would be right for.
    unique_tokens: different tokens that there are, None for enough. plan: a workdir of configs/pod_plan.py with a model of this
    size, for chip-hours; None counts FLOPs at the share of the peak that costs has.
    laws: a file of laws as configs/scaling_study.py writes it, None for the recorded one.
    """

    params: float = 350e6
    inference_tokens: float = 1e15
    tokens: float | None = None
    unique_tokens: float | None = None
    plan: str | None = None
    laws: str | None = None
    costs: Costs = Costs()

    def __post_init__(self):
        for name in ("params", "tokens", "unique_tokens"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero, got {getattr(self, name)}")
        if not self.inference_tokens >= 0:
            raise ValueError(f"inference_tokens must be at least 0, got {self.inference_tokens}")


def main(config: Config, workdir: epath.Path) -> None:
    """Prints the budget by each law with what it costs, and warnings; writes them to results.json.

    Raises:
      ConfigError: the laws or the plan cannot be read, or the plan has no model of this size that fits.
    """
    from rich.console import Console

    with mistakes_in("laws"):
        file = laws.RECORDED / laws.FILE if config.laws is None else epath.Path(config.laws)
        found = (*laws.read(file), *laws.PRINTED)
    planned = _planned(config)
    rows = [_row(config, each, planned) for each in found]
    warnings = _warnings(config, found, rows)
    console = Console()
    console.width = max(console.width, _WIDTH)  # in a narrower window the table breaks, in a log it is whole
    _print(config, rows, warnings, planned, console)
    tokens = [row["tokens"].value for row in rows]
    device = _device(config)
    figures = {
        "budgets": rows, "warnings": warnings, "chip_hours_from": _chip_hours_from(config, planned), **device,
        "least_tokens": min(tokens), "most_tokens": max(tokens),
    }  # fmt: skip
    write_results(workdir, figures, config)


def _planned(config: Config) -> dict[str, Any] | None:
    """The plan of this size that takes the fewest chip-hours."""
    if config.plan is None:
        return None
    with mistakes_in("plan"):
        plans = [plan for plan in read_results(config.plan).get("plans", ()) if plan["fits"]]
    sizes = {name: parameter_count(preset(name)) for name in {plan["preset"] for plan in plans}}
    near = [plan for plan in plans if abs(sizes[plan["preset"]] / config.params - 1) <= _SAME_SIZE]
    if not near:
        raise ConfigError(
            f"--config.plan: {config.plan} has no plan that fits of a model of about {amount(config.params)} parameters "
            f"(it has {', '.join(f'{name} with {amount(size)}' for name, size in sizes.items()) or 'none'}); plan one with "
            "configs/pod_plan.py"
        )
    return max(near, key=lambda plan: plan["tokens_per_second_per_chip"])


def _row(config: Config, each: StudyLaw, planned: dict[str, Any] | None) -> dict[str, Any]:
    params, demand, costs = config.params, config.inference_tokens, config.costs
    recommended = lambda law: tokens_for_demand(law, params, demand, costs.served)
    tokens = each.estimate(recommended)
    flops = FLOPS.training * params * tokens.value
    hours = costs.chip_hours(flops) if planned is None else tokens.value / planned["tokens_per_second_per_chip"] / 3600
    row = {
        "law": each.name, "tokens": tokens, "tokens_per_parameter": tokens.value / params,
        "loss": each.estimate(lambda law: law.loss(params, recommended(law))), "training_flops": flops, "chip_hours": hours,
        "inference_flops": FLOPS.inference * params * demand,
        "tokens_on_devices": each.estimate(lambda law: tokens_for_demand(law, params, demand, costs.on_devices)),
        "beyond": each.beyond(params, tokens.value),
    }  # fmt: skip
    if config.tokens is not None:
        row |= {
            "loss_of_tokens": each.estimate(lambda law: law.loss(params, config.tokens)),
            "demand_of_tokens": each.estimate(lambda law: implied_demand(law, params, config.tokens, costs.served)),
            "demand_of_tokens_on_devices": each.estimate(
                lambda law: implied_demand(law, params, config.tokens, costs.on_devices)
            ),
        }
    if config.unique_tokens is not None:
        law, seen = repeated_data.MUENNIGHOFF, tokens.value
        row["loss_by_repetition"] = float(
            law.loss(params, seen, min(config.unique_tokens, seen)) - law.loss(params, seen, seen)
        )
    return row


def _warnings(config: Config, found: tuple[StudyLaw, ...], rows: list[dict[str, Any]]) -> list[str]:
    """Where laws are asked beyond their runs: by what they recommend, and by the budget that one has in mind."""
    asked = {"the budgets": [(each, row["tokens"].value) for each, row in zip(found, rows, strict=True)]}
    if config.tokens is not None:
        asked[f"{amount(config.tokens)} tokens"] = [(each, config.tokens) for each in found]
    said = []
    for what, pairs in asked.items():
        for key, name in _QUANTITIES.items():
            beyond = {each.name: each.beyond(config.params, tokens)[key] for each, tokens in pairs}
            exceeded = {law: factor for law, factor in beyond.items() if factor > 1}
            if exceeded:
                how = f"{min(exceeded.values()):,.3g} to {max(exceeded.values()):,.3g} times"
                said.append(f"{what}: {name} beyond the runs of {_those(exceeded, found)}, {how}")
    return said


def _those(exceeded: dict[str, float], found: tuple[StudyLaw, ...]) -> str:
    return f"all {len(found)} laws" if len(exceeded) == len(found) else ", ".join(exceeded)


def _device(config: Config) -> dict[str, float]:
    """What a decoded token costs the device, its cache left out."""
    read = config.params * config.costs.weight_bits / 8
    device = config.costs.device
    return {"device_token_bytes": read, "device_token_seconds": device.seconds(read), "device_token_joules": device.joules(read)}


def _chip_hours_from(config: Config, planned: dict[str, Any] | None) -> str:
    if planned is not None:
        return f"the plan of {planned['preset']} on {planned['topology']}, an estimate"
    return f"6 N D at {100 * config.costs.mfu_share:g} % of a {config.costs.chip}'s peak"


def _print(config: Config, rows: list[dict], warnings: list[str], planned: dict[str, Any] | None, console: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{amount(config.params)} parameters for {power(config.inference_tokens)} tokens of demand")
    columns = {
        "law": lambda row: row["law"], "tokens, 1e12": lambda row: estimate(row["tokens"], ".3g", 1e12),
        "a parameter": lambda row: f"{row['tokens_per_parameter']:,.0f}", "loss": lambda row: estimate(row["loss"]),
        "training FLOPs": lambda row: power(row["training_flops"]), "chip-hours": lambda row: f"{row['chip_hours']:,.0f}",
        "M beyond": lambda row: times(row["beyond"]["multiplier"]),
        "in energy on devices, 1e12": lambda row: estimate(row["tokens_on_devices"], ".3g", 1e12),
    }  # fmt: skip
    if config.tokens is not None:
        columns |= {
            f"loss at {amount(config.tokens)}": lambda row: estimate(row["loss_of_tokens"]),
            "right at a demand of": lambda row: powers(row["demand_of_tokens"]),
        }
    if config.unique_tokens is not None:
        columns["repetition, nats"] = lambda row: f"{row['loss_by_repetition']:.4f}"
    for name in columns:
        table.add_column(name, justify="left" if name == "law" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)
    device = _device(config)
    for line in (
        "Tokens with which this size is the cheapest model of its loss, training and inference together; in brackets the middle",
        "95 % of resamples, which say nothing of whether a law holds beyond its runs.",
        f"Served: whoever trains pays both. Chip-hours: {_chip_hours_from(config, planned)}.",
        f"On devices: users pay {device['device_token_seconds'] * 1e3:.1f} ms and {device['device_token_joules']:.3f} J a token.",
        *(f"Extrapolated: {warning}." for warning in warnings),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
