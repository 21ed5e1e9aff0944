"""The study: what the scaling laws say, and do not say, of small models trained for very long."""

import dataclasses
import time
from pathlib import Path

from etils import epath

from experiments.results import write_results
from experiments.scaling_fit.published_data import folder_of
from experiments.scaling_study import laws, report
from experiments.scaling_study.costs import Costs
from lfm_jax.configuration import mistakes_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """data: the folder with `chinchilla` and `overtraining`; None: the recorded constants and resamples of the laws are taken.

    recorded: the folder with those, and with the runs of one's own sweep; None for the one beside this file.
    resamples, own_resamples: of the bootstrap, of the published runs (without data the recorded ones are taken) and of one's own.
    seed: of both. costs: of training and of devices.
    """

    data: str | None = None
    recorded: str | None = None
    resamples: int = 400
    own_resamples: int = 100
    seed: int = 42
    costs: Costs = Costs()

    def __post_init__(self):
        if min(self.resamples, self.own_resamples) < 2:
            raise ValueError(f"resamples and own_resamples must be at least 2, got {self.resamples} and {self.own_resamples}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes the report (scaling_study.md, scaling_study.png), the laws with their resamples (laws.json) and results.json.

    Raises:
      ConfigError: the data are not in their folder, or a recorded file cannot be read.
    """
    from rich.console import Console

    from experiments.scaling_study import budgets
    from experiments.scaling_study.pictures import plot

    console, begin = Console(), time.perf_counter()
    with console.status("fitting"):
        fitted = _laws(config, workdir)
    with mistakes_in("recorded"), console.status("the study"):
        figures = report.figures(fitted, _recorded(config), config)
    (workdir / "scaling_study.md").write_text(report.markdown(figures, config))
    plot(fitted, budgets.sizes(), config.costs, workdir / "scaling_study.png")
    for line in report.says(figures, config):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    write_results(workdir, {**figures, "seconds": time.perf_counter() - begin}, config)


def _recorded(config: Config) -> Path:
    return laws.RECORDED if config.recorded is None else Path(config.recorded)


def _laws(config: Config, workdir: epath.Path) -> tuple[laws.StudyLaw, ...]:
    """Fitted now or recorded; read back from the file either way, so that both give the same digits."""
    file = workdir / laws.FILE
    if config.data is not None:
        folder = folder_of(config.data, otherwise="--config.data=None for the recorded constants")
        laws.write(laws.fit(folder, config.resamples, config.seed), file, report.COMMAND)
    else:
        with mistakes_in("recorded"):
            file.write_text((_recorded(config) / laws.FILE).read_text())
    with mistakes_in("recorded"):
        return laws.read(file)
