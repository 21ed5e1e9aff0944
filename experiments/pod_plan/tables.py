"""The planner's figures as people read them: lines for the terminal, tables for documentation, a plot."""

from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from experiments.markdown import markdown_table
from experiments.pod_plan.collectives import KINDS
from experiments.pod_plan.figures import totals
from experiments.pod_plan.search import IN_LOOPS
from experiments.report import format_figure

NOTE = (
    "Every time here is an estimate from the compiled program; nothing ran. It adds up the compiler's counts of cycles, which "
    "err both ways, kernels' schedules without stalls, and bytes over published bandwidths without contention. The input "
    "pipeline, checkpoints and failures are left out. docs/benchmarks/pod_plan.md compares it with published runs."
)
_GIB = 2**30


def in_a_line(row: dict[str, Any]) -> str:
    """What became of one layout."""
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / _GIB:.2f} of {row['capacity_bytes'] / _GIB:.2f} GiB"
    if row["seconds_per_step"] is None:
        return ", ".join(filter(None, (row["problem"], memory)))
    fits = "" if row["fits"] else "does not fit, "
    return f"{fits}{memory}, {row['seconds_per_step']:.4f} s a step, MFU {row['mfu_share']:.1%}"


def plan_lines(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(figure, value) of a plan, then what its device sends, then where its time goes."""
    for name, value in plan.items():
        if not isinstance(value, list) and value is not None:
            yield name, format_figure(value, name)
    for entry in plan.get("collectives", []):
        yield f"sent by {entry['kind']}", format_figure(entry["bytes"], "bytes")
    for entry in plan.get("breakdown", [])[:12]:
        yield f"{entry['operation']}, {entry['place']}", f"{entry['share']:.1%}"


def headline(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The main figures of each plan by themselves."""
    names = ("fits", "peak_bytes", "seconds_per_step", "mfu_share", "mfu_full_square_share", "tokens_per_second", "chip_hours")
    return {
        f"{plan['preset']}_{plan['topology']}_{plan['seq_len']}_{name}": plan[name]
        for plan in plans
        for name in names
        if plan.get(name) is not None
    }


_WHAT = {
    "preset": lambda row: row["preset"], "slice": lambda row: row["topology"],
    "rows x context": lambda row: f"{row['rows']} x {row['seq_len']:,}",
    "layout": lambda row: f"{row['mesh']}; {row['accumulation']} x {row['remat']}{IN_LOOPS * row['scan_layers']}",
}  # fmt: skip


def _number(name: str, scale: float = 1, digits: int = 2):
    def cell(row: dict[str, Any]) -> str:
        return "" if row.get(name) is None else f"{row[name] / scale:,.{digits}f}"

    return cell


def _percent(name: str):
    return lambda row: "" if row.get(name) is None else f"{100 * row[name]:.1f}"


def markdown(plans: list[dict], trials: list[dict], remedies: list[dict], published: list[dict]) -> str:
    """The tables: recommendations, FLOPs and bytes between chips, where the time goes, comparisons, remedies, every trial."""
    memory = {
        "argument GiB": _number("argument_bytes", _GIB), "temp GiB": _number("temporary_bytes", _GIB),
        "peak GiB": _number("peak_bytes", _GIB), "of": _number("capacity_bytes", _GIB),
    }  # fmt: skip
    speed = {
        "s a step": _number("seconds_per_step", digits=4), "MFU %": _percent("mfu_share"),
        "full square %": _percent("mfu_full_square_share"), "tokens/s": _number("tokens_per_second", digits=0),
        "interconnect GB": _number("interconnect_bytes", 1e9),
        "waiting for links s": _number("seconds_waiting_for_links", digits=4),
    }  # fmt: skip
    cost = {"days": _number("days", digits=1), "chip-hours": _number("chip_hours", digits=0)}
    lines = ["## Plans", "", *markdown_table({**_WHAT, **memory, **speed, **cost}, plans), ""]
    lines += ["## What a device computes and sends in a step", "", *_work_table([*plans, *published]), ""]
    for plan in plans:
        if plan.get("breakdown"):
            lines += [f"### Where the time goes: {plan['preset']} on {plan['topology']}, {plan['seq_len']:,}", ""]
            lines += [*_breakdown(plan), ""]
    if published:
        against = {
            "estimated tokens/s a chip": _number("tokens_per_second_per_chip", digits=0),
            "measured": _number("measured_tokens_per_second_per_chip", digits=0),
            "estimate / measured": _number("estimate_over_measured"), "differs in": lambda row: row["notes"],
        }  # fmt: skip
        lines += ["## Published runs", "", *markdown_table({**_WHAT, **memory, **speed, **against}, published), ""]
    if remedies:
        saved = {"remedy": lambda row: row["remedy"], "saves GiB": _number("saved_bytes", _GIB),
                 "peak GiB": _number("peak_bytes", _GIB), "fits": lambda row: "yes" if row["fits"] else "no"}  # fmt: skip
        about = {name: _WHAT[name] for name in ("preset", "slice")} | {"context": lambda row: f"{row['seq_len']:,}"}
        lines += ["## Remedies where nothing fits", "", *markdown_table({**about, **saved}, remedies), ""]
    if trials:
        outcome = {"outcome": lambda row: row["problem"] or "fits", "compiled in s": _number("compile_seconds", digits=0)}
        lines += ["## Layouts tried", "", *markdown_table({**_WHAT, **memory, **speed, **outcome}, trials), ""]
    return "\n".join(lines)


def _work_table(plans: list[dict[str, Any]]) -> list[str]:
    """Of each plan: FLOPs, those of the model and those of the compiled matmuls, and GB sent by kind of collective."""

    def sent(kind: str):
        of_kind = lambda row: sum(each["bytes"] for each in row["collectives"] if each["kind"] == kind)
        return lambda row: f"{of_kind(row) / 1e9:,.3f}" if "collectives" in row else ""

    flops = {
        "model TFLOP": _number("model_flops_per_device", 1e12), "matmul TFLOP": _number("compiled_matmul_flops_per_device", 1e12)
    }  # fmt: skip
    return markdown_table({**_WHAT, **flops, **{f"{kind} GB": sent(kind) for kind in KINDS}}, plans)


def _breakdown(plan: dict[str, Any], most: int = 15) -> list[str]:
    columns = {"operation": lambda row: row["operation"], "place": lambda row: row["place"],
               "ms": _number("seconds", 1e-3), "%": _percent("share")}  # fmt: skip
    return markdown_table(columns, plan["breakdown"][:most])


def plot(rows: list[dict[str, Any]], path: epath.Path) -> None:
    """Left: seconds of a step by part, over the seconds that the model's FLOPs take at peak. Right: HBM against the capacity."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("breakdown")]
    if not rows:
        return
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = [f"{row['preset']} {row['topology']} {row['seq_len']:,}" for row in rows]
    left = [0.0] * len(rows)
    for part in totals(rows[0]):
        share = [totals(row)[part] / (row["seconds_per_step"] * row["mfu_share"]) for row in rows]
        time.barh(names, share, left=left, label=part)
        left = [before + width for before, width in zip(left, share, strict=True)]
    time.axvline(1, color="black", linewidth=0.8)
    time.set(xlabel="seconds of a step / seconds of the model's FLOPs at peak")
    left = [0.0] * len(rows)
    for part in ("argument_bytes", "temporary_bytes", "code_bytes"):
        share = [row[part] / row["capacity_bytes"] for row in rows]
        memory.barh(names, share, left=left, label=part.removesuffix("_bytes"))
        left = [before + width for before, width in zip(left, share, strict=True)]
    memory.axvline(1, color="black", linewidth=0.8)
    memory.set(xlabel="HBM / capacity")
    for axes in (time, memory):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    time.invert_yaxis()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def plot_scale(rows: list[dict[str, Any]], path: epath.Path) -> bool:
    """Step time, bytes between chips and compile time: above against devices, below against context, where either has a line.

    A line has one preset and chip, and one context or one slice.

    Returns:
      Whether there was something to draw: a line needs two points.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["seconds_per_step"] is not None]
    family = lambda row: f"{row['preset']} {row['topology'].partition(':')[0]}, context {row['seq_len']:,}"
    slice_of = lambda row: f"{row['preset']} {row['topology']}"
    curves = {along: _lines(rows, along, name) for along, name in (("devices", family), ("seq_len", slice_of))}
    curves = {along: lines for along, lines in curves.items() if lines}
    if not curves:
        return False
    quantities = {"seconds_per_step": "s a step", "interconnect_bytes": "bytes a device sends", "compile_seconds": "compiling, s"}
    figure = Figure(figsize=(12, 3.5 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), len(quantities), squeeze=False)
    for (along, lines), across in zip(curves.items(), panels, strict=True):
        ticks = sorted({row[along] for points in lines.values() for row in points})
        for axes, (key, label) in zip(across, quantities.items(), strict=True):
            axes.margins(y=0.15)
            for name, points in lines.items():
                axes.plot([row[along] for row in points], [row[key] for row in points], marker="o", label=name)
            axes.set(xlabel={"seq_len": "context"}.get(along, along), ylabel=label, xscale="log", ylim=(0, None))
            axes.set_xticks(ticks, [f"{tick // 1024}k" if along == "seq_len" and tick >= 1024 else tick for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    return True


def _lines(rows: list[dict[str, Any]], along: str, name: Callable[[dict], str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of one name in the order of a figure, by name; a name needs two values of it."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[along]):
        lines.setdefault(name(row), []).append(row)
    return {name: points for name, points in lines.items() if points[0][along] < points[-1][along]}
