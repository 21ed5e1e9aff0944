"""Figures of the whole experiment: shares over all seeds, whether a fall of loops counts, the table and the picture."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments.doom_loop.steps import ABLATIONS, CHAIN
from experiments.measure_answers import SHARES, share_cell, share_figures

# Doom loops of LFM2.5-1.2B-Thinking by stage, as Liquid AI published them (15.7 % after mid-training, about the same after SFT,
# about 4 % after DPO, 0.36 % after RL): another model and other problems, at another size. What is compared is the shape.
PUBLISHED = {"pretrain": 0.157, "sft": 0.157, "dpo": 0.04, "rl": 0.0036}
# Right answers may become shorter, by losing their loops and detours; to less than this share it is something else.
LEAST_LENGTH = 0.5
_Z = statistics.NormalDist().inv_cdf(0.975)


def pooled(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each step and temperature, in the order in which they come.

    Shares are of the answers of all seeds together, with the interval of that many answers; NAME_of_seeds has each seed's own
    share, whose spread says what the interval does not know of, other seeds. Lengths and repetition are means over the seeds.

    Args:
      found: of each seed, what `run_step` gave by the steps' names.
    """
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for of_seed in found:
        for step, result in of_seed.items():
            for row in result["rows"]:
                groups.setdefault((step, row["task"], row["temperature"]), []).append(row)
    return [
        {"step": step, "task": task, "temperature": temperature, "seeds": len(rows)} | _pooled(rows)
        for (step, task, temperature), rows in groups.items()
    ]


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answers = sum(row["answers"] for row in rows)
    figures: dict[str, Any] = {"answers": answers}
    for name in SHARES:
        figures |= share_figures(name, sum(row[f"{name}_count"] for row in rows), answers)
        figures[f"{name}_of_seeds"] = [row[f"{name}_share"] for row in rows]
    for name in ("mean_tokens", "mean_tokens_right", "repetition"):
        known = [row[name] for row in rows if row[name] is not None]
        figures[name] = statistics.mean(known) if known else None
    return figures


def differs(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> int:
    """-1 or 1 where a share has fallen or risen by more than chance makes of it in one of 20 cases (two proportions), else 0."""
    (p, n), (q, m) = ((row[f"{name}_share"], row["answers"]) for row in (before, after))
    both = (p * n + q * m) / (n + m)
    error = math.sqrt(both * (1 - both) * (1 / n + 1 / m))
    return 0 if abs(q - p) <= _Z * error else (1 if q > p else -1)


def claims_of(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Whether the greedy doom loops became fewer from SFT to each later step, in the seeds that it was run with, and whether that
    counts.

    It counts if at no temperature there are more loops or is less right, and if right greedy answers have kept half of their
    length: a model that says little, or nothing that is right, does not loop either.

    Args:
      found: as of `pooled`.
    """
    claims = []
    for step in dict.fromkeys(step for of_seed in found for step, result in of_seed.items() if result["rows"]):
        if step in ("pretrain", "sft"):
            continue
        rows = pooled([{name: of_seed[name] for name in ("sft", step)} for of_seed in found if step in of_seed])
        before, after = ({row["temperature"]: row for row in rows if row["step"] == name} for name in ("sft", step))
        lengths = [of[0.0]["mean_tokens_right"] for of in (before, after)]
        kept = None not in lengths and lengths[1] >= LEAST_LENGTH * lengths[0]
        fallen = differs(before[0.0], after[0.0], "tail_loop") < 0
        more = [temperature for temperature in after if differs(before[temperature], after[temperature], "tail_loop") > 0]
        worse = [temperature for temperature in after if differs(before[temperature], after[temperature], "right") < 0]
        claims.append({
            "step": step, "doom_loops_fell": fallen, "doom_loops_rose_at": more, "accuracy_fell_at": worse, "length_kept": kept,
            "counts": fallen and kept and not worse and not more,
        })  # fmt: skip
    return claims


def markdown(
    rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]
) -> str:
    """The tables: the chain, the ablations beside the chain of the seeds that they were run with, and what counts.

    Args:
      rows, compared: as of `pooled`, of all seeds and of those of the ablations.
    """
    chain = {step.name for step in CHAIN}
    others = [row for row in compared if row["step"] != "pretrain"]
    beside = others if any(row["step"] not in chain for row in others) else []
    head = "| step | seeds | temperature | doom loops | loops anywhere | limit, no loop | right | tokens | of right answers |"
    lines = []
    for part in ([row for row in rows if row["step"] in chain], beside):
        if part:
            lines += [head, "|---|---|---|---|---|---|---|---|---|", *(_line(row) for row in part), ""]
    lines.append("| from SFT to | greedy loops fell | loops rose at | accuracy fell at | length kept | counts |")
    lines.append("|---|---|---|---|---|---|")
    yes = lambda value: "yes" if value else "no"
    at = lambda temperatures: ", ".join(f"{temperature:g}" for temperature in temperatures) or "–"
    for claim in claims:
        cells = [claim["step"], yes(claim["doom_loops_fell"]), at(claim["doom_loops_rose_at"]), at(claim["accuracy_fell_at"])]
        cells += [yes(claim["length_kept"]), yes(claim["counts"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["step"], str(row["seeds"]), f"{row['temperature']:g}", *(share_cell(row, name) for name in SHARES)]
    lengths = ["–" if row[name] is None else f"{row[name]:.0f}" for name in ("mean_tokens", "mean_tokens_right")]
    return f"| {' | '.join(cells + lengths)} |"


def plot(rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]], path: epath.Path) -> None:
    """Doom loops, accuracy and lengths by stage and temperature, with intervals and each seed's dots; and the ablations.

    Args:
      rows, compared: as of `markdown`.
    """
    from matplotlib.figure import Figure

    stages = [step.name for step in CHAIN if step.measured]
    others = [step.name for steps in ABLATIONS.values() for step in steps]
    figure = Figure(figsize=(12, 8), layout="constrained")
    (loops, right), (lengths, ablations) = figure.subplots(2, 2)
    for number, temperature in enumerate(sorted({row["temperature"] for row in rows})):
        of = {row["step"]: row for row in rows if row["temperature"] == temperature}
        found = [(place, of[stage]) for place, stage in enumerate(stages) if stage in of]
        label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        for axes, name in ((loops, "tail_loop"), (right, "right")):
            _curve(axes, found, name, f"C{number}", label, 0.06 * (number - 1))
        lengths.plot(*zip(*((place, row["mean_tokens"]) for place, row in found), strict=True), f"C{number}o-", label=label)
        of_right = [(place, row["mean_tokens_right"]) for place, row in found if row["mean_tokens_right"] is not None]
        if of_right:
            lengths.plot(*zip(*of_right, strict=True), f"C{number}s:", markersize=4, label=f"{label}, right answers")
    loops.plot(range(len(stages)), [100 * PUBLISHED[stage] for stage in stages], "k--", label="published, a 1.2B model")
    for axes, label in ((loops, "doom loops, %"), (right, "right, %"), (lengths, "tokens of an answer")):
        axes.set(ylabel=label, xticks=range(len(stages)), xticklabels=stages, ylim=(0, None))
        axes.legend(frameon=False, fontsize="small")
        axes.grid(alpha=0.3)
    lengths.set_ylim(0, 1.4 * lengths.get_ylim()[1])  # room for what the lines are
    _bars(ablations, [row for row in compared if row["temperature"] == 0], ["sft", "dpo", "rl", *others])
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _curve(axes: Any, found: Sequence[tuple[int, Mapping[str, Any]]], name: str, color: str, label: str, shift: float) -> None:
    places = [place + shift for place, _ in found]
    shares, lows, highs = ([100 * row[f"{name}_{part}"] for _, row in found] for part in ("share", "low", "high"))
    below = [max(0.0, share - low) for share, low in zip(shares, lows, strict=True)]
    above = [max(0.0, high - share) for share, high in zip(shares, highs, strict=True)]
    axes.errorbar(places, shares, yerr=[below, above], color=color, marker="o", capsize=3, label=label)
    for place, (_, row) in zip(places, found, strict=True):
        for share in row[f"{name}_of_seeds"]:
            axes.plot(place, 100 * share, ".", color=color, alpha=0.4)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Greedy doom loops and accuracy of each of the steps that is there."""
    of = {row["step"]: row for row in rows}
    names = [name for name in names if name in of]
    for shift, name, label in ((-0.2, "tail_loop", "doom loops, greedy"), (0.2, "right", "right, greedy")):
        shares = [100 * of[step][f"{name}_share"] for step in names]
        axes.barh([place + shift for place in range(len(names))], shares, height=0.38, label=label)
    seeds = max((row["seeds"] for row in rows), default=0)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=f"% of the greedy answers of {seeds} seed{'s' * (seeds > 1)}")
    axes.set_xlim(0, 1.4 * axes.get_xlim()[1])  # room for what the bars are
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3, axis="x")
