"""The runs of one's own sweep, recorded as small files: the laws fitted to them, what was held out, and probes of their ends.

points.jsonl: an object a line with params, tokens and loss, as configs/scaling_sweep.py writes it; of architecture, held_out
(true: chosen before any fit, and in none) and fitted (false: a seed or a rate more) what a run has. probes.jsonl, as
configs/scaling_probes.py writes it: params, tokens, probe (what was done to the trained model) and loss (what it added, in nats).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from experiments.scaling_fit import own_points
from lfm_jax.scaling import Points, interval, points, relative_errors, resampled
from lfm_jax.scaling.chinchilla import need_spread

POINTS, PROBES = "points.jsonl", "probes.jsonl"
_LEAST_CONSTANTS = 4  # of a law of N and D
_LEAST_PROBES = 4  # for the three constants of a power of N and D


def study(folder: Path | epath.Path, resamples: int, seed: int) -> dict[str, Any]:
    """Figures of what is recorded in the folder; where nothing is, their numbers are 0.

    Raises:
      ValueError: a file is recorded, and a line of it lacks what it needs.
    """
    runs = _read(folder / POINTS, ("params", "tokens", "loss"))
    probes = _read(folder / PROBES, ("params", "tokens", "probe", "loss"))
    laws = []
    for architecture in dict.fromkeys(str(run.get("architecture", "")) for run in runs):
        laws += _fit([run for run in runs if str(run.get("architecture", "")) == architecture], architecture, resamples, seed)
    return {
        "own_runs": len(runs), "own_held_out": sum(bool(run.get("held_out")) for run in runs), "own_laws": laws,
        "own_probes": len(probes), "own_probe_exponents": _exponents(probes),
    }  # fmt: skip


def _read(path: Path | epath.Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise ValueError(f"{path}: the run on line {number} has no {', '.join(missing)}")
    return rows


def _points(runs: list[dict[str, Any]]) -> Points:
    return points(*([run[name] for run in runs] for name in ("params", "tokens", "loss")))


def _fit(runs: list[dict[str, Any]], architecture: str, resamples: int, seed: int) -> list[dict[str, Any]]:
    """The laws of N and D fitted to what is to be fitted, with their errors on what is held out; or why they cannot be."""
    fitted = [run for run in runs if run.get("fitted", not run.get("held_out"))]
    held_out = [run for run in runs if run.get("held_out")]
    if not fitted:
        return [{"architecture": architecture, "law": None, "not_fitted": "none of its runs is to be fitted"}]
    known, rows = _points(fitted), []
    try:
        need_spread(known, _LEAST_CONSTANTS)
    except ValueError as error:
        return [{"architecture": architecture, "law": None, "not_fitted": str(error)}]
    for name, fit in own_points.applicable(known).items():
        row = {"architecture": architecture, "law": name, "points": len(known)}
        try:
            law = fit(known, None)
            drawn = resampled(known, lambda sample, fit=fit, law=law: fit(sample, law), resamples, seed)
        except ValueError as error:
            rows.append({**row, "not_fitted": str(error)})
            continue
        row |= {
            "constants": law._asdict(), "fitted_error_share": float(np.abs(relative_errors(law, known)).mean()),
            "intervals_95": {key: interval(np.array([getattr(each, key) for each in drawn])) for key in law._fields},
        }  # fmt: skip
        if held_out:
            errors = relative_errors(law, _points(held_out))
            row |= {
                "held_out": len(errors), "held_out_error_share": float(np.abs(errors).mean()),
                "held_out_worst_share": float(errors[np.abs(errors).argmax()]),
            }  # fmt: skip
        rows.append(row)
    return rows


def _exponents(probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each probe the least-squares ln(added) = c + g_D ln D - g_N ln N: whether harm grows with the tokens, and how fast."""
    rows = []
    for name in dict.fromkeys(row["probe"] for row in probes):
        mine = [row for row in probes if row["probe"] == name]
        harmed = [row for row in mine if row["loss"] > 0]
        row = {"probe": name, "runs": len(mine), "harmed": len(harmed), "token_exponent": None, "param_exponent": None}
        params, tokens, added = (np.array([each[key] for each in harmed], np.float64) for key in ("params", "tokens", "loss"))
        columns = np.stack([np.ones(len(harmed)), np.log(tokens), -np.log(params)], axis=1)
        if len(harmed) >= _LEAST_PROBES and np.linalg.matrix_rank(columns) == columns.shape[1]:
            _, row["token_exponent"], row["param_exponent"] = np.linalg.lstsq(columns, np.log(added), rcond=None)[0].tolist()
        rows.append(row)
    return rows
