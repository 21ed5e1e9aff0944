"""The picture of the fits to published runs."""

from typing import Any

import numpy as np
from etils import epath

from experiments.scaling_fit.overtrained_models import Fits, to_points
from experiments.scaling_fit.published_data import Model
from lfm_jax.scaling import Points
from lfm_jax.scaling.chinchilla import Chinchilla


def plot(
    points: Points, law: Chinchilla, optima: list[dict[str, Any]], models: list[Model], fits: dict[str, Fits], path: epath.Path
) -> None:
    """Chinchilla's residuals; the optimum with its intervals; predicted against true loss; the error over the loss.

    Args:
      points: Chinchilla's. law: fitted to them. optima: tokens per parameter by budget. models, fits: of Gadre et al.
      path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (residuals, optimum), (predicted, downstream) = figure.subplots(2, 2)
    _residuals(residuals, points, law, figure)
    _optimum(optimum, optima)
    for number, (corpus, fit) in enumerate(fits.items()):
        chosen = [model for model in models if model.corpus == corpus and model.multiplier >= 20]
        known = [model in fit.five for model in chosen]
        _predicted(predicted, chosen, known, fit, f"C{number}", corpus)
        losses = np.array([model.losses["c4_val"] for model in models if model.corpus == corpus])
        errors = [model.error_17 for model in models if model.corpus == corpus]
        downstream.plot(losses, errors, "o", markersize=3, color=f"C{number}", label=corpus)
        line = np.linspace(losses.min(), losses.max(), 100)
        downstream.plot(line, fit.error_17.error(line), color=f"C{number}", linewidth=1)
    predicted.axhline(0, color="black", linewidth=0.8)
    loss = "loss on C4, nats a token"
    predicted.set(xlabel=f"true {loss}", ylabel="predicted / true - 1, %", title="over-training, from the five points in squares")
    downstream.set(xlabel=loss, ylabel="mean error of 17 tasks", title="errors, fitted to six models of each corpus")
    for axes in (residuals, optimum, predicted, downstream):
        axes.grid(alpha=0.3)
    for axes in (optimum, predicted, downstream):
        axes.legend(frameon=False, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _residuals(axes: Any, points: Points, law: Chinchilla, figure: Any) -> None:
    off = 100 * (law.predict(points) / points.loss - 1)
    shown = axes.scatter(points.flops, off, c=np.log10(points.tokens / points.params), s=12, cmap="viridis")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="predicted / true - 1, %", title="Chinchilla's points, Huber minimum")
    figure.colorbar(shown, ax=axes, label="log10 of tokens a parameter")


def _optimum(axes: Any, optima: list[dict[str, Any]]) -> None:
    flops = [row["flops"] for row in optima]
    axes.fill_between(flops, *([row[key] for row in optima] for key in ("low_95", "high_95")), alpha=0.2, label="95 %")
    lines = (
        ("huber_minimum", "-", "Huber minimum"),
        ("published_constants", "--", "Besiroglu et al."),
        ("hoffmann", ":", "Hoffmann et al."),
    )
    for key, style, label in lines:
        axes.plot(flops, [row[key] for row in optima], style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="tokens a parameter", title="compute-optimal")
    axes.set_yticks((5, 10, 20, 40, 80), ("5", "10", "20", "40", "80"))
    axes.minorticks_off()


def _predicted(axes: Any, models: list[Model], known: list[bool], fit: Fits, color: str, corpus: str) -> None:
    points = to_points(models)
    off = 100 * (fit.loss.predict(points) / points.loss - 1)
    fitted = np.array(known)
    axes.plot(points.loss[~fitted], off[~fitted], "o", markersize=4, color=color, label=corpus)
    axes.plot(points.loss[fitted], off[fitted], "s", markersize=4, color=color, fillstyle="none")
