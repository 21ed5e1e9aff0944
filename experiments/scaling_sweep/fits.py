"""Laws fitted to a sweep, and how well they foresee what was kept from them: beside what the noise of seeds alone would do."""

import collections
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.scaling_fit.own_points import applicable
from experiments.scaling_sweep.grid import COLUMN_WIDTH
from experiments.scaling_sweep.text import Known
from lfm_jax.scaling import FLOPS_PER_PARAMETER_AND_TOKEN, Law, Points, interval, points, relative_errors
from lfm_jax.scaling.chinchilla import Chinchilla, need_spread
from lfm_jax.scaling.compute_optimal import Minima, envelope, isoflop

# How N is counted: its name in a point.
COUNTS = {"without_embedding": "params", "with_embedding": "params_with_embedding"}
_COVERAGE = 0.95
_LEAST_CONSTANTS = 4  # of a law of N and D


class Noise(NamedTuple):
    """Standard deviations of ln L between seeds. shared: of what all branches of a trunk have in common; own: of what each has.

    seeds, columns: of how many each; None where there is only one seed, so that nothing is known.
    """

    shared: float
    own: float
    seeds: int
    columns: int


def noise_of(rows: Sequence[dict[str, Any]]) -> Noise | None:
    """The noise, from the branches of a size that were trained with several seeds (analysis of variance in two directions)."""
    groups: dict[tuple, dict[float, dict[int, float]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows:
        if row["multiplier"] is not None and row["budget"] is None and not row["apart"] and row["rate"] == 1:
            key = row["embed_dim"], row["layers"], row["architecture"]
            groups[key][row["multiplier"]][row["seed"]] = np.log(row["loss"])
    tables = []
    for columns in groups.values():
        seeds = set.union(*(set(column) for column in columns.values()))
        whole = [[column[seed] for column in columns.values() if len(column) == len(seeds)] for seed in sorted(seeds)]
        if len(seeds) > 1 and whole[0]:
            tables.append(np.array(whole))
    if not tables:
        return None
    table = max(tables, key=np.size)  # [seeds, columns]
    seeds, columns = table.shape
    off = table - table.mean(axis=0)
    of_seeds = off.mean(axis=1)
    if columns == 1:
        return Noise(0.0, float(np.sqrt((off**2).sum() / (seeds - 1))), seeds, columns)
    own = ((off - of_seeds[:, None]) ** 2).sum() / ((seeds - 1) * (columns - 1))
    shared = max(0.0, (of_seeds**2).sum() / (seeds - 1) - own / columns)
    return Noise(float(np.sqrt(shared)), float(np.sqrt(own)), seeds, columns)


def fit_laws(
    rows: Sequence[dict[str, Any]], noise: Noise | None, known: Known, draws: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each law and way of counting: constants, errors on what was fitted and on what was held out, E, the optimum.

    Where the noise is known, held-out errors and E stand beside the 95 % intervals that they would be in if the law were true:
    losses are drawn from the law with that noise, and the law is fitted to them again.

    Args:
      rows: points of the sweep. known: the least loss. draws: of losses. seed: of these.
    """
    fitted = [row for row in rows if row["fitted"]]
    held_out = [row for row in rows if row["held_out"]]
    found = []
    for count, field in COUNTS.items():
        try:
            of_fit = _points(fitted, field)
            need_spread(of_fit, _LEAST_CONSTANTS)
            laws = applicable(of_fit)
        except ValueError as error:
            found.append({"law": None, "count": count, "not_fitted": str(error)})
            continue
        for name, fit in laws.items():
            row: dict[str, Any] = {"law": name, "count": count}
            try:
                with np.errstate(all="ignore"):
                    law = fit(of_fit, None)
            except ValueError as error:
                found.append(row | {"not_fitted": str(error)})
                continue
            unseen = _points(held_out, field) if held_out else None
            drawn = [] if noise is None else _drawn(law, fit, of_fit, unseen, noise, draws, seed)
            row |= _fitted(law, of_fit, drawn, known)
            if unseen is not None:
                row["held_out"] = _foreseen(law, unseen, held_out, drawn)
            found.append(row)
    return found


class _Draw(NamedTuple):
    """A law fitted to drawn losses, and its relative errors on the held-out points as drawn."""

    law: Law
    errors: np.ndarray


def _drawn(
    law: Law, fit: Callable[[Points, Any], Law], of_fit: Points, unseen: Points | None, noise: Noise, draws: int, seed: int
) -> list[_Draw]:
    """Laws fitted to losses of the law with noise; fewer where it cannot be fitted. Runs of one size are of one trunk."""
    random, found, refused = np.random.default_rng(seed), [], 0
    near = law if min(law) > 0 else None  # the search is in logarithms
    sizes = np.unique(of_fit.params if unseen is None else np.concatenate([of_fit.params, unseen.params]))
    while len(found) < draws and refused < draws:
        shared = noise.shared * random.standard_normal(len(sizes))

        def with_noise(known: Points, shared: np.ndarray = shared) -> Points:
            off = shared[np.searchsorted(sizes, known.params)] + noise.own * random.standard_normal(len(known))
            return points(known.params, known.tokens, law.predict(known) * np.exp(off))

        with np.errstate(all="ignore"), contextlib.suppress(ValueError):
            again = fit(with_noise(of_fit), near)
            errors = np.zeros(0) if unseen is None else relative_errors(again, with_noise(unseen))
            if np.isfinite([*again, *errors]).all():
                found.append(_Draw(again, errors))
                continue
        refused += 1
    return found


def _fitted(law: Any, of_fit: Points, drawn: list[_Draw], known: Known) -> dict[str, Any]:
    errors = relative_errors(law, of_fit)
    row: dict[str, Any] = {
        "points": len(of_fit), "constants": law._asdict(), "fitted_error_share": float(np.abs(errors).mean()),
        "fitted_rms_share": float(np.sqrt((errors**2).mean())),
    }  # fmt: skip
    if hasattr(law, "E"):
        row["E_minus_known"] = law.E - known.log_loss
    if drawn:
        constants = {name: np.array([getattr(draw.law, name) for draw in drawn]) for name in law._fields}
        row["draws"] = len(drawn)
        row["intervals_95"] = {name: interval(values, _COVERAGE) for name, values in constants.items()}
    chinchilla = law.as_chinchilla() if hasattr(law, "as_chinchilla") else law
    if isinstance(chinchilla, Chinchilla) and min(chinchilla) > 0:
        row["optimal_exponent"] = chinchilla.exponent
        row["optimal_tokens_per_parameter"] = float(chinchilla.tokens_per_parameter(np.median(of_fit.flops)))
    return row


def _foreseen(law: Law, unseen: Points, rows: list[dict[str, Any]], drawn: list[_Draw]) -> list[dict[str, Any]]:
    found = []
    for index, (row, error, predicted) in enumerate(
        zip(rows, relative_errors(law, unseen).tolist(), law.predict(unseen).tolist(), strict=True)
    ):
        about = {"name": row["name"], "loss": row["loss"], "predicted": predicted, "error_share": error}
        if drawn:
            low, high = interval(np.array([draw.errors[index] for draw in drawn]), _COVERAGE)
            about |= {"noise_low_95": low, "noise_high_95": high, "within_noise": low <= error <= high}
        found.append(about)
    return found


def optima(rows: Sequence[dict[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Approaches 1 and 2 of Hoffmann et al. 2022: optima, and the exponent a of N* ~ C^a, or why there is none.

    N is outside of the embedding. Approach 1 takes the losses at the ends of a trunk's pieces, at a constant rate, for its curve.
    """
    ends = [row for row in rows if row["multiplier"] is not None and (row["fitted"] or row["held_out"])]
    pieces = [row for row in rows if row["multiplier"] is None and (row["architecture"], row["seed"]) == ("hybrid", 0)]
    pieces = [row for row in pieces if row["rate"] == 1]
    ways = [(f"IsoFLOP, {budget:.3g}", lambda budget=budget: _column(ends, budget)) for budget in budgets]
    ways.append(("envelope at a constant rate", lambda: envelope(_points(pieces, "params"))))
    found, lowest = [], []
    for name, minima in ways:
        try:
            lowest.append(minima())
        except ValueError as error:
            found.append({"way": name, "not_found": str(error)})
            continue
        found.append({"way": name} | _lowest(lowest[-1]))
    columns = [each for each in lowest if len(each.flops) == 1]
    if len(columns) > 1:
        law = Minima(*(np.concatenate(each) for each in zip(*columns, strict=True))).power_law()
        found.append({"way": "IsoFLOP, all", "budgets": len(columns), "exponent": law.exponent})
    return found


def _column(ends: Sequence[dict[str, Any]], budget: float) -> Minima:
    return isoflop(_points(ends, "params"), np.array([budget]), COLUMN_WIDTH)


def _lowest(minima: Minima) -> dict[str, Any]:
    """The middle of the budgets, and the exponent where there are several."""
    at = len(minima.flops) // 2
    flops, params = float(minima.flops[at]), float(minima.params[at])
    row = {"budgets": len(minima.flops), "flops": flops, "params": params, "loss": float(minima.loss[at])}
    row["tokens_per_parameter"] = flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params**2)
    return row | ({"exponent": minima.power_law().exponent} if len(minima.flops) > 1 else {})


def compared(rows: Sequence[dict[str, Any]], noise: Noise | None) -> dict[str, list[dict[str, Any]]]:
    """Pairs of runs that differ in one thing: branches and runs from nothing; attention alone and the hybrid; learning rates."""
    key = lambda row: (row["embed_dim"], row["layers"], row["multiplier"])
    plain = {key(row): row for row in rows if (row["fitted"] or row["held_out"]) and row["budget"] is None}
    sorts = {
        "apart": [row for row in rows if row["apart"]],
        "attention_only": [row for row in rows if row["architecture"] == "attention" and row["multiplier"] is not None],
        "rates": [row for row in rows if row["rate"] != 1 and row["multiplier"] is not None],
    }
    deviation = None if noise is None else float(np.hypot(noise.shared, noise.own) * np.sqrt(2))
    pair = lambda row, other: {
        "name": row["name"], "loss": row["loss"], "other": other["name"], "other_loss": other["loss"],
        "difference_share": row["loss"] / other["loss"] - 1, "noise_of_a_difference_share": deviation,
        "params": row["params"], "other_params": other["params"],
    }  # fmt: skip
    return {sort: [pair(row, plain[key(row)]) for row in chosen if key(row) in plain] for sort, chosen in sorts.items()}


def _points(rows: Sequence[dict[str, Any]], field: str) -> Points:
    return points(*([row[name] for row in rows] for name in (field, "tokens", "loss")))
