"""A sweep over sizes and tokens on text whose entropy is known: its runs, and every law that applies fitted to their losses."""

import dataclasses
import os
import time
from typing import Any

import jax
from etils import epath

from data_pipelines.sources.known_entropy import KnownEntropyConfig
from experiments import pretrain
from experiments.results import write_results
from experiments.scaling_sweep import fits, jobs, tables
from experiments.scaling_sweep.grid import RulesConfig, Run, TrunkConfig, runs_of
from experiments.scaling_sweep.pictures import plot
from experiments.scaling_sweep.runs import Status, carry_out, points_of, read_recorded, write_points
from experiments.scaling_sweep.text import Known, prepare_text
from lfm_jax.configuration import ConfigError, mistakes_in, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """trunks: the models, and how long each is trained. budgets: FLOPs, 6 N D, of IsoFLOP columns.

    source: of the text. train_tokens, held_out_tokens: symbols of each split. No run sees a token of it twice.
    pretrain: a run of a model of the size that `rules` start from; its data, and what follows from a run's size, are filled in.
      The decay is the last `optimizer.schedule.decay_share` of each branch.
    attempts: a run that has failed as often is left out, and named as missing.
    processes: runs worked on at a time, each by a process that keeps to one core; 1: one after the other, on all cores.
    draws: of losses with the noise of seeds, for the intervals. seed: of these.
    folder: where text and runs are; None: the workdir. only: a trunk's name: its runs are carried out, and nothing is fitted.
    recorded: a runs.jsonl of this sweep from elsewhere; what is done by it is not done here, but for pieces of a trunk of which
      other runs are not done.
    render: jobs are written, one for each trunk, and no run is carried out; the text is, which all of them read.
    """

    trunks: tuple[TrunkConfig, ...]
    budgets: tuple[float, ...] = ()
    source: KnownEntropyConfig = KnownEntropyConfig()
    train_tokens: int
    held_out_tokens: int
    pretrain: pretrain.Config
    rules: RulesConfig = RulesConfig()
    attempts: int = 2
    processes: int = 2
    draws: int = 200
    seed: int = 0
    folder: str | None = None
    only: str | None = None
    recorded: str | None = None
    render: bool = False

    def __post_init__(self):
        for name in ("train_tokens", "held_out_tokens", "attempts", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.draws < 2:
            raise ValueError(f"draws must be at least 2, got {self.draws}")
        if self.pretrain.init_from is not None or self.pretrain.model is None:
            raise ValueError("pretrain.model must be given, and no pretrain.init_from: every size starts from random parameters")
        names = [trunk.name for trunk in self.trunks]
        if self.only is not None and self.only not in names:
            raise ValueError(f"only: no trunk is called {self.only!r}. {nearest(self.only, names)}")


def main(config: Config, workdir: epath.Path) -> None:
    """Carries out what is not done, fits, and writes scaling_sweep.md, scaling_sweep.png, points.jsonl and results.json.

    Raises:
      ConfigError: the runs see more text than there is, the folder holds another sweep, or there are several machines.
    """
    begin = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError("each trunk of a sweep is for one machine; run it as one process, of a slice with one host")
    folder = workdir if config.folder is None else epath.Path(config.folder)
    runs = runs_of(config.trunks, config.budgets, config.pretrain, config.rules)
    _check_text(runs, config.train_tokens)
    counts = {"train": config.train_tokens, "held_out": config.held_out_tokens}
    known = prepare_text(folder, config.source, counts, config.pretrain.loader.seq_len)
    if config.render:
        trunks = [trunk.name for trunk in config.trunks]
        typed = jobs.write_jobs(trunks, os.fspath(folder), workdir)
        print("Nothing runs yet. In the repository, type", *(f"  {what}    # {for_what}" for for_what, what in typed), sep="\n")
        write_results(workdir, {"jobs": len(trunks), "runs": len(runs)}, config)
        return
    chosen = [run for run in runs if config.only in (None, run.trunk.name)]
    with mistakes_in("recorded"):
        recorded = {} if config.recorded is None else read_recorded(epath.Path(config.recorded), runs)
    found = carry_out(chosen, folder, workdir, config.attempts, config.processes, recorded)
    figures = _summary(chosen, found)
    if config.only is None:
        figures |= _fitted(config, runs, found, known, workdir)
    write_results(workdir, figures | {"seconds": time.monotonic() - begin}, config)


def _check_text(runs: list[Run], tokens: int) -> None:
    """Raises ConfigError if a run would come to the end of the text: documents are packed nearly without a gap."""
    longest = max(runs, key=lambda run: run.tokens)
    if longest.tokens > tokens:
        raise ConfigError(
            f"--config.train_tokens={tokens}: {longest.name} sees {longest.tokens}, and no token shall come twice; raise it"
        )


def _summary(runs: list[Run], found: dict[str, Status]) -> dict[str, Any]:
    """How many runs there are of each state, what failed, and what branches save."""
    states = [status.state for status in found.values()]
    ends = [run for run in runs if run.multiplier is not None and not run.apart]
    shared = [run for run in runs if not run.apart]
    work = lambda runs, tokens: sum(tokens(run) * run.counts.flops_per_token for run in runs)
    own, whole = (lambda run: run.own_tokens), (lambda run: run.tokens)
    return {
        "runs": len(runs), "runs_done": states.count("done"), "points_wanted": len(ends),
        "points": sum(found[run.name].state == "done" for run in ends),
        "missing": [
            {"name": name, "state": status.state, "attempts": len(status.attempts)}
            for name, status in found.items() if status.state != "done"
        ],
        "failed_attempts": sum(len(status.attempts) for status in found.values()),
        "tokens_trained": sum(map(own, shared)), "tokens_of_separate_runs": sum(map(whole, ends)),
        "flops_trained": work(shared, own), "flops_of_separate_runs": work(ends, whole),
        "saving_factor": work(ends, whole) / work(shared, own),
        "run_seconds": sum(status.seconds or 0.0 for status in found.values()),
    }  # fmt: skip


def _fitted(config: Config, runs: list[Run], found: dict[str, Status], known: Known, workdir: epath.Path) -> dict[str, Any]:
    points = points_of(runs, found, known.log_loss)
    write_points(points, workdir)
    noise = fits.noise_of(points)
    figures = {
        "entropy": known.entropy, "entropy_error": known.entropy_error, "log_loss_of_source": known.log_loss,
        "noise": None if noise is None else noise._asdict(),
        "laws": fits.fit_laws(points, noise, known, config.draws, config.seed),
        "optima": fits.optima(points, config.budgets),
        **fits.compared(points, noise),
        "ends": [point for point in points if point["multiplier"] is not None],
    }  # fmt: skip
    figures |= _summary(runs, found)
    text = tables.markdown(figures)
    (workdir / "scaling_sweep.md").write_text(text)
    plot(points, figures, workdir / "scaling_sweep.png")
    print(text)
    return figures
