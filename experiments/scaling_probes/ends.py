"""The ends of a sweep's branches: which there are, what they were trained with, and which are missing."""

import json
import os
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.sources.known_entropy import KnownEntropyConfig
from experiments import pretrain
from experiments.json_lines import read_lines
from experiments.results import FILE
from experiments.scaling_sweep.runs import MANIFEST_FILE, RUNS
from experiments.scaling_sweep.text import FOLDER as TEXT
from lfm_jax.configuration import ConfigError, from_mapping

# Of a run's line in the manifest, what a figure about it is sorted and fitted by.
_ABOUT = ("name", "params", "tokens", "multiplier", "budget", "fitted", "held_out")


class Sweep(NamedTuple):
    """folder: of text and runs. budgets: FLOPs of its IsoFLOP columns. ends: of each what it is. missing: name and state."""

    folder: epath.Path
    source: KnownEntropyConfig
    budgets: tuple[float, ...]
    ends: list[dict[str, Any]]
    missing: list[dict[str, str]]

    @property
    def text(self) -> epath.Path:
        """The stage with the text."""
        return self.folder / TEXT

    def place(self, name: str) -> epath.Path:
        """The stage of a run."""
        return self.folder / RUNS / name

    def settings(self, name: str) -> pretrain.Config:
        """What a run was trained with."""
        values = json.loads((self.place(name) / "config.json").read_text())
        values.pop("experiment")
        return from_mapping(pretrain.Config, values)


def read_sweep(path: str) -> Sweep:
    """Reads a sweep's workdir, of which runs may be missing yet.

    Its ends are those of hybrids at the rule's learning rate, of all seeds; repeated runs, other rates and attention-only models
    are left out, which no law is about.

    Raises:
      ConfigError: the folder is no sweep's workdir, or none of its branches is done.
    """
    workdir = epath.Path(path)
    if not (workdir / MANIFEST_FILE).exists() or not (workdir / "config.json").exists():
        raise ConfigError(f"--config.sweep={path}: expected the workdir of configs/scaling_sweep.py, with {MANIFEST_FILE}")
    record = json.loads((workdir / "config.json").read_text())
    folder = workdir if record["folder"] is None else epath.Path(record["folder"])
    ends, missing = [], []
    for run in read_lines(workdir / MANIFEST_FILE):
        if run["multiplier"] is None or run["apart"] or run["rate"] != 1 or run["architecture"] != "hybrid":
            continue
        if (folder / RUNS / run["name"] / FILE).exists():
            trunk = run["name"].partition("/")[0]
            loss = json.loads((folder / RUNS / run["name"] / FILE).read_text())["nll_per_token"]
            ends.append({name: run[name] for name in _ABOUT} | {"trunk": trunk, "loss_in_sweep": loss})
        else:
            missing.append({"name": run["name"], "state": run["status"]})
    if not ends:
        raise ConfigError(f"{os.fspath(workdir)}: none of the sweep's {len(missing)} ends is done; the sweep's command goes on")
    source = from_mapping(KnownEntropyConfig, record["source"])
    return Sweep(folder, source, tuple(record["budgets"]), ends, missing)
