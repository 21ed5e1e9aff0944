"""The tables and the picture of the probes."""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from experiments.markdown import markdown_table
from lfm_jax.scaling.precision import KUMAR

Row = dict[str, Any]


def markdown(figures: dict[str, Any]) -> str:
    """All of it: which ends, exponents, Kumar's law, each trunk over M, and answers."""
    parts = [_ends(figures), *_kumar(figures["kumar"]), *_exponents(figures), *_trunks(figures["over_multipliers"])]
    return "\n".join([*parts, *_answers(figures), *_budgets(figures["best_budgets"]), *_losses(figures)]) + "\n"


def _ends(figures: dict[str, Any]) -> str:
    missing = ", ".join(f"{each['name']} ({each['state']})" for each in figures["missing"])
    text = f"{figures['ends_probed']} ends of {figures['ends_probed'] + len(figures['missing'])}."
    return text + (f" Missing, and in no fit: {missing}." if missing else "")


def _kumar(row: Row) -> list[str]:
    published = {name: getattr(KUMAR, name) for name in ("C_T", "gamma_D", "gamma_N", "gamma_post")}
    title = ["", "## Rounding to few bits: Kumar's form", ""]
    if "not_fitted" in row:
        return [*title, f"Not fitted to {row['ends']} ends: {row['not_fitted']}."]
    columns = {"constant": lambda each: each[0], "here": lambda each: f"{row['constants'][each[0]]:.3g}"}
    columns |= {"95 %": lambda each: _range(row["intervals_95"], each[0]), "published": lambda each: f"{each[1]:.4g}"}
    return [*title, *markdown_table(columns, list(published.items()))]


def _exponents(figures: dict[str, Any]) -> list[str]:
    constant = lambda name: lambda row: f"{row['constants'][name]:.3f}" if "constants" in row else ""
    ends = lambda name: lambda row: _range(row.get("intervals_95"), name)
    columns = {
        "probe": lambda row: row["probe"], "ends": lambda row: str(row["ends"]), "harmed": lambda row: str(row["harmed"]),
        "exponent of D": constant("gamma_D"), "its 95 %": ends("gamma_D"), "exponent of 1 / N": constant("gamma_N"),
        "its 95 % ": ends("gamma_N"), "": lambda row: row.get("not_fitted", ""),
    }  # fmt: skip
    rows = [*figures["exponents"], *figures["exponents_of_new_source"]]
    about = "ln(added) = c + gamma_D ln D - gamma_N ln N; for a new source, of the loss on it above the least that is possible."
    return ["", "## What is added, over N and D", "", about, "", *markdown_table(columns, rows)]


def _trunks(rows: Sequence[Row]) -> list[str]:
    columns = {
        "trunk": lambda row: row["trunk"], "probe": lambda row: row["probe"], "ends": lambda row: str(row["ends"]),
        "added at the least M": lambda row: f"{row['first']:+.4f}", "at the most": lambda row: f"{row['last']:+.4f}",
        "steps of M that add": lambda row: f"{row['steps_up']} of {row['ends'] - 1}",
        "best after it at M": lambda row: f"{row['best_multiplier']:.4g} of {row['last_multiplier']:.4g}",
        "rises from there": lambda row: f"{row['rise_after_best']:.4f}" if row["turns"] else "no",
    }  # fmt: skip
    if not rows:
        return ["", "No trunk has three ends yet: whether harm grows with M cannot be said."]
    return ["", "## Over M, trunk by trunk", "", *markdown_table(columns, rows)]


def _answers(figures: dict[str, Any]) -> list[str]:
    def constants(row: Row, name: str) -> str:
        return ", ".join(f"{key} {value:.3g}" for key, value in row[name].items()) if name in row else row["not_fitted"]

    def error(row: Row, use: str) -> str:
        found = row.get(use)
        return "" if found is None else " / ".join(f"{100 * found[name]:.2f} %" for name in ("approach_1", "approach_2"))

    columns = {
        "symbols": lambda row: str(row["symbols"]), "ends": lambda row: str(row["ends"]),
        "the source's own -ln p": lambda row: f"{figures['own_task_loss'][str(row['symbols'])]:.3f}",
        "approach 1": lambda row: constants(row, "approach_1"), "errors 1 / 2": lambda row: error(row, "fitted_error_share"),
        "held out": lambda row: error(row, "held_out_error_share"),
    }  # fmt: skip
    lines = ["", "## Answers drawn k times (Roberts)", "", *markdown_table(columns, figures["answer_laws"])]
    curves = figures["answer_curves"]
    if not curves:
        return lines
    of_samples: dict[str, Callable[[Row], str]] = {"-ln pass@k of the longest": lambda row: row["name"]}
    for place, samples in enumerate(curves[0]["samples"]):
        of_samples[f"k {samples}"] = lambda row, place=place: f"{row['task_loss'][place]:.4f}"
    return [*lines, "", *markdown_table(of_samples, curves)]


def _budgets(rows: Sequence[Row]) -> list[str]:
    def one(name: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{row[name]['name']}, k {row[name]['samples']}: {row[name]['task_loss']:.3f}, {100 * row[name]['pass_rate']:.2f} %"
        )

    def by_law(row: Row) -> str:
        law = row["by_law"]
        return "" if law is None else f"N {law['params']:.3g}, M {law['multiplier']:.3g}, k {law['samples']:.3g}"

    columns = {
        "6 N D": lambda row: f"{row['training_flops']:.2g}", "2 N k": lambda row: f"{row['inference_flops']:.2g}",
        "symbols": lambda row: str(row["symbols"]), "best: -ln pass@k, pass@k": one("best"),
        "least loss on text": one("on_text"), "best by approach 1": by_law,
    }  # fmt: skip
    if not rows:
        return ["", "No training budget has ends of two sizes yet: which size answers best cannot be said."]
    return ["", "## The best size at fixed budgets", "", *markdown_table(columns, rows)]


def _losses(figures: dict[str, Any]) -> list[str]:
    rows, by_end = [*figures["probes"], *figures["new_source"]], {}
    for row in rows:
        by_end.setdefault(row["name"], {})[row["probe"]] = row
    about = "Fine-tuned: on the sweep's own source. New source: the loss on it above the least that is possible."
    columns: dict[str, Callable[[Any], str]] = {"end": lambda item: item[0]}
    columns["before"] = lambda item: f"{next(iter(item[1].values()))['loss_before']:.4f}"
    for probe in dict.fromkeys(row["probe"] for row in rows):
        columns[probe] = lambda item, probe=probe: f"{item[1][probe]['loss']:+.4f}" if probe in item[1] else ""
    title = "## Each end: the loss before, and what each probe added, in nats a token"
    return ["", title, "", about, "", *markdown_table(columns, list(by_end.items()))]


def _range(intervals: dict[str, Any] | None, name: str) -> str:
    return "" if intervals is None else "{:.3g} to {:.3g}".format(*intervals[name])


def plot(figures: dict[str, Any], path: epath.Path) -> None:
    """What each kind of probe adds over M, the perturbed loss over M, the new source, and -ln pass@k over k.

    path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    rounding, noise, after, forgotten, new, answers = figure.subplots(2, 3).flat
    probes, news = figures["probes"], figures["new_source"]
    last = lambda start: next((row["probe"] for row in reversed(probes) if row["probe"].startswith(start)), None)
    first = next((row["probe"] for row in probes if row["probe"].startswith("rounded")), None)
    _over_multipliers(rounding, [row for row in probes if row["probe"] == first], "loss", f"added: {first}")
    _over_multipliers(noise, [row for row in probes if row["probe"] == last("noise")], "loss", f"added: {last('noise')}")
    _over_multipliers(
        after, [row for row in probes if row["probe"] == last("noise")], "perturbed_loss", f"loss with {last('noise')}"
    )
    of_last = [row for row in news if row["rate"] == max(row["rate"] for row in news)]
    _over_multipliers(
        forgotten, [row for row in probes if row["probe"] == last("fine")], "loss", f"added to the old source: {last('fine')}"
    )
    _over_multipliers(new, of_last, "loss", f"above the least: {of_last[0]['probe'] if of_last else None}")
    _over_samples(answers, figures["answer_curves"])
    for axes in (rounding, noise, after, forgotten, new, answers):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=100)


def _over_multipliers(axes: Any, rows: Sequence[Row], name: str, title: str) -> None:
    for number, trunk in enumerate(dict.fromkeys(row["trunk"] for row in rows)):
        mine = sorted((row["multiplier"], row[name]) for row in rows if row["trunk"] == trunk)
        axes.plot(*zip(*mine, strict=True), "o-", markersize=4, linewidth=1, color=f"C{number}", label=trunk)
    axes.set(xscale="log", xlabel="M, tokens a parameter", ylabel="nats a token", title=title)


def _over_samples(axes: Any, curves: Sequence[Row]) -> None:
    """The longest answers; colours are those of M, as what is over-trained shall be seen."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    if curves:
        multipliers = [curve["multiplier"] for curve in curves]
        colours = ScalarMappable(LogNorm(min(multipliers), max(multipliers)), "viridis")
        for curve, multiplier in zip(curves, multipliers, strict=True):
            axes.plot(curve["inference_flops"], curve["task_loss"], linewidth=1, color=colours.to_rgba(multiplier))
        axes.figure.colorbar(colours, ax=axes, label="M")
    axes.set(xscale="log", xlabel="2 N k", ylabel="-ln pass@k", title="the longest answers, over the cost of drawing them")
