"""The study's figures as Markdown tables."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from experiments.markdown import markdown_table
from experiments.scaling_study.laws import Estimate

Row = dict[str, Any]
Cell = Callable[[Row], str]
_WIDTH = 138
NEXT = ("1T", "4T", "10T", "27T")


def estimate(value: Estimate, form: str = ".3f", scale: float = 1.0) -> str:
    """As `2.357 (2.321 to 2.397)`, without brackets where there are no resamples."""
    found, *ends = (None if each is None else format(each / scale, form) for each in value)
    return found if ends[0] is None else f"{found} ({ends[0]} to {ends[1]})"


def power(value: float) -> str:
    """As 1.6e15."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def powers(value: Estimate) -> str:
    """As `1.6e15 (1.2e15 to 2.4e15)`."""
    found, *ends = (None if each is None else power(each) for each in value)
    return found if ends[0] is None else f"{found} ({ends[0]} to {ends[1]})"


def amount(value: float) -> str:
    """Of tokens or parameters: 45.2B, 1.2T, 354M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def times(value: float) -> str:
    """By how much something is beyond what was fitted, or "within"."""
    return "within" if value <= 1 else f"{value:,.0f} x" if value >= 100 else f"{value:.2g} x"


def percent(share: float, form: str) -> str:
    """As +0.19 %."""
    return f"{100 * share:{form}} %"


def prose(paragraph: str) -> list[str]:
    """The lines of a paragraph or of an item, however it was broken."""
    words, item = " ".join(paragraph.split()), paragraph.startswith("- ")
    return textwrap.wrap(words, _WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent="  " if item else "")


def text(key: str) -> Cell:
    """The value as it is."""
    return lambda row: f"{row[key]}"


def number(key: str, form: str, scale: float = 1.0) -> Cell:
    """The value in a format, empty where it is None."""
    return lambda row: "" if row[key] is None else format(row[key] / scale, form)


def of(key: str, write: Callable[[Any], str]) -> Cell:
    """The value as a function writes it."""
    return lambda row: write(row[key])


def fits(rows: list[Row]) -> list[str]:
    """Constants and ranges."""
    columns = {
        "law": text("law"), "of": text("source"), "runs": lambda row: f"{row['points'] or ''}",
        "E": of("E", estimate), "alpha": of("alpha", estimate), "beta": of("beta", estimate),
        "most tokens": of("most_tokens", amount), "most M": number("most_multiplier", ".0f"),
    }  # fmt: skip
    return markdown_table(columns, rows)


def optima(rows: list[Row]) -> list[str]:
    """Compute-optimal budgets of each model."""
    columns = {
        "model": text("model"), "law": text("law"), "tokens, 1e9": of("tokens", lambda value: estimate(value, ".3g", 1e9)),
        "tokens a parameter": of("tokens_per_parameter", lambda value: estimate(value, ".3g")),
        "FLOPs": of("flops", power), "loss": of("loss", estimate),
    }  # fmt: skip
    return markdown_table(columns, rows)


def losses(rows: list[Row]) -> list[str]:
    """Loss by tokens; how far the last column is beyond the runs of the fit."""
    shown = ("1T", "4T", "10T", "20T", "28T", "limit")
    columns = {"law": text("law"), **{key: of(key, estimate) for key in shown}}
    return markdown_table({**columns, "M beyond": beyond("multiplier"), "tokens beyond": beyond("tokens")}, rows)


def beyond(key: str) -> Cell:
    """How many times the most of a fit's runs it is."""
    return lambda row: times(row["beyond"][key])


def next_trillion(rows: list[Row]) -> list[str]:
    """Nats that a trillion tokens bring."""
    columns = {"law": text("law")}
    columns |= {f"{tokens} to {int(tokens[:-1]) + 1}T": of(tokens, lambda value: estimate(value, ".5f")) for tokens in NEXT}
    return markdown_table({**columns, "10T to 28T": of("10T_to_28T", lambda value: estimate(value, ".4f"))}, rows)


def same_gain(rows: list[Row], models: Sequence[str]) -> list[str]:
    """The growth of N that would bring as much, by model and tokens so far."""
    columns = {"law": text("law")}
    for model in models:
        shares = {tokens: of(f"{tokens}_{model}_share", lambda value: percent(value, "+.2g")) for tokens in NEXT}
        columns |= {f"{model}, at {tokens}": cell for tokens, cell in shares.items()}
    return markdown_table(columns, rows)


def next_trillion_coupled(rows: list[Row]) -> list[str]:
    """By the law of Busbridge et al."""
    columns = {"model": text("model"), **{f"{tokens} to {int(tokens[:-1]) + 1}T": number(tokens, ".5f") for tokens in NEXT}}
    columns |= {"10T to 28T": number("10T_to_28T", ".4f"), "tokens beyond": of("beyond_tokens", times)}
    return markdown_table(columns, rows)


def equals(rows: list[Row]) -> list[str]:
    """The optimal model of the same loss, and demands."""
    columns = {
        "law": text("law"), "loss": of("loss", estimate), "params, 1e9": of("params", lambda value: estimate(value, ".2f", 1e9)),
        "tokens, 1e9": of("tokens", lambda value: estimate(value, ".3g", 1e9)),
        "its M": of("multiplier", lambda value: estimate(value, ".3g")),
        "training, times": of("training_ratio", lambda value: estimate(value, ".3g")),
        "a token, times": of("params_ratio", lambda value: estimate(value, ".3g")),
        "pays from, served": of("break_even_tokens", powers), "pays from, on devices": of("break_even_tokens_on_devices", powers),
        "right at, served": of("implied_demand", powers), "right at, on devices": of("implied_demand_on_devices", powers),
    }  # fmt: skip
    return markdown_table(columns, rows)


def demanded(rows: list[Row]) -> list[str]:
    """M by demand."""
    demands = [key for key in rows[0] if key != "law"]
    return markdown_table({"law": text("law"), **{key: of(key, lambda value: estimate(value, ",.0f")) for key in demands}}, rows)


def trainers(rows: list[Row]) -> list[str]:
    """What whoever trains pays."""
    columns = {
        "model": text("model"), "parameters": number("params", ",.0f"), "6 N D": of("flops_of_6ND", power),
        "model FLOPs": of("model_flops", power), "chip-hours": number("chip_hours", ",.0f"),
        "days": number("days", ".1f"), "chip-hours a trillion": number("chip_hours_of_a_trillion", ",.0f"),
    }  # fmt: skip
    return markdown_table(columns, rows)


def devices(rows: list[Row]) -> list[str]:
    """What a device pays for a token."""
    columns = {
        "model": text("model"), "file MB": number("file_bytes", ",.0f", 1e6),
        "read a token, MB": number("read_bytes", ",.0f", 1e6),
        "ms a token": number("milliseconds", ".1f"), "tokens/s": number("tokens_per_second", ".0f"),
        "J a token": number("joules", ".3f"), "tokens a battery": number("battery_tokens", ",.0f"),
    }  # fmt: skip
    return markdown_table(columns, rows)


def totals(rows: list[Row], unit: str) -> list[str]:
    """Training and inference together by demand; unit: flops or mwh."""
    keys = [key for key in rows[0] if key.startswith(f"{unit}_")]
    write = power if unit == "flops" else lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    columns = {
        "budget": text("budget"), "loss": number("loss", ".3f"),
        "training": of(f"training_{unit}", write), **{key.removeprefix(f"{unit}_"): of(key, write) for key in keys},
    }  # fmt: skip
    return markdown_table(columns, rows)
