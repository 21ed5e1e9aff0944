"""What the probes' figures say: exponents of N and D with intervals, whether harm grows with M, and which budget answers best."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.scaling_probes.answers import QuestionsConfig
from experiments.scaling_sweep.grid import COLUMN_WIDTH
from lfm_jax.scaling import FLOPS_PER_PARAMETER_AND_TOKEN, Points, interval, points, relative_errors
from lfm_jax.scaling.chinchilla import need_spread
from lfm_jax.scaling.inference_aware import INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN
from lfm_jax.scaling.precision import Degradation, fit_degradation
from lfm_jax.scaling.train_to_test import TrainToTest, fit, fit_accuracy, fit_task_loss, task_loss

Record = dict[str, Any]
_POWER_CONSTANTS = 3  # of a power of N and of D
_LEAST_LAW = 7  # constants of approach 1


def probe_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each end and probe, as `probes.jsonl` has them: loss is what was added, perturbed_loss what it came to."""
    rows = []
    for record in records:
        end = {name: record["end"][name] for name in ("name", "params", "tokens", "multiplier", "trunk")}
        harms = [(each["probe"], each["loss"], each["draws"]) for each in record["probes"]]
        harms += [(f"fine-tuned at {each['rate']:g}", each["forgotten"], [each["forgotten"]]) for each in record["tuned"]]
        for probe, added, draws in harms:
            deviation = float(np.std(draws, ddof=1)) if len(draws) > 1 else None
            losses = {"loss": added, "loss_before": record["loss"], "perturbed_loss": record["loss"] + added}
            rows.append(end | {"probe": probe, **losses, "deviation_of_draws": deviation})
    return rows


def new_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each end and rate of the fine-tuning: loss is that on the new source, above its own."""
    names = ("name", "params", "tokens", "multiplier", "trunk")
    return [
        {name: record["end"][name] for name in names}
        | {"rate": each["rate"], "probe": f"new source at {each['rate']:g}"}
        | {"loss": each["new_excess"], "perturbed_loss": each["new_loss"]}
        for record in records
        for each in record["tuned"]
    ]


def exponents(rows: Sequence[dict[str, Any]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each probe the least-squares ln(added) = c + gamma_D ln D - gamma_N ln N over the ends that it harmed."""
    found = []
    for probe in dict.fromkeys(row["probe"] for row in rows):
        mine = [row for row in rows if row["probe"] == probe]
        harmed = [[row] for row in mine if row["loss"] > 0]
        about = {"probe": probe, "ends": len(mine), "harmed": len(harmed)}
        found.append(about | _with_intervals(harmed, _power, resamples, seed))
    return found


def _power(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    known = _points(rows)
    columns = np.stack([np.ones(len(known)), np.log(known.tokens), -np.log(known.params)], axis=1)
    ends, sizes = len(set(zip(known.params, known.tokens, strict=True))), len(set(known.params))
    if np.linalg.matrix_rank(columns) < _POWER_CONSTANTS or ends <= _POWER_CONSTANTS:
        raise ValueError(f"exponents of N and D need {_POWER_CONSTANTS + 1} ends of several N and M, got {ends} of {sizes} N")
    _, of_tokens, of_params = np.linalg.lstsq(columns, np.log(known.loss), rcond=None)[0].tolist()
    return {"gamma_D": of_tokens, "gamma_N": of_params}


def kumar(rows: Sequence[dict[str, Any]], bits: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    """d = C_T (D^gamma_D / N^gamma_N) exp(-P / gamma_post) of Kumar et al. 2024, fitted to all bits at once, with intervals."""
    of_probe = {f"rounded to {each} bits": each for each in bits}
    by_end: dict[str, list] = {}
    for row in rows:
        if row["probe"] in of_probe and row["loss"] > 0:
            by_end.setdefault(row["name"], []).append(row | {"weight_bits": of_probe[row["probe"]]})

    near: list[Degradation] = []  # the law of all ends, from where those of drawings are searched

    def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        _power(rows)  # refuses what determines no exponents
        law = fit_degradation(_points(rows, weight_bits=[row["weight_bits"] for row in rows]), near or None)
        near[:] = near or [law]
        return law._asdict()

    return {"ends": len(by_end)} | _with_intervals(list(by_end.values()), fitted, resamples, seed)


def _points(rows: Sequence[dict[str, Any]], **others: Any) -> Points:
    return points(*([row[name] for row in rows] for name in ("params", "tokens", "loss")), **others)


def _with_intervals(groups: list[list], fitted: Callable[[list], dict[str, float]], resamples: int, seed: int) -> dict[str, Any]:
    """Constants, and their 95 % intervals over drawings of ends with all their rows; or why there are none."""
    flat = lambda chosen: [row for index in chosen for row in groups[index]]
    try:
        constants = fitted(flat(range(len(groups))))
    except ValueError as error:
        return {"not_fitted": str(error)}
    random, drawn, refused = np.random.default_rng(seed), [], 0
    while len(drawn) < resamples and refused < resamples:
        try:
            drawn.append(fitted(flat(random.integers(len(groups), size=len(groups)))))
        except ValueError:
            refused += 1  # of too few different ends
    intervals = {name: interval(np.array([each[name] for each in drawn])) for name in constants} if drawn else None
    return {"constants": constants, "intervals_95": intervals}


def over_multipliers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each trunk and probe: whether harm grows at every step of M, and at which M the perturbed model is best."""
    found = []
    for trunk, probe in dict.fromkeys((row["trunk"], row["probe"]) for row in rows):
        mine = sorted(
            (row for row in rows if (row["trunk"], row["probe"]) == (trunk, probe)), key=lambda row: row["multiplier"]
        )  # fmt: skip
        if len(mine) < 3:
            continue
        added, after = (np.array([row[name] for row in mine]) for name in ("loss", "perturbed_loss"))
        best = int(after.argmin())
        found.append({
            "trunk": trunk, "probe": probe, "ends": len(mine), "steps_up": int((np.diff(added) > 0).sum()),
            "first": float(added[0]), "last": float(added[-1]), "best_multiplier": mine[best]["multiplier"],
            "last_multiplier": mine[-1]["multiplier"], "turns": best < len(mine) - 1,
            "rise_after_best": float(after[-1] - after[best]),
        })  # fmt: skip
    return found


def answer_laws(records: Sequence[Record], config: QuestionsConfig, seed: int) -> list[dict[str, Any]]:
    """For each length of the answer Roberts's two approaches, fitted to the ends that laws are fitted to, with their errors."""
    found = []
    for symbols in config.symbols:
        fitted, held_out = (_of_samples([r for r in records if r["end"][use]], symbols, config) for use in ("fitted", "held_out"))
        row: dict[str, Any] = {"symbols": symbols, "ends": len(fitted) // len(config.samples)}
        try:
            row |= _laws(fitted, held_out, seed)
        except ValueError as error:
            row["not_fitted"] = str(error)
        found.append(row)
    return found


def _of_samples(records: Sequence[Record], symbols: int, config: QuestionsConfig) -> list[dict[str, float]]:
    """A row for each end and k: loss is the mean of -ln pass@k over questions, accuracy the mean of pass@k."""
    rows = []
    for record in records:
        chances = _chances(record, symbols)
        one = {name: record["end"][name] for name in ("params", "tokens")} | {"one_sample": task_loss(chances, 1)}
        one["error_of_one_sample"] = float(np.std(np.log(chances), ddof=1) / np.sqrt(len(chances)))
        rows += [
            one | {"samples": samples, "loss": task_loss(chances, samples), "accuracy": pass_rate(chances, samples)}
            for samples in config.samples
        ]
    return rows


def _chances(record: Record, symbols: int) -> np.ndarray:
    return np.array(record["chances"])[:, symbols - 1]


def pass_rate(chances: np.ndarray, samples: float) -> float:
    """The mean over questions of pass@k = 1 - (1 - p)^k."""
    return float(-np.expm1(samples * np.log1p(-chances)).mean())


def _laws(fitted: list, held_out: list, seed: int) -> dict[str, Any]:
    if not fitted:
        raise ValueError("none of the ends that laws are fitted to is done")
    column = lambda rows, name: np.array([row[name] for row in rows], np.float64)
    known = _points(fitted, samples=column(fitted, "samples"))
    once = [row for row in fitted if row["samples"] == fitted[0]["samples"]]
    need_spread(_points(once), _LEAST_LAW)
    law = fit(known, seed=seed)
    # Approach 2 knows an end by the loss that Chinchilla's law gives the task with one sample.
    task_points = points(column(once, "params"), column(once, "tokens"), column(once, "one_sample"))
    task = fit_task_loss(task_points, column(once, "error_of_one_sample"))
    accuracy = fit_accuracy(task.predict(known), known.samples, column(fitted, "accuracy"))

    def errors(rows: list) -> dict[str, float]:
        given = _points(rows, samples=column(rows, "samples"))
        second = accuracy.accuracy(task.predict(given), given.samples) / column(rows, "accuracy") - 1
        return {"approach_1": float(np.abs(relative_errors(law, given)).mean()), "approach_2": float(np.abs(second).mean())}

    found = {"approach_1": law._asdict(), "approach_2": accuracy._asdict(), "fitted_error_share": errors(fitted)}
    return found | ({"held_out_error_share": errors(held_out)} if held_out else {})


def best_budgets(
    records: Sequence[Record], laws: Sequence[dict[str, Any]], budgets: Sequence[float], config: QuestionsConfig
) -> list[dict[str, Any]]:
    """For each training budget with several sizes, inference budget and length of the answer: the best size, as measured.

    Beside it stands the size of least loss on text, which is the compute-optimal one of the column; k is a whole number. by_law:
    what approach 1 has for the best of all sizes, seen or not.
    """
    rows, by_symbols = [], {row["symbols"]: row.get("approach_1") for row in laws}
    for budget in budgets:
        near = [record for record in records if _is_plain(record) and _is_near(record, budget)]
        if len({record["end"]["params"] for record in near}) < 2:
            continue
        on_text = min(near, key=lambda record: record["end"]["loss_in_sweep"])
        for flops in config.inference_flops:
            for symbols in config.symbols:
                tried = [_tried(record, symbols, flops) for record in near if _samples(record, flops) >= 1]
                optimal = next((each for each in tried if each["name"] == on_text["end"]["name"]), None)
                if optimal is not None and len(tried) > 1:
                    rows.append({
                        "training_flops": budget, "inference_flops": flops, "symbols": symbols, "on_text": optimal,
                        "best": min(tried, key=lambda each: each["task_loss"]),
                        "by_law": _by_law(by_symbols[symbols], budget, flops),
                    })  # fmt: skip
    return rows


def _is_plain(record: Record) -> bool:
    """Whether it is an end that a law of the sweep is fitted to, or foresees: one of each size and M."""
    return record["end"]["fitted"] or record["end"]["held_out"]


def _is_near(record: Record, budget: float) -> bool:
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * record["end"]["params"] * record["end"]["tokens"]
    return abs(np.log(flops / budget)) <= np.log(COLUMN_WIDTH)


def _by_law(constants: dict[str, float] | None, training_flops: float, inference_flops: float) -> dict[str, float] | None:
    if constants is None:
        return None
    params, tokens, samples = TrainToTest(**constants).optimum(training_flops, inference_flops)
    return {"params": params, "multiplier": tokens / params, "samples": samples}


def _samples(record: Record, flops: float) -> int:
    return int(flops / (INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN * record["end"]["params"]))


def _tried(record: Record, symbols: int, flops: float) -> dict[str, Any]:
    samples, chances = _samples(record, flops), _chances(record, symbols)
    end = {name: record["end"][name] for name in ("name", "params", "multiplier")}
    return end | {"samples": samples, "task_loss": task_loss(chances, samples), "pass_rate": pass_rate(chances, samples)}


def answer_curves(records: Sequence[Record], config: QuestionsConfig) -> list[dict[str, Any]]:
    """Of each end of which laws are fitted or foresee: -ln pass@k of the longest answers over 2 N k."""
    curves = []
    for record in records:
        if _is_plain(record):
            params, chances = record["end"]["params"], _chances(record, max(config.symbols))
            curves.append({
                "name": record["end"]["name"], "multiplier": record["end"]["multiplier"], "samples": config.samples,
                "inference_flops": [INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN * params * samples for samples in config.samples],
                "task_loss": [task_loss(chances, samples) for samples in config.samples],
            })  # fmt: skip
    return curves
