"""The scaling laws fitted to published runs and compared with what was published of them; or fitted to a sweep of one's own."""

import dataclasses
import time
from typing import Any

from etils import epath

from experiments.results import write_results
from lfm_jax.configuration import mistakes_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is fitted.

    data: the folder with `chinchilla` and `overtraining`, None where there is none. points: a file of one's own points, fitted
    instead (`lfm_jax.scaling.read_points` says what is in it).
    resamples: of the bootstrap. noise_draws: how often the five points of Gadre et al. are fitted with noise, for each amount.
    held_out_share: of one's own points, those of the most FLOPs are held out, where no line of the file says that it is.
    seed: of resamples and noise.
    """

    data: str | None = None
    points: str | None = None
    resamples: int = 4000
    noise_draws: int = 1000
    held_out_share: float = 0.2
    seed: int = 42

    def __post_init__(self):
        if min(self.resamples, self.noise_draws) < 2:
            raise ValueError(f"resamples and noise_draws must be at least 2, got {self.resamples} and {self.noise_draws}")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share must be at least 0 and below 1, got {self.held_out_share}")
        if self.data is None and self.points is None:
            raise ValueError(
                "there is nothing to fit: set LFM_JAX_DATA to the folder with the published data, or give --config.points=FILE"
            )


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json and, of the published runs, the parity table (scaling_fit.md) and pictures.

    Raises:
      ConfigError: the data are not in their folder, or one's own points cannot be read or fitted.
    """
    from rich.console import Console

    console, begin = Console(), time.perf_counter()
    if config.points is not None:
        figures = _own(config, console)
    else:
        figures = _published(config, workdir, console)
    write_results(workdir, {**figures, "seconds": time.perf_counter() - begin}, config)


def _own(config: Config, console: Any) -> dict[str, Any]:
    from experiments.scaling_fit import own_points, tables
    from lfm_jax.scaling import read_held_out, read_points

    with mistakes_in("points"), console.status("fitting"):
        points, unseen = read_points(config.points), read_held_out(config.points)
        laws = own_points.study(points, config.resamples, config.seed, config.held_out_share, unseen)
    for table in tables.own(laws):
        console.print(table)
    return {"points": len(points), "laws": laws}


def _published(config: Config, workdir: epath.Path, console: Any) -> dict[str, Any]:
    from experiments.scaling_fit import chinchilla_points, overtrained_models, parity, published_data, repeated_runs, tables
    from experiments.scaling_fit.pictures import plot

    folder = published_data.folder_of(config.data, otherwise="--config.points=FILE")
    every, points = published_data.read_chinchilla(folder)
    models = published_data.read_overtraining(folder)
    with console.status(f"Chinchilla's points, {config.resamples} resamples"):
        figures, rows, law = chinchilla_points.study(every, points, config.resamples, config.seed)
    with console.status("the over-trained models"):
        more, more_rows, fits = overtrained_models.study(models, config.noise_draws, config.seed)
    with console.status("repeated tokens"):
        repeated, repeated_rows = repeated_runs.study(config.seed)
    rows = [*rows, *more_rows, *repeated_rows, *parity.from_constants()]
    figures = {**figures, **more, **repeated, "parity": rows, "parity_rows": len(rows), "chinchilla_points": len(points)}
    console.print(tables.parity(rows))
    (workdir / "scaling_fit.md").write_text(tables.markdown(figures))
    plot(points, law, figures["tokens_per_parameter"], models, fits, workdir / "scaling_fit.png")
    return figures
