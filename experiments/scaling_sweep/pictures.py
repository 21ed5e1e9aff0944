"""The picture of a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.scaling_sweep.grid import COLUMN_WIDTH
from lfm_jax.scaling.chinchilla import Chinchilla


def plot(points: Sequence[dict[str, Any]], figures: dict[str, Any], path: epath.Path) -> None:
    """Loss over tokens with Chinchilla's law, IsoFLOP columns, what the laws foresaw beside the noise, and their E.

    Args:
      points: of all runs. figures: of the fits. path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (curves, columns), (foreseen, least) = figure.subplots(2, 2)
    ends = [point for point in points if point["multiplier"] is not None and (point["fitted"] or point["held_out"])]
    _curves(curves, ends, figures)
    _columns(columns, ends)
    laws = [row for row in figures["laws"] if row["count"] == "without_embedding" and "constants" in row]
    _foreseen(foreseen, laws)
    _least(least, laws, figures)
    for axes in (curves, columns, foreseen, least):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _sizes(ends: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({point["params"] for point in ends})


def _curves(axes: Any, ends: Sequence[dict[str, Any]], figures: dict[str, Any]) -> None:
    floor = figures["log_loss_of_source"]
    law = next((row["constants"] for row in figures["laws"] if row["law"] == "chinchilla" and "constants" in row), None)
    for number, params in enumerate(_sizes(ends)):
        of_size = [point for point in ends if point["params"] == params]
        for held_out, fill in ((False, "full"), (True, "none")):
            chosen = [point for point in of_size if point["held_out"] == held_out]
            tokens, excess = [point["tokens"] for point in chosen], [point["excess_loss"] for point in chosen]
            label = None if held_out else f"N = {params:,}"
            axes.plot(tokens, excess, "o", markersize=5, color=f"C{number}", fillstyle=fill, label=label)
        if law is not None:
            tokens = np.geomspace(min(point["tokens"] for point in of_size), max(point["tokens"] for point in of_size))
            axes.plot(tokens, Chinchilla(**law).loss(params, tokens) - floor, color=f"C{number}", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="loss above the source's own, nats a token",
        title="Chinchilla's law; rings were held out",
    )  # fmt: skip


def _columns(axes: Any, ends: Sequence[dict[str, Any]]) -> None:
    flops = np.array([point["flops"] for point in ends])
    shown = axes.scatter(
        [point["params"] for point in ends], [point["loss"] for point in ends], c=np.log10(flops), s=18, cmap="viridis"
    )
    budgets = sorted({point["budget"] for point in ends if point["budget"]})
    for number, budget in enumerate(budgets):
        is_near = np.abs(np.log(flops / budget)) <= np.log(COLUMN_WIDTH)
        near = sorted((point["params"], point["loss"]) for point, chosen in zip(ends, is_near, strict=True) if chosen)
        axes.plot(*zip(*near, strict=True), linewidth=1, color=f"C{number}", label=f"{budget:.2g} FLOPs")
    axes.set(xscale="log", xlabel="parameters without embedding", ylabel="loss, nats a token", title="IsoFLOP columns")
    axes.figure.colorbar(shown, ax=axes, label="log10 of FLOPs")


def _foreseen(axes: Any, laws: Sequence[dict[str, Any]]) -> None:
    for number, row in enumerate(laws):
        for place, each in enumerate(row.get("held_out", ())):
            at = place + 0.15 * (number - (len(laws) - 1) / 2)
            if "noise_low_95" in each:
                low, high = 100 * each["noise_low_95"], 100 * each["noise_high_95"]
                axes.plot([at, at], [low, high], color=f"C{number}", alpha=0.4, linewidth=6)
            axes.plot(at, 100 * each["error_share"], "o", color=f"C{number}", markersize=5, label=None if place else row["law"])
    names = [each["name"] for each in (laws[0].get("held_out", ()) if laws else ())]
    axes.set_xticks(range(len(names)), names)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="predicted / measured - 1, %", title="held out; bars: 95 % by the noise of seeds")


def _least(axes: Any, laws: Sequence[dict[str, Any]], figures: dict[str, Any]) -> None:
    rows = [row for row in laws if "E" in row["constants"]]
    for place, row in enumerate(rows):
        axes.plot(row["constants"]["E"], place, "o", color="C0")
        if "intervals_95" in row:
            axes.plot(row["intervals_95"]["E"], [place, place], color="C0", alpha=0.4, linewidth=6)
    axes.set_yticks(range(len(rows)), [row["law"] for row in rows])
    axes.axvline(figures["log_loss_of_source"], color="black", linewidth=1, label="the source's own loss")
    axes.set(xlabel="E, nats a token", title="E by the fits, and what it is")
