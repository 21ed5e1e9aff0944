"""The picture of the study: loss over tokens, the next trillion, cost over demand, tokens a parameter over demand."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.scaling_study import budgets
from experiments.scaling_study.costs import Costs
from experiments.scaling_study.laws import StudyLaw
from experiments.scaling_study.use import JOULES_PER_MWH
from lfm_jax.scaling import interval
from lfm_jax.scaling.chinchilla import Chinchilla
from lfm_jax.scaling.deployment import Prices, least_flops, tokens_for_demand


def plot(fitted: Sequence[StudyLaw], params: dict[str, int], costs: Costs, path: epath.Path) -> None:
    """Writes the PNG.

    Args:
      fitted: the laws with resamples. params: N of each model. costs: of the cost over demand.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.5), layout="constrained")
    (loss, gain), (cost, multiplier) = figure.subplots(2, 2)
    small = params[budgets.SMALLEST]
    _losses(loss, fitted, small)
    _gains(gain, fitted, small)
    _costs(cost, fitted[0], params, costs)
    _multipliers(multiplier, fitted, small, costs.served)
    for axes in (loss, gain, cost, multiplier):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _band(axes: Any, each: StudyLaw, xs: np.ndarray, of: Callable[[Chinchilla, float], Any], color: str) -> None:
    """A line, and where a law has resamples the middle 95 % of them."""
    axes.plot(xs, [float(of(each.law, x)) for x in xs], color=color, label=each.name)
    low, high = zip(*(interval(of(each.draws, x)) for x in xs), strict=True)
    axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def _mark(axes: Any, fitted: Sequence[StudyLaw], small: float) -> None:
    """Where the runs of the fits end, in tokens a parameter, and the 28T."""
    last = max(each.range.multiplier for each in fitted)
    axes.axvline(last * small, color="black", linestyle=":", linewidth=1)
    axes.text(last * small * 1.1, 0.97, f"M = {last:.0f}:\nno fit has more", transform=axes.get_xaxis_transform(), va="top",
              fontsize=8)  # fmt: skip
    axes.axvline(budgets.MOST_TOKENS, color="black", linestyle="--", linewidth=1)
    axes.text(budgets.MOST_TOKENS * 0.9, 0.97, "28T", transform=axes.get_xaxis_transform(), va="top", ha="right", fontsize=8)


def _losses(axes: Any, fitted: Sequence[StudyLaw], small: float) -> None:
    xs = np.geomspace(5e9, 5e13, 60)
    for number, each in enumerate(fitted):
        _band(axes, each, xs, lambda law, tokens: law.loss(small, tokens), f"C{number}")
        axes.axhline(each.law.loss(small, np.inf), color=f"C{number}", linewidth=0.8, linestyle=(0, (1, 3)))
    _mark(axes, fitted, small)
    title = f"{budgets.SMALLEST}: predicted loss, and with endless tokens (dotted)\neach law of its own texts: compare slopes"
    axes.set(xscale="log", xlabel="training tokens", ylabel="loss, nats a token", title=title)


def _gains(axes: Any, fitted: Sequence[StudyLaw], small: float) -> None:
    xs = np.geomspace(1e12, budgets.MOST_TOKENS, 40)
    gain = lambda law, tokens: law.loss(small, tokens) - law.loss(small, tokens + budgets.TRILLION)
    for number, each in enumerate(fitted):
        _band(axes, each, xs, gain, f"C{number}")
    axes.set(xscale="log", yscale="log", xlabel="training tokens so far", ylabel="nats a token",
             title=f"{budgets.SMALLEST}: what the next trillion tokens bring")  # fmt: skip
    axes.set_xticks((1e12, 2e12, 4e12, 7e12, 10e12, 20e12, 28e12), ("1T", "2T", "4T", "7T", "10T", "20T", "28T"))
    axes.minorticks_off()


def _costs(axes: Any, law: StudyLaw, params: dict[str, int], costs: Costs) -> None:
    """Training and devices together, in energy, for budgets of one loss and the optimal ones of the other sizes."""
    small = params[budgets.SMALLEST]
    larger, fewer = law.law.optimum(least_flops(law.law, law.law.loss(small, budgets.MOST_TOKENS)))
    compared = [(f"{budgets.SMALLEST}, 28T", small, budgets.MOST_TOKENS, "C3", "-"),
                (f"{larger / 1e9:.2f}B, optimal, same loss", float(larger), float(fewer), "C0", "-")]  # fmt: skip
    for number, (name, size) in enumerate(params.items()):
        compared.append((f"{name}, optimal", size, float(law.law.optimal_tokens(size)), f"C{4 + number}", "--"))
    demands = np.geomspace(1e10, 1e16, 200)
    prices = costs.on_devices
    for name, size, tokens, color, style in compared:
        total = size * (prices.training * tokens + prices.inference * demands) / JOULES_PER_MWH
        axes.plot(demands, total, style, color=color, label=f"{name} (loss {law.law.loss(size, tokens):.3f})")
    axes.set(xscale="log", yscale="log", xlabel="tokens decoded on devices, over the model's life", ylabel="MWh",
             title=f"training and devices together, by the law of {law.name}")  # fmt: skip


def _multipliers(axes: Any, fitted: Sequence[StudyLaw], small: float, served: Prices) -> None:
    xs = np.geomspace(1e11, 1e16, 60)
    for number, each in enumerate(fitted):
        _band(axes, each, xs, lambda law, demand: tokens_for_demand(law, small, demand, served) / small, f"C{number}")
    last = max(each.range.multiplier for each in fitted)
    axes.axhspan(last, 1e6, color="black", alpha=0.06, linewidth=0)
    axes.text(1.2e11, last * 1.15, f"beyond M = {last:.0f}: no fit", fontsize=8, va="bottom")
    axes.axhline(budgets.MOST_TOKENS / small, color="black", linestyle="--", linewidth=1)
    axes.text(1.2e11, budgets.MOST_TOKENS / small * 1.1, "28T", fontsize=8)
    axes.set(xscale="log", yscale="log", ylim=(5, 6e5), ylabel="tokens a parameter",
             xlabel=f"tokens served ({served.inference:g} N FLOPs each)",
             title=f"{budgets.SMALLEST}: for which training a demand asks (Sardana et al.)")  # fmt: skip
