"""Several runs side by side: their curves, what was set differently, the first step at which they part, and what came out.

Every figure of theirs that is drawn goes also to `metrics.jsonl` in the workdir, as RUN/FIGURE, so that the page about this
comparison has the curves of all runs in one chart. Runs that are going on are taken as far as they are.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments.results import FILE, write_results
from lfm_jax.configuration import ConfigError, flatten
from lfm_jax.training import read_metrics
from lfm_jax.training.goodput import read_seconds, table
from lfm_jax.training.metrics import is_of_the_machine

_PLOTS = {
    "loss": ("train/nll", "train/loss"),
    "held_out": ("eval/bits_per_byte", "eval/nll_per_token", "eval/loss"),
    "gradient_norm": ("train/gradient_norm",),
    "tokens_per_second": ("train/tokens_per_second",),
}
_ABOUT = ("seed", "versions", "device")
# Settings that differ, on the terminal.
_TOLD = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """runs: workdirs, two or more; the others are compared with the first."""

    runs: tuple[str, ...]

    def __post_init__(self):
        if len(set(self.runs)) < 2 or len(set(self.runs)) < len(self.runs):
            raise ValueError(f"runs must be two or more different workdirs, got {', '.join(self.runs) or 'none'}")


class Run(NamedTuple):
    """A workdir's content. records: by step, what was logged of it. results: empty while the run goes on."""

    name: str
    settings: dict[str, Any]
    records: dict[int, dict[str, float]]
    results: dict[str, Any]
    goodput: float | None


def main(config: Config, workdir: epath.Path) -> None:
    """Writes the plots, results.json and report.html."""
    runs = read_runs(config.runs)
    for name in _PLOTS:
        _plot(name, runs, workdir / f"{name}.png")
    _write_curves(runs, workdir / "metrics.jsonl")
    parting = [part(runs[0], run) for run in runs[1:]]
    figures = {
        "runs_compared": len(parting),
        "runs_bit_equal": sum(row["bit_equal"] for row, _ in parting),
        "runs": [_state(run) for run in runs],
        "parting": [row for row, _ in parting],
        "first_differences": [row for _, rows in parting for row in rows],
        "different_settings": differences(runs, lambda run: run.settings),
        "different_circumstances": differences([run for run in runs if run.results], _circumstances),
        "last_logged": side_by_side(runs, _last_logged),
        "final_figures": side_by_side(runs, _final_figures),
    }
    for run, (row, _) in zip(runs[1:], parting, strict=True):
        print(_sentence(row))
        print(_set_otherwise(runs[0], run))
    write_results(workdir, figures, config)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs, by the last part of their paths, or by the whole paths where two have that in common.

    Raises:
      ConfigError: a folder is no workdir: it has neither settings nor records.
    """
    names = [epath.Path(path).name for path in paths]
    names = names if len(set(names)) == len(names) else [path.replace("/", "_") for path in paths]
    return [_read(name, epath.Path(path)) for name, path in zip(names, paths, strict=True)]


def part(first: Run, other: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where two runs part, to the last bit of what they logged; times and rates are left out.

    Returns:
      A row about the two, and one for each figure that differs: the first step at which it does, both values, and how far they
      are apart there and at the last step that both have.
    """
    steps = sorted(first.records.keys() & other.records.keys())
    compared, apart = 0, {}
    for step in steps:
        mine, theirs = first.records[step], other.records[step]
        for name in sorted(mine.keys() & theirs.keys() - {"step"}):
            if is_of_the_machine(name):
                continue
            compared += 1
            if name not in apart and not _same(mine[name], theirs[name]):
                apart[name] = step
    rows = []
    for name, step in sorted(apart.items(), key=lambda item: (item[1], not item[0].endswith("/loss"), item[0])):
        last = max(step for step in steps if name in first.records[step] and name in other.records[step])
        rows.append(
            {
                "run": other.name, "figure": name, "step": step,
                "first": _finite(first.records[step][name]), "other": _finite(other.records[step][name]),
                "difference": _apart(first, other, name, step),
                "last_step": last, "last_difference": _apart(first, other, name, last),
            }
        )  # fmt: skip
    begin = {key: rows[0][key] if rows else None for key in ("step", "figure", "first", "other", "difference")}
    bit_equal = not rows and compared > 0
    about = {"run": other.name, "against": first.name, "bit_equal": bit_equal, "steps_compared": len(steps),
             "values_compared": compared, "last_step": steps[-1] if steps else None}  # fmt: skip
    return about | begin, rows


def differences(runs: Sequence[Run], of: Callable[[Run], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the names, among the flat mappings that `of` gives, under which the runs have different values."""
    values = [of(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    return [
        {"name": name} | {run.name: _shown(mapping.get(name, "(none)")) for run, mapping in zip(runs, values, strict=True)}
        for name in names
        if len({json.dumps(mapping.get(name, "(none)")) for mapping in values}) > 1
    ]


def side_by_side(runs: Sequence[Run], of: Callable[[Run], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the figures, in the flat mappings that `of` gives, with their values in each run; None where it has none."""
    values = [of(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    return [
        {"figure": name} | {run.name: mapping.get(name) for run, mapping in zip(runs, values, strict=True)} for name in names
    ]


def tokens_by_step(records: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """Tokens trained on up to each step with a record of training; a step without one counts as the next that has one."""
    total, before, found = 0.0, 0, {}
    for step, record in sorted(records.items()):
        if "train/tokens" in record:
            total += record["train/tokens"] * (step - before)
            before, found[step] = step, total
    return found


def _read(name: str, workdir: epath.Path) -> Run:
    def read(file: str) -> dict[str, Any]:
        path = workdir / file
        return json.loads(path.read_text()) if path.exists() else {}

    settings, records = read("config.json"), {}
    for record in read_metrics(workdir):
        records.setdefault(record["step"], {}).update(record)
    if not settings and not records:
        raise ConfigError(f"--config.runs: {workdir} has neither config.json nor metrics.jsonl; name workdirs of runs.")
    seconds = read_seconds(workdir)
    share = next(row["share"] for row in table(seconds) if row["kind"] == "step") if any(seconds.values()) else None
    settings.pop("invocation", None)
    return Run(name, flatten(settings), records, read(FILE), share)


def _state(run: Run) -> dict[str, Any]:
    return {
        "run": run.name, "experiment": run.settings.get("experiment"), "ended": bool(run.results),
        "records": len(run.records), "last_step": max(run.records, default=None), "goodput_share": run.goodput,
    }  # fmt: skip


def _circumstances(run: Run) -> dict[str, Any]:
    return flatten({name: run.results[name] for name in _ABOUT if name in run.results})


def _final_figures(run: Run) -> dict[str, Any]:
    figures = flatten({name: value for name, value in run.results.items() if name not in (*_ABOUT, "config")})
    return {name: value for name, value in figures.items() if not isinstance(value, list)}


def _last_logged(run: Run) -> dict[str, float]:
    """Every figure's last value, by name."""
    last: dict[str, float] = {}
    for _, record in sorted(run.records.items()):
        last |= {name: _finite(value) for name, value in record.items() if name != "time"}
    return last


def _same(mine: float, theirs: float) -> bool:
    return mine == theirs or (mine != mine and theirs != theirs)  # two that are no number are the same


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _apart(first: Run, other: Run, name: str, step: int) -> float | None:
    return _finite(other.records[step][name] - first.records[step][name])


def _shown(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _sentence(row: Mapping[str, Any]) -> str:
    first, other = row["against"], row["run"]
    if not row["values_compared"]:
        return f"{other} and {first}: no step has been logged by both"
    if row["bit_equal"]:
        return f"{other} and {first}: bit-equal in {row['values_compared']} values, of {row['steps_compared']} steps"
    values = f"{row['figure']} is {row['first']} in {first} and {row['other']} in {other}"
    return f"{other} and {first}: they part at step {row['step']}, where {values} ({row['difference']})"


def _set_otherwise(first: Run, other: Run) -> str:
    rows = differences([first, other], lambda run: run.settings)
    if not rows:
        return f"{other.name} and {first.name}: no setting differs"
    listed = [f"{row['name']} is {row[first.name]} in {first.name} and {row[other.name]} in {other.name}" for row in rows]
    more = f"; and {len(rows) - _TOLD} more, in results.json" if len(rows) > _TOLD else ""
    return f"{other.name} and {first.name}: {'; '.join(listed[:_TOLD])}{more}"


def _curve(run: Run, names: Sequence[str]) -> tuple[str | None, dict[int, float]]:
    """The first of the names that the run has logged, and its values by step."""
    for name in names:
        points = {step: record[name] for step, record in sorted(run.records.items()) if name in record}
        if points:
            return name, points
    return None, {}


def _write_curves(runs: Sequence[Run], path: epath.Path) -> None:
    records: dict[int, dict[str, float]] = {}
    for run in runs:
        for names in _PLOTS.values():
            name, points = _curve(run, names)
            for step, value in points.items():
                records.setdefault(step, {"step": step})[f"{run.name}/{name}"] = value
    path.write_text("".join(json.dumps(record) + "\n" for _, record in sorted(records.items())))


def _plot(title: str, runs: Sequence[Run], path: epath.Path) -> None:
    """The runs' curves by step and, where it is known, by tokens trained on; nothing where no run has the figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    curves = [(run, *_curve(run, _PLOTS[title])) for run in runs]
    if not any(points for _, _, points in curves):
        return
    tokens = {run.name: tokens_by_step(run.records) for run in runs}
    panels = ["step", "tokens"] if any(tokens.values()) else ["step"]
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, by in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for index, (run, _, points) in enumerate(curves):
            at = {step: step if by == "step" else tokens[run.name].get(step) for step in points}
            known = [step for step in points if at[step] is not None]
            # The first is the widest: where the others are the same, it is seen beneath them.
            width = 1.2 + 2.4 * (len(curves) - 1 - index) / (len(curves) - 1)
            marker = "o" if len(known) < 12 else None
            x, y = [at[step] for step in known], [points[step] for step in known]
            axes.plot(x, y, label=run.name, linewidth=width, marker=marker, markersize=3 + width)
        axes.set(xlabel=by, ylabel=", ".join(dict.fromkeys(name for _, name, _ in curves if name)))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
