"""The runs carried out: by several processes of one core each, or one after the other in this one; none that is done again.

A run is a stage in a folder of its own: results.json says that it is done, attempts.json what went wrong before. `runs.jsonl`,
the manifest, is made from these and has a line for each run, so that whatever was killed at whatever moment goes on where it was.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import jax
from etils import epath
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from data_pipelines.processes import end_with_parent
from experiments import pretrain
from experiments.chains import run_stage
from experiments.json_lines import read_lines, write_lines
from experiments.results import FILE, write_json
from experiments.scaling_sweep.grid import Run
from experiments.scaling_sweep.text import FOLDER as TEXT
from experiments.stages import CHECKPOINTS
from lfm_jax.configuration import ConfigError, flatten, to_mapping
from lfm_jax.host_memory import keep_freed_memory
from lfm_jax.training import Checkpoints
from lfm_jax.training.checkpoint_manifest import MANIFEST
from lfm_jax.training.stopping import EXIT_INTERRUPTED

RUNS, MANIFEST_FILE, POINTS_FILE, LOG = "runs", "runs.jsonl", "points.jsonl", "log.txt"
_ATTEMPTS = "attempts.json"
_PLACES = ("tokens_from",)  # settings that differ where the sweep's folder has been moved
_LOG_CHARACTERS = 2000


class Status(NamedTuple):
    """Of a run. state: "done", "failed" (as often as is allowed), "blocked" (what it starts from has failed), "running" or
    "waiting". attempts: those that failed, with the end of what each said. Of a run that is done, nll_per_token: on the held-out
    text; seconds: by all the processes that worked on it."""

    state: str
    attempts: list[dict[str, Any]]
    nll_per_token: float | None = None
    seconds: float | None = None


def run_one(run: Run, folder: epath.Path) -> dict[str, Any]:
    """Carries out a run in this process, from its parent's checkpoint or from where it was stopped; its figures.

    Raises:
      ConfigError: its folder holds a run with other settings.
    """
    place, config = folder / RUNS / run.name, _config_of(run, folder)
    _refuse_other(place, to_mapping(config))
    if run.parent is not None and not Checkpoints(place / CHECKPOINTS).steps():
        step = f"{run.start:08d}"
        _copy_checkpoint(folder / RUNS / run.parent / CHECKPOINTS / step, place / CHECKPOINTS / step)
    return run_stage(pretrain, config, place)


def _config_of(run: Run, folder: epath.Path) -> pretrain.Config:
    return dataclasses.replace(run.config, tokens_from=(os.fspath(folder / TEXT),))


def _refuse_other(place: epath.Path, wanted: dict[str, Any]) -> None:
    path = place / "config.json"
    if not path.exists():
        return
    found = {name: value for name, value in json.loads(path.read_text()).items() if name != "experiment"}
    if differences := _differences(found, wanted):
        raise ConfigError(
            f"{place} holds a run with other settings: {differences[0]} ({len(differences)} such); take another --workdir, or "
            "delete the run's folder and those of the runs that start from it"
        )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Of the settings of a run, but for places."""
    found, wanted = flatten(found), flatten(json.loads(json.dumps(wanted)))
    names = [name for name in {**found, **wanted} if name not in _PLACES and found.get(name) != wanted.get(name)]
    return [f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in names]


def _copy_checkpoint(source: epath.Path, target: epath.Path) -> None:
    """Its manifest last: without that it is none, so that half a copy is never taken for a checkpoint."""
    if not (source / MANIFEST).exists():
        raise ConfigError(f"{source} is no checkpoint, and a run is to start from it: was the folder of that run changed?")
    _copy(source, target)
    (source / MANIFEST).copy(target / MANIFEST, overwrite=True)


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        elif path.name != MANIFEST:
            path.copy(target / path.name, overwrite=True)


def read_recorded(path: epath.Path, runs: Iterable[Run]) -> dict[str, Status]:
    """The runs that are done by a manifest of this sweep, which was carried out elsewhere.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no manifest, or a run in it had other settings.
    """
    planned, found = {run.name: run for run in runs}, {}
    try:
        for line in read_lines(path):
            if line["status"] == "done" and (run := planned.get(line["name"])) is not None:
                if names := _differences(line["config"], to_mapping(run.config)):
                    raise ValueError(f"{path}: {run.name} had other settings: {names[0]} ({len(names)} such)")
                found[run.name] = Status("done", [], line["nll_per_token"], line["seconds"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no {MANIFEST_FILE} of a sweep: {error!r}") from error
    return found


def statuses(
    runs: Iterable[Run],
    folder: epath.Path,
    attempts: int,
    running: Iterable[str] = (),
    recorded: Mapping[str, Status] | None = None,
) -> dict[str, Status]:
    """What has become of each run, by name; parents come before the runs that start from them.

    attempts: a run that has failed as often is not tried again. running: names of those that are being carried out. recorded:
    what was done elsewhere.
    """
    found: dict[str, Status] = {}
    for run in runs:
        if recorded and run.name in recorded:
            found[run.name] = recorded[run.name]
            continue
        place = folder / RUNS / run.name
        failures = json.loads((place / _ATTEMPTS).read_text()) if (place / _ATTEMPTS).exists() else []
        parent = found.get(run.parent or "")
        if (place / FILE).exists():
            figures = json.loads((place / FILE).read_text())
            seconds = math.fsum(row["seconds"] for row in figures["goodput"] if row["kind"] != "down")
            found[run.name] = Status("done", failures, figures["nll_per_token"], seconds)
            continue
        state = "failed" if len(failures) >= attempts else "running" if run.name in running else "waiting"
        if parent is not None and parent.state in ("failed", "blocked"):
            state = "blocked"
        found[run.name] = Status(state, failures)
    return found


def carry_out(
    runs: Sequence[Run],
    folder: epath.Path,
    workdir: epath.Path,
    attempts: int,
    processes: int,
    recorded: Mapping[str, Status] | None = None,
) -> dict[str, Status]:
    """Carries out what is not done: cheap runs first, each after the one that it starts from; what has become of them.

    Args:
      folder: of text and runs. workdir: of the manifest.
      attempts: as often a run is tried that ends in an error, over all calls; a process that was told to stop has not failed.
      processes: worked on at a time, each by a process that keeps to one core; 1: one after the other in this process.
      recorded: what was done elsewhere; from a piece of it, whose checkpoint is not here, nothing can start.

    Raises:
      ConfigError: a run's folder holds one with other settings.
    """
    for run in runs:
        _refuse_other(folder / RUNS / run.name, to_mapping(_config_of(run, folder)))
    recorded = _not_needed_here(runs, folder, recorded or {})
    work = {run.name: run.own_tokens * run.counts.flops_per_token for run in runs}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn()
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("sweep", total=sum(work.values()))

        def report(running: Iterable[Run]) -> dict[str, Status]:
            names = [run.name for run in running]
            found = statuses(runs, folder, attempts, names, recorded)
            write_manifest(runs, found, workdir)
            done = [name for name, status in found.items() if status.state == "done"]
            text = f"{len(done)} of {len(runs)} runs; {', '.join(names)}"
            progress.update(task, completed=sum(work[name] for name in done), description=text)
            return found

        if processes > 1:
            say = lambda text: progress.console.print(Text(text), soft_wrap=True)
            return _in_processes(runs, folder, processes, report, say)
        for run in runs:
            while report([run])[run.name].state == "running":
                _try(run, folder)
                jax.clear_caches()  # of programs that no other run has
        return report([])


def _not_needed_here(runs: Sequence[Run], folder: epath.Path, recorded: Mapping[str, Status]) -> dict[str, Status]:
    """What was done elsewhere, less the pieces of trunks that a run that is not done, or such a piece itself, starts from."""
    kept = dict(recorded)
    is_here = lambda name: (folder / RUNS / name / FILE).exists()
    for run in reversed(runs):
        if run.parent in kept and run.name not in kept and not is_here(run.name) and not is_here(run.parent):
            del kept[run.parent]
    return kept


def _try(run: Run, folder: epath.Path) -> None:
    """Carries out a run in this process; an error is noted and shown, and is not the end of the others."""
    began = time.monotonic()
    try:
        run_one(run, folder)
    except ConfigError:
        raise
    except Exception as error:
        said = "".join(traceback.format_exception(error))
        print(f"{said}{run.name} failed; the others go on", file=sys.stderr, flush=True)
        _note_failure(folder / RUNS / run.name, 1, time.monotonic() - began, said)


def _in_processes(
    runs: Sequence[Run],
    folder: epath.Path,
    processes: int,
    report: Callable[[Iterable[Run]], dict[str, Status]],
    say: Callable[[str], None],
) -> dict[str, Status]:
    spawn, working = multiprocessing.get_context("spawn"), {}
    order = sorted(runs, key=lambda run: run.tokens * run.counts.flops_per_token)
    while True:
        while len(working) < processes:
            found = report([run for run, *_ in working.values()])
            run = next((run for run in order if _is_ready(run, found)), None)
            if run is None:
                break
            core = min(set(range(processes)) - {core for _, core, *_ in working.values()})
            process = spawn.Process(target=_work, args=(run, os.fspath(folder), core), name=run.name, daemon=True)
            process.start()
            working[process.sentinel] = run, core, process, time.monotonic()
        if not working:
            return found
        report([run for run, *_ in working.values()])
        for sentinel in connection.wait(list(working)):
            run, _, process, began = working.pop(sentinel)
            process.join()
            place, seconds = folder / RUNS / run.name, time.monotonic() - began
            if (place / FILE).exists():
                say(f"{run.name}: {seconds:.0f} seconds")
            elif process.exitcode != EXIT_INTERRUPTED:
                log = place / LOG
                said = log.read_bytes().decode(errors="replace") if log.exists() else ""
                _note_failure(place, process.exitcode, seconds, said)
                say(f"{run.name}: failed with exit code {process.exitcode} after {seconds:.0f} seconds; {log} says why")


def _is_ready(run: Run, found: dict[str, Status]) -> bool:
    return found[run.name].state == "waiting" and (run.parent is None or found[run.parent].state == "done")


def _note_failure(place: epath.Path, exit_code: int | None, seconds: float, said: str) -> None:
    path = place / _ATTEMPTS
    failures = json.loads(path.read_text()) if path.exists() else []
    place.mkdir(parents=True, exist_ok=True)
    write_json(path, [*failures, {"exit_code": exit_code, "seconds": seconds, "log_end": said[-_LOG_CHARACTERS:]}])


def _work(run: Run, folder: str, number: int) -> None:
    """Of a process of its own: one thread computes, on one core; compiled programs are common to all of them."""
    end_with_parent()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    keep_freed_memory()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_compilation_cache_dir", os.fspath(epath.Path(folder) / "programs"))
    place = epath.Path(folder) / RUNS / run.name
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOG).open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        run_one(run, epath.Path(folder))


def write_manifest(runs: Iterable[Run], found: dict[str, Status], workdir: epath.Path) -> None:
    """Writes runs.jsonl: of each run what it is, what it starts from, its settings, and what has become of it."""
    lines = []
    for run in runs:
        status = found[run.name]
        lines.append(
            about(run) | {
                "parent": run.parent, "first_step": run.start, "steps": run.steps, "own_tokens": run.own_tokens,
                "status": status.state, "failed_attempts": len(status.attempts),
                "error": status.attempts[-1]["log_end"] if status.attempts else None,
                "seconds": status.seconds, "nll_per_token": status.nll_per_token,
                "config": to_mapping(run.config),
            }
        )  # fmt: skip
    write_lines(workdir / MANIFEST_FILE, lines)


def about(run: Run) -> dict[str, Any]:
    """What a run is, in plain values: params are those outside of the embedding, flops are 6 N D with these."""
    trunk, counts = run.trunk, run.counts
    return {
        "name": run.name, "architecture": "attention" if trunk.attention_only else "hybrid", "embed_dim": trunk.embed_dim,
        "layers": trunk.layers, "seed": trunk.seed, "rate": trunk.rate, "multiplier": run.multiplier, "budget": run.budget,
        "apart": run.apart, "held_out": run.held_out, "fitted": run.fitted, "params": counts.params,
        "params_with_embedding": counts.params + counts.embedding, "tokens": run.tokens, "flops": run.flops,
        "flops_with_head_and_attention": counts.flops_per_token * run.tokens,
    }  # fmt: skip


def points_of(runs: Iterable[Run], found: dict[str, Status], floor: float) -> list[dict[str, Any]]:
    """A point for each run that is done, pieces of trunks included, as `lfm_jax.scaling.read_points` reads them.

    floor: the least loss on the held-out text, above which excess_loss is.
    """
    return [
        about(run) | {"loss": loss, "excess_loss": loss - floor}
        for run in runs
        if (loss := found[run.name].nll_per_token) is not None
    ]


def write_points(points: list[dict[str, Any]], workdir: epath.Path) -> None:
    """Writes points.jsonl: the ends of branches, which laws are about."""
    write_lines(workdir / POINTS_FILE, [point for point in points if point["multiplier"] is not None])
