"""A short training on another source of the same kind, whose contexts have other favourites: a new language."""

import dataclasses
import os

from etils import epath

from experiments import pretrain
from experiments.chains import run_stage
from experiments.scaling_probes.ends import Sweep
from experiments.scaling_sweep.text import FOLDER as TEXT
from experiments.scaling_sweep.text import Known, prepare_text

_SPARE = 1.2  # what a row leaves empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """tokens: of the new source, in batches of `rows` rows. rates: factors of the peak rate that the end was trained with.

    warmup_share: part of the steps in which the rate rises; the decay is that of the end's own run.
    seed: of the new source's hashes; the sweep's is another.
    """

    tokens: int = 1 << 16
    rows: int = 16
    rates: tuple[float, ...] = (0.1, 0.5)
    warmup_share: float = 0.1
    seed: int = 1

    def __post_init__(self):
        if self.tokens < 1 or self.rows < 1 or min(self.rates, default=1) <= 0:
            raise ValueError(f"tokens, rows and rates must be above 0, got {self.tokens}, {self.rows} and {self.rates}")
        if not 0 <= self.warmup_share < 0.5:
            raise ValueError(f"warmup_share must be in [0, 0.5), got {self.warmup_share}")


def prepare_new_text(workdir: epath.Path, sweep: Sweep, config: FineTuningConfig, held_out_tokens: int, seq_len: int) -> Known:
    """Writes the text of the new source to the workdir, unless it is there; the least loss on its held-out split.

    Raises:
      ValueError: it is the sweep's own source.
    """
    if config.seed == sweep.source.seed:
        raise ValueError(f"fine_tuning.seed={config.seed} is that of the sweep's own source; take another, or nothing is new")
    source = dataclasses.replace(sweep.source, seed=config.seed)
    counts = {"train": round(_SPARE * config.tokens), "held_out": held_out_tokens}
    return prepare_text(workdir, source, counts, seq_len)


def place_of(workdir: epath.Path, name: str) -> epath.Path:
    """Where the runs that start from an end are, one for each rate."""
    return workdir / "tuned" / name


def fine_tune(workdir: epath.Path, sweep: Sweep, name: str, config: FineTuningConfig, rate: float) -> tuple[epath.Path, float]:
    """Trains an end on the new source, unless that is done; (its stage, its loss on the new source in nats a token)."""
    settings = sweep.settings(name)
    loader = dataclasses.replace(settings.loader, batch_size=config.rows, seed=0, epochs=1)
    steps = max(1, config.tokens // loader.positions(1))
    schedule = dataclasses.replace(settings.optimizer.schedule, warmup_steps=round(config.warmup_share * steps))
    optimizer = dataclasses.replace(
        settings.optimizer, schedule=schedule, learning_rate=rate * settings.optimizer.learning_rate
    )  # fmt: skip
    tuned = dataclasses.replace(
        settings, model=None, init_from=os.fspath(sweep.place(name)), tokens_from=(os.fspath(workdir / TEXT),), loader=loader,
        optimizer=optimizer, train=dataclasses.replace(settings.train, steps=steps, seed=0, checkpoint_every=steps),
    )  # fmt: skip
    place = place_of(workdir, name) / f"rate{rate:g}"
    return place, run_stage(pretrain, tuned, place)["nll_per_token"]
