"""One self-contained page about a run: `report.html` in the workdir, to be opened from the disk or sent to somebody.

It shows what `results.json`, `metrics.jsonl` and `config.json` of the workdir hold: the figures, the curves, the configuration
against the preset it started from, samples, and every table among the figures. What is missing is left out.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath

from lfm_jax.configuration import flatten

FILE = "report.html"
_ABOUT = ("config", "seed", "versions", "device")
_FIRST_CHARTS = ("loss", "bits_per_byte", "learning_rate", "tokens_per_second")
_BASELINES = ("unigram", "bigram")
_NOISELESS = ("learning_rate",)
_NO_CHARTS = ("goodput", "hosts", "memory")
_COLORS = {"train": 0, "eval": 1}
_MAX_POINTS = 600
# Geometry of a chart, in units of its own coordinates: the whole, and the margins left, right, top and bottom of the plot.
_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` beside the `results.json` it is made from; returns its path.

    The figures' numbers stand in `<data value="...">` elements with all their digits; what is shown is rounded.

    Raises:
      FileNotFoundError: there is no results.json.
    """
    workdir = epath.Path(workdir)
    results = json.loads((workdir / "results.json").read_text())
    figures = {name: value for name, value in results.items() if name not in (*_ABOUT, "samples")}
    tables = {name: [flatten(row) for row in value] for name, value in figures.items() if _is_table(value)}
    scalars = {name: value for name, value in figures.items() if name not in tables}
    launch = _read_json(workdir / "config.json")
    page = _template().render(
        title=launch.get("experiment", workdir.name),
        workdir=workdir.name,
        command=launch.get("invocation", {}).get("config"),
        figures=flatten(scalars),
        charts=_charts(_read_metrics(workdir / "metrics.jsonl"), scalars),
        settings=_settings(results["config"], launch.get("invocation", {}).get("preset_values", {})),
        samples=results.get("samples", []),
        tables={name: (_columns(rows), rows) for name, rows in tables.items()},
        about=flatten({name: results[name] for name in ("device", "versions", "seed")}),
    )
    path = workdir / FILE
    path.write_text(page)
    return path


def format_figure(value: Any, name: str = "") -> str:
    """A figure as people read it; `name` says the unit where there is one to convert.

    >>> [format_figure(2.34567), format_figure(1234567), format_figure(0.187, "share"), format_figure(3_000_000, "bytes")]
    ['2.346', '1,234,567', '18.7 %', '3.0 MB']
    """
    unit = name.rpartition("_")[2].rpartition(".")[2]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value) and unit == "share":
        return f"{value:.1%}".replace("%", " %")
    if _is_number(value) and unit == "bytes" and abs(value) >= 1000:
        power = min(int(math.log10(abs(value)) // 3), 5)
        return f"{value / 1000**power:.1f} {' kMGTP'[power]}B"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(format_figure(item) for item in value)
    return "–" if value is None else str(value)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = format_figure
    environment.filters["exact"] = lambda value: value if isinstance(value, str) else json.dumps(value)
    environment.tests["number"] = _is_number
    return environment.from_string(Path(__file__).with_suffix(".html").read_text())


def _read_json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _is_table(value: Any) -> bool:
    """Whether the figure is a list of rows: mappings from column to value."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _columns(rows: list[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """(name, whether it holds numbers) of every column that any row has."""
    values: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return [(name, any(_is_number(value) for value in column)) for name, column in values.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _settings(config: Mapping[str, Any], preset_values: Mapping[str, Any]) -> list[tuple[str, Any, bool, Any]]:
    """(field, value, whether it differs from the preset's, the preset's value)."""
    return [(name, value, name in preset_values, preset_values.get(name)) for name, value in flatten(config).items()]


def _read_metrics(path: epath.Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves by quantity and by what they were measured on: {"loss": {"train": [(step, value)], "eval": [...]}}.

    A run that was stopped and resumed may have logged a step twice, and may have left half a line: the later record counts, and
    the half is left out.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name, value in record.items():
            series, slash, quantity = name.partition("/")
            if slash and series not in _NO_CHARTS and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(quantity, {}).setdefault(series, {})[record["step"]] = float(value)
    return {quantity: {name: sorted(points.items()) for name, points in by.items()} for quantity, by in curves.items()}


def _charts(curves: Mapping[str, Mapping[str, list]], figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts' geometry, best-known quantities first; the simpler models' figures become reference lines."""
    order = [name for name in _FIRST_CHARTS if name in curves] + sorted(set(curves) - set(_FIRST_CHARTS))
    charts = []
    for quantity in order:
        references = {name: figures[f"{name}_{quantity}"] for name in _BASELINES if f"{name}_{quantity}" in figures}
        charts.append({"name": quantity, **_chart(curves[quantity], references, smooth=quantity not in _NOISELESS)})
    return charts


def _chart(curves: Mapping[str, list[tuple[float, float]]], references: Mapping[str, float], smooth: bool) -> dict[str, Any]:
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points] + list(references.values())
    x_ticks, y_ticks = _ticks(min(steps), max(steps)), _ticks(min(values), max(values))
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    y_low, y_high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def x(step: float) -> float:
        return round(_LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(step)} {y(value)}" for step, value in points)

    series = []
    for index, (name, points) in enumerate(curves.items()):
        line = _running_mean(points) if smooth else _thin(points)
        marks = line[:: max(1, len(line) // 60)]
        series.append(
            {
                "name": name,
                "color": _COLORS.get(name, index % 3),
                "last": points[-1][1],
                "raw": path(_thin(points)) if len(line) < len(points) else None,
                "path": path(line),
                "marks": [(x(step), y(value), f"step {step}: {format_figure(value)}") for step, value in marks],
            }
        )
    return {
        "size": (_WIDTH, _HEIGHT),
        "frame": (_LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        "x_ticks": [(x(tick), _short(tick)) for tick in x_ticks if x_low <= tick <= x_high],
        "y_ticks": [(y(tick), _short(tick)) for tick in y_ticks],
        "references": [(name, y(value), format_figure(value)) for name, value in references.items()],
        "series": series,
    }


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from just below `low` to just above `high`."""
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [index * step for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _short(value: float) -> str:
    """A tick's label: 1500 as 1.5k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a fiftieth of the curve around about 200 of its points; a curve of few points as it is."""
    reach, stride = len(points) // 100, max(1, len(points) // 200)
    if reach == 0:
        return points
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    smooth = []
    for index in sorted({*range(0, len(points), stride), len(points) - 1}):
        start, stop = max(0, index - reach), min(len(points), index + reach + 1)
        smooth.append((points[index][0], (sums[stop] - sums[start]) / (stop - start)))
    return smooth


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about _MAX_POINTS of them: of each stretch its lowest and highest, so that no spike is lost."""
    stride = math.ceil(2 * len(points) / _MAX_POINTS)
    if stride <= 2:
        return points
    kept = set()
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept | {points[0], points[-1]})
