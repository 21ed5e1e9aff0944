"""Whether the files of runs are as they were written."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipelines import read_token_shards
from experiments.prepared_data import TOKENS
from experiments.results import write_results
from experiments.stages import CHECKPOINTS
from lfm_jax.configuration import ConfigError
from lfm_jax.interop.export_manifest import MANIFEST, check_manifest
from lfm_jax.training import Checkpoints, read_metrics
from lfm_jax.training.metrics import MetricsWarning

EXPORTS = ("export/hf", "export", "export/gguf")
_WHOLE = "whole"
_UNFINISHED = "not finished, and not used"


class Damaged(SystemExit):
    """Something is not as it was written; the exit code says so to whoever runs this now and then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """runs: workdirs to look through."""

    runs: tuple[str, ...]

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give runs, the workdirs to look through: --config.runs=WORKDIR,WORKDIR")


def main(config: Config, workdir: epath.Path) -> None:
    """Reads everything, and ends with code 1 if something is damaged.

    Raises:
      ConfigError: one of the runs is no folder.
      Damaged: something is.
    """
    rows = [{"run": run, "what": what, "state": state} for run in config.runs for what, state in _look(epath.Path(run))]
    table = Table("run", "what", "state")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    Console().print(table)
    damaged = sum(row["state"] not in (_WHOLE, _UNFINISHED) for row in rows)
    write_results(workdir, {"looked_at": len(rows), "damaged": damaged, "parts": rows}, config)
    if damaged:
        raise Damaged(1)


def _look(run: epath.Path) -> list[tuple[str, str]]:
    """(what, "whole" or what is wrong with it), of all there is in a run's folder."""
    if not run.is_dir():
        raise ConfigError(f"runs: {run} is no folder; name workdirs of runs.")
    checkpoints = Checkpoints(run / CHECKPOINTS)
    found = []
    for step in checkpoints.steps():
        problem = checkpoints.verify(step)
        if problem is None:
            checkpoints.mark_verified(step)
        found.append((f"checkpoint of step {step}", problem or _WHOLE))
    found += [(f"checkpoint of step {step}", _UNFINISHED) for step in checkpoints.unfinished()]
    splits = sorted(folder.name for folder in (run / TOKENS).iterdir()) if (run / TOKENS).exists() else []
    for split in splits:
        read = lambda split=split: read_token_shards(run / TOKENS / split, check_contents=True)
        found.append((f"tokens of {split}", _state(read)))
    for export in EXPORTS:
        if (run / export / MANIFEST).exists():
            found.append((export, _state(lambda export=export: check_manifest(run / export))))
    found.append(("metrics.jsonl", _state(lambda: read_metrics(run))))
    return found


def _state(read: Callable[[], Any]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MetricsWarning)
            read()
    except (OSError, ValueError, MetricsWarning) as error:
        return str(error)
    return _WHOLE
