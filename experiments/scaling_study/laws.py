"""The laws that the study and the planner ask: fitted to published runs, with resamples, or as their papers print them.

Each is Chinchilla's formula, so that all can be asked alike; losses of different laws are of different texts and tokenizers and
are not to be compared, only their differences.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.scaling_fit import overtrained_models, published_data
from lfm_jax.scaling import Points, chinchilla, interval, overtraining, repeated_data, resampled
from lfm_jax.scaling.chinchilla import Chinchilla

RECORDED = Path(__file__).parent / "recorded"
FILE = "laws.json"
_DIGITS = 7  # of a constant in the file
_LEAST_MULTIPLIER = 20  # of Gadre et al.: their law is fitted from there on


class Range(NamedTuple):
    """What the runs of a fit reached: N from and to, D and D / N at most."""

    least_params: float
    params: float
    tokens: float
    multiplier: float


class Estimate(NamedTuple):
    """A figure with the middle 95 % of its resamples; None where the law has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyLaw:
    """name, source: for tables. draws: the constants of all resamples, arrays, None for a law as printed; points: fitted."""

    name: str
    source: str
    law: Chinchilla
    range: Range
    draws: Chinchilla | None = None
    points: int | None = None

    def estimate(self, figure: Callable[[Chinchilla], Any]) -> Estimate:
        """The figure by the law and by its resamples; `figure` gets constants that are numbers, or arrays of the same length."""
        value = float(figure(self.law))
        return Estimate(value) if self.draws is None else Estimate(value, *interval(np.asarray(figure(self.draws))))

    def beyond(self, params: float, tokens: float) -> dict[str, float]:
        """How many times the most that was fitted the tokens and the tokens a parameter are, and the parameters."""
        return {
            "tokens": tokens / self.range.tokens, "multiplier": tokens / params / self.range.multiplier,
            "params": max(params / self.range.params, self.range.least_params / params),
        }  # fmt: skip


# Of the 240 points of Hoffmann et al., the 104 models of Gadre et al., and the runs of Muennighoff et al. that repeat nothing.
_CHINCHILLA_RANGE = Range(57.3e6, 16.2e9, 318e9, 341)
_GADRE_RANGE = Range(10.6e6, 6.89e9, 921e9, 640)
_PRINTED = (
    ("Besiroglu et al.", "Besiroglu et al. 2024, table 1", chinchilla.BESIROGLU, _CHINCHILLA_RANGE),
    ("Hoffmann et al.", "Hoffmann et al. 2022, approach 3, unrounded", chinchilla.HOFFMANN, _CHINCHILLA_RANGE),
    ("Muennighoff et al.", "Muennighoff et al. 2023, C4, unrepeated", repeated_data.C4, Range(7.1e6, 8.67e9, 178e9, 303)),
    ("Gadre et al., C4", "Gadre et al. 2024, table 6", overtraining.C4.as_chinchilla(), _GADRE_RANGE),
    ("Gadre et al., RedPajama", "the same", overtraining.RED_PAJAMA.as_chinchilla(), _GADRE_RANGE),
    ("Gadre et al., RefinedWeb", "the same", overtraining.REFINED_WEB.as_chinchilla(), _GADRE_RANGE),
)
PRINTED = tuple(StudyLaw(name=name, source=source, law=law, range=reach) for name, source, law, reach in _PRINTED)


def fit(data: Path, resamples: int, seed: int) -> tuple[StudyLaw, ...]:
    """The laws with resamples, from the published runs: Chinchilla's 240 points, and each corpus of Gadre et al. at M >= 20."""
    _, points = published_data.read_chinchilla(data)
    near = [chinchilla.to_theta(chinchilla.HOFFMANN)]
    laws = [
        _fitted("Chinchilla's points", "240 runs, Huber minimum (docs/scaling_laws.md)", points, chinchilla.fit,
                lambda sample: chinchilla.fit(sample, starts=near), resamples, seed)
    ]  # fmt: skip
    models = [model for model in published_data.read_overtraining(data) if model.multiplier >= _LEAST_MULTIPLIER]
    for corpus, name in (("c4", "C4"), ("red_pajama", "RedPajama"), ("refined_web", "RefinedWeb")):
        points = overtrained_models.to_points([model for model in models if model.corpus == corpus])
        source = "all of M >= 20, least squares, alpha = beta"
        laws.append(_fitted(f"{name} models", source, points, _tied, _tied, resamples, seed))
    return tuple(laws)


def _tied(points: Points) -> Chinchilla:
    return overtraining.fit(points).as_chinchilla()


def _fitted(
    name: str, source: str, points: Points, fit: Callable, refit: Callable, resamples: int, seed: int
) -> StudyLaw:
    drawn = resampled(points, refit, resamples, seed)
    multipliers = points.tokens / points.params
    reach = Range(*map(float, (points.params.min(), points.params.max(), points.tokens.max(), multipliers.max())))
    draws = Chinchilla(*np.array(drawn).T)
    return StudyLaw(name=name, source=source, law=fit(points), range=reach, draws=draws, points=len(points))


def write(laws: tuple[StudyLaw, ...], path: epath.Path, command: str) -> None:
    """Writes the fitted laws with their resamples, constants to seven digits, a line for each constant's resamples."""
    lines = []
    for each in laws:
        draws = [f'   "{key}": {_rounded(values)}' for key, values in each.draws._asdict().items()]
        constants = dict(zip(Chinchilla._fields, _rounded(each.law), strict=True))
        about = {"name": each.name, "source": each.source, "points": each.points, "law": constants, "range": each.range._asdict()}
        lines.append(json.dumps(about)[:-1] + ', "draws": {\n' + ",\n".join(draws) + "}}")
    path.write_text(f'{{"command": {json.dumps(command)}, "laws": [\n' + ",\n".join(lines) + "]}\n")


def read(path: Path | epath.Path) -> tuple[StudyLaw, ...]:
    """The laws that `write` wrote, with their resamples.

    Raises:
      ValueError: the file is none of those.
    """
    def law(each: dict[str, Any]) -> StudyLaw:
        draws = {key: np.array(values) for key, values in each["draws"].items()}
        return StudyLaw(
            name=each["name"], source=each["source"], points=each["points"], law=Chinchilla(**each["law"]),
            range=Range(**each["range"]), draws=Chinchilla(**draws),
        )  # fmt: skip

    try:
        return tuple(law(each) for each in json.loads(path.read_text())["laws"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of laws as configs/scaling_study.py writes it: {error}") from error


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
