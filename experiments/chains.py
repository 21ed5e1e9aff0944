"""Stages that an experiment runs one after the other, each in a workdir of its own, as `run.py` would."""

import json
import time
import types
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from experiments.results import FILE, read_results, write_json
from lfm_jax.configuration import to_mapping

_CLOCK = "seconds.json"


def run_stage(stage: types.ModuleType, config: Any, workdir: epath.Path) -> dict[str, Any]:
    """The figures of a stage, whose `main` is run unless they are there: an experiment that was stopped goes on in that stage."""
    if not (workdir / FILE).exists():
        begin, first = time.monotonic(), jax.process_index() == 0
        workdir.mkdir(parents=True, exist_ok=True)
        if first:
            write_json(workdir / "config.json", {"experiment": stage.__name__.removeprefix("experiments."), **to_mapping(config)})
        stage.main(config, workdir)
        if first:
            write_json(workdir / _CLOCK, {"seconds": time.monotonic() - begin})
        print(f"{workdir.parent.name}/{workdir.name}: {time.monotonic() - begin:.0f} seconds", flush=True)
    if jax.process_count() > 1:  # also where this one came so late that the first had ended the stage
        multihost_utils.sync_global_devices(f"stage {workdir.name}")
    return read_results(workdir)


def seconds_of(workdir: epath.Path) -> float | None:
    """Of the run of a stage that came to its end; None where it was killed between its figures and the note of these."""
    path = workdir / _CLOCK
    return json.loads(path.read_text())["seconds"] if path.exists() else None
