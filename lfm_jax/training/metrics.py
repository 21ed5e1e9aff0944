"""Where a run's numbers go: metrics.jsonl, which is the record, and TensorBoard events beside it."""

import json
import time
from collections.abc import Mapping

from etils import epath

FILE = "metrics.jsonl"


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The records of `metrics.jsonl`, oldest first; half a line, which a killed process may leave at the end, is no record."""
    path = epath.Path(workdir) / FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


class MetricsWriter:
    """Appends records to `metrics.jsonl` and TensorBoard events in the workdir.

    A record is {"step": ..., "time": seconds since 1970, NAME: value, ...}; names are like "train/loss" and "eval/bits_per_byte".
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        """Goes on after `step`: what an earlier process has written of later steps is dropped, since they come again."""
        from tensorboardX import SummaryWriter

        workdir = epath.Path(workdir)
        kept = [json.dumps(record) + "\n" for record in read_metrics(workdir) if record["step"] <= step]
        part = workdir / f".{FILE}"
        part.write_text("".join(kept))
        part.replace(workdir / FILE)
        self._file = (workdir / FILE).open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record and hands it to the operating system, so that a killed process loses none."""
        now = time.time()
        self._file.write(json.dumps({"step": step, "time": round(now, 3), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step, walltime=now)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()
