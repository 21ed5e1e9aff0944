"""The tables of a sweep, as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.markdown import markdown_table


def markdown(figures: dict[str, Any]) -> str:
    """All of it: what was trained and what is missing, noise, laws, what they foresaw, optima, and pairs of runs."""
    parts = [_trained(figures), *_missing(figures), *_noise(figures), *_laws(figures), *_held_out(figures)]
    return "\n".join([*parts, *_optima(figures), *_pairs(figures), *_ends(figures)]) + "\n"


def _trained(figures: dict[str, Any]) -> str:
    return (
        f"{figures['points']} of {figures['points_wanted']} points, {figures['runs_done']} of {figures['runs']} runs; "
        f"{figures['failed_attempts']} attempts failed. Branches share trunks: {figures['tokens_trained'] / 1e6:.1f}M tokens "
        f"and {figures['flops_trained']:.3g} FLOPs in place of {figures['tokens_of_separate_runs'] / 1e6:.1f}M and "
        f"{figures['flops_of_separate_runs']:.3g}, {figures['saving_factor']:.2f} times less. The source's entropy is "
        f"{figures['entropy']:.4f} ± {figures['entropy_error']:.4f} nats a token, its own loss on the held-out text "
        f"{figures['log_loss_of_source']:.4f}."
    )


def _missing(figures: dict[str, Any]) -> list[str]:
    if not figures["missing"]:
        return []
    columns = {"run": _text("name"), "state": _text("state"), "failed attempts": _text("attempts")}
    return ["", "## Missing, and in no fit", "", *markdown_table(columns, figures["missing"])]


def _noise(figures: dict[str, Any]) -> list[str]:
    noise = figures["noise"]
    if noise is None:
        return ["", "There are no two seeds of one column: the noise is not known, and nothing has an interval."]
    return [
        "",
        f"Noise between {noise['seeds']} seeds over {noise['columns']} columns, of ln L: {_percent(noise['shared'])} that the "
        f"branches of a trunk share, and {_percent(noise['own'])} of each.",
    ]


def _laws(figures: dict[str, Any]) -> list[str]:
    rows = [row for row in figures["laws"] if "constants" in row]
    columns = {
        "law": _text("law"), "N": _count, "points": _text("points"),
        "constants": lambda row: ", ".join(f"{name} {value:.4g}" for name, value in row["constants"].items()),
        "mean error": lambda row: _percent(row["fitted_error_share"]), "E - known": lambda row: _signed(row.get("E_minus_known")),
        "95 % of E": lambda row: _range(row.get("intervals_95", {}).get("E"), "{:.3f}"),
        "a": lambda row: _number(row.get("optimal_exponent")),
        "D/N": lambda row: _number(row.get("optimal_tokens_per_parameter")),
    }  # fmt: skip
    lines = ["", "## Laws", "", *markdown_table(columns, rows)]
    for row in figures["laws"]:
        if "not_fitted" in row:
            lines += ["", f"Not fitted, {row['law'] or 'any'} ({_count(row)}): {row['not_fitted']}."]
    return lines


def _held_out(figures: dict[str, Any]) -> list[str]:
    rows = [
        each | {"law": row["law"], "count": row["count"]} for row in figures["laws"] for each in row.get("held_out", ())
    ]  # fmt: skip
    if not rows:
        return []
    columns = {
        "law": _text("law"), "N": _count, "run": _text("name"), "predicted": lambda row: f"{row['predicted']:.4f}",
        "measured": lambda row: f"{row['loss']:.4f}", "error": lambda row: _percent(row["error_share"], "+"),
        "95 % by noise": lambda row: _range((row.get("noise_low_95"), row.get("noise_high_95")), "{:+.2%}"),
        "within": lambda row: {True: "yes", False: "no"}.get(row.get("within_noise"), ""),
    }  # fmt: skip
    return ["", "## Held out before fitting", "", *markdown_table(columns, rows)]


def _optima(figures: dict[str, Any]) -> list[str]:
    columns = {
        "way": _text("way"), "budgets": lambda row: str(row.get("budgets", "")), "a": lambda row: _number(row.get("exponent")),
        "FLOPs": lambda row: _number(row.get("flops")), "N*": lambda row: _number(row.get("params")),
        "D*/N*": lambda row: _number(row.get("tokens_per_parameter")), "": lambda row: row.get("not_found", ""),
    }  # fmt: skip
    return ["", "## Optima without a law of the loss", "", *markdown_table(columns, figures["optima"])]


def _pairs(figures: dict[str, Any]) -> list[str]:
    titles = {
        "apart": "Branches, and the same run from nothing",
        "attention_only": "Attention alone, and the hybrid of as many parameters",
        "rates": "Other learning rates, and that of the rule",
    }
    columns = {
        "run": _text("name"), "loss": lambda row: f"{row['loss']:.5f}", "other": _text("other"),
        "its loss": lambda row: f"{row['other_loss']:.5f}", "difference": lambda row: _percent(row["difference_share"], "+"),
        "sd by noise": lambda row: _percent(row["noise_of_a_difference_share"]),
    }  # fmt: skip
    lines = []
    for name, title in titles.items():
        if figures[name]:
            lines += ["", f"## {title}", "", *markdown_table(columns, figures[name])]
    return lines


def _ends(figures: dict[str, Any]) -> list[str]:
    columns = {
        "run": _text("name"), "N": _text("params"), "with embedding": _text("params_with_embedding"), "tokens": _text("tokens"),
        "6 N D": lambda row: f"{row['flops']:.3g}", "FLOPs with head": lambda row: f"{row['flops_with_head_and_attention']:.3g}",
        "loss": lambda row: f"{row['loss']:.4f}", "above the source": lambda row: f"{row['excess_loss']:.4f}",
        "use": lambda row: "held out" if row["held_out"] else "fitted" if row["fitted"] else "",
    }  # fmt: skip
    return ["", "## Points", "", *markdown_table(columns, figures["ends"])]


def _count(row: dict[str, Any]) -> str:
    return row["count"].replace("_", " ")


def _text(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[key]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{100 * share:{sign}.2f} %"


def _range(ends: Sequence[float | None] | None, form: str) -> str:
    return "" if ends is None or ends[0] is None else " to ".join(form.format(end).replace("%", " %") for end in ends)
