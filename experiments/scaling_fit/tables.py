"""The tables of the fits, for the terminal and as Markdown."""

from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from experiments.markdown import markdown_table


def parity(rows: list[dict[str, Any]]) -> Table:
    """Ours, published and the difference, for the terminal."""
    table = Table(title="ours and published")
    for name in ("law", "figure"):
        table.add_column(name)
    for name in ("ours", "published", "difference"):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        table.add_row(Text("" if row["law"] == before else row["law"]), Text(row["figure"]), *_compared(row))
        before = row["law"]
    return table


def own(laws: list[dict[str, Any]]) -> list[Table]:
    """A table for each law fitted to one's own points."""
    tables = []
    for law in laws:
        if "not_fitted" in law:
            tables.append(Table(title=f"{law['law']}: not fitted, {law['not_fitted']}"))
            continue
        held_out, why = law.get("held_out_error_share"), law.get("held_out_not_fitted")
        unseen = "" if held_out is None else f", {held_out:.2%} on {law['held_out_points']} points that were held out"
        unseen += "" if why is None else f"; not fitted {why}"
        table = Table(title=f"{law['law']}: mean error {law['fitted_error_share']:.2%} of {law['points']} points{unseen}")
        table.add_column("constant")
        for name in ("value", "95 % from", "to"):
            table.add_column(name, justify="right")
        for name, value in law["constants"].items():
            low, high = law["intervals_95"][name]
            table.add_row(name, f"{value:.5g}", f"{low:.5g}", f"{high:.5g}")
        tables.append(table)
    return tables


def markdown(figures: dict[str, Any]) -> str:
    """All tables of the published runs, to be recorded."""
    return "\n".join([*_parity(figures), *_optima(figures), *_predictions(figures), *_doubts(figures)]) + "\n"


def _parity(figures: dict[str, Any]) -> list[str]:
    columns = {
        "law": _text("law"), "figure": _text("figure"), "ours": lambda row: _compared(row)[0],
        "published": lambda row: _compared(row)[1], "difference": lambda row: _compared(row)[2],
        "printed": lambda row: "yes" if row["printed"] else "no",
    }  # fmt: skip
    return ["## Ours and published", "", *markdown_table(columns, figures["parity"])]


def _optima(figures: dict[str, Any]) -> list[str]:
    interval = lambda low, high: lambda row: f"{row[low]:.2f} to {row[high]:.2f}"
    columns = {
        "FLOPs": _number("flops", "g"), "Huber minimum": _number("huber_minimum", ".2f"),
        "published constants": _number("published_constants", ".2f"), "Hoffmann et al.": _number("hoffmann", ".1f"),
        "median of resamples": _number("median", ".2f"), "95 %": interval("low_95", "high_95"),
        "95 %, normal": interval("normal_low_95", "normal_high_95"),
        "N*, 1e9": lambda row: f"{row['optimal_params'] / 1e9:.3g}",
    }  # fmt: skip
    title = "## Tokens per parameter at the optimum of Chinchilla's points"
    return ["", title, "", *markdown_table(columns, figures["tokens_per_parameter"])]


def _predictions(figures: dict[str, Any]) -> list[str]:
    columns = {
        "corpus": _text("corpus"), "shape": _text("shape"), "M": _number("multiplier", "g"), "loss": _number("loss", ".4f"),
        "true": _number("true_loss", ".4f"), "error": _share("loss_error_share"), "17 tasks": _number("error_17", ".4f"),
        "their true error": _number("true_error_17", ".4f"), "off by": _share("error_17_error_share"),
        "from the true loss": _share("error_17_from_true_loss_error_share"),
    }  # fmt: skip
    title = "## Over-training: the larger models, predicted from five small ones"
    return ["", title, "", *markdown_table(columns, figures["overtraining_predictions"])]


def _doubts(figures: dict[str, Any]) -> list[str]:
    """What the headline predictions do not say: noise, other evaluation sets, more points, other minima."""
    noise = {
        "noise": _share("noise_share", ".1%"), "sd of the prediction": _share("prediction_deviation_share", ".2%"),
        "median error": _share("error_median_share", ".2%"), "sd of E": _number("E_deviation", ".3f"),
        "sd of alpha": _number("alpha_deviation", ".3f"), "draws": _text("draws"),
    }  # fmt: skip
    sets = {
        "corpus": _text("corpus"), "evaluation set": _text("evaluation_set"), "mean error": _share("mean_error_share", ".2%"),
        "worst": _share("worst_error_share"), "of": _text("worst_model"),
        "1.4B, over-trained": _share("1.4B_overtrained_error_share"), "its M": _number("1.4B_multiplier", "g"),
    }  # fmt: skip
    errors = lambda row: ", ".join(
        f"{key.removesuffix('_error_share')} {value:+.2%}".replace("%", " %")
        for key, value in row.items()
        if key.endswith("_error_share")
    )
    more = {
        "corpus": _text("corpus"), "points": _text("points"), "E": _number("E", ".3f"), "alpha = beta": _number("alpha", ".3f"),
        "untied": lambda row: f"{row['untied_alpha']:.3f}, {row['untied_beta']:.3f}", "error on larger models": errors,
    }  # fmt: skip
    minima = {
        "R_D": _number("R_D", ".2f"), "R_N": _number("R_N", ".3f"), "objective": _number("objective", ".8f"),
        "starts": _text("starts"),
    }  # fmt: skip
    tables = (
        ("Noise on the five points (RedPajama), and the prediction of 1.4B at M = 640", noise, "overtraining_noise"),
        ("The same law on the other evaluation sets", sets, "overtraining_by_evaluation_set"),
        ("Least squares of ln L over all models of M >= 20 up to 0.41B", more, "overtraining_more_points"),
        ("Repetition: where 36 starts end on the 182 runs", minima, "repeated_data_minima"),
    )
    return [line for title, columns, name in tables for line in ("", f"## {title}", "", *markdown_table(columns, figures[name]))]


def _text(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]}"


def _number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: format(row[key], form)


def _share(key: str, form: str = "+.2%") -> Callable[[dict[str, Any]], str]:
    return lambda row: format(row[key], form).replace("%", " %")


def _compared(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['ours']:.6g}", f"{row['published']:.6g}", f"{row['difference']:+.2g}"
