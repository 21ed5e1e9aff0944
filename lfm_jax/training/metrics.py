"""Where a run's numbers go: metrics.jsonl, which is the record, and the trackers, which may fail without harm."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lfm_jax.training.trackers import Pace, TensorBoard, Tracker, open_tracker

FILE = "metrics.jsonl"
_OF_THE_MACHINE = ("time", "train/tokens_per_second", "train/model_flops_utilization")
_GROUPS_OF_THE_MACHINE = ("goodput/", "hosts/", "memory/")


class MetricsError(RuntimeError):
    """A record could not be written."""


class MetricsWarning(UserWarning):
    """A record is damaged."""


class TrackerWarning(UserWarning):
    """A tracker has failed, and gets no more figures."""


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The records of `metrics.jsonl`, oldest first; half a line, which a killed process may leave at the end, is no record.

    A line that is damaged otherwise is told of in a `MetricsWarning`, and left out.
    """
    path = epath.Path(workdir) / FILE
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records += [record] * (line.endswith("\n") and isinstance(record["step"], int))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                warnings.warn(f"{path}:{number} is damaged and left out", MetricsWarning, stacklevel=2)
    return records


def is_of_the_machine(name: str) -> bool:
    """Whether a figure is one of time or memory, which two runs that are otherwise the same do not share."""
    return name in _OF_THE_MACHINE or name.startswith(_GROUPS_OF_THE_MACHINE)


class MetricsWriter:
    """Appends records to `metrics.jsonl` in the workdir, and gives them to TensorBoard and to other trackers.

    A record is {"step": ..., "time": seconds since 1970, NAME: value, ...}; names are like "train/loss" and "eval/bits_per_byte".
    On a local disk a killed process loses none, and a machine without power those since `sync`. In a bucket, where gcsfs takes
    appending for writing anew and keeps nothing of a file before it is closed, the file is written whole, at `sync`, every half
    minute or, when that takes long, less often.
    """

    def __init__(
        self, workdir: epath.PathLike, step: int, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ):
        """Goes on after `step`: what an earlier process has written of later steps is dropped, since they come again.

        Args:
          trackers: names of those besides TensorBoard (`lfm_jax.training.trackers`). config: the settings that they show.

        Raises:
          MetricsError: the file cannot be written.
        """
        workdir = epath.Path(workdir)
        kept = "".join(json.dumps(record) + "\n" for record in read_metrics(workdir) if record["step"] <= step)
        self._path = workdir / FILE
        with _told(self._path, f"the record up to step {step}"):
            self._record = (_Bucket if "://" in os.fspath(workdir) else _Disk)(self._path, kept)
        self._trackers: dict[str, Tracker] = {}
        self._open("TensorBoard", lambda: TensorBoard(workdir, step))
        for name in trackers:
            self._open(name, lambda name=name: open_tracker(name, workdir, config or {}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one record.

        Raises:
          MetricsError: it cannot be written; those before it are as they were.
        """
        now = time.time()
        line = json.dumps({"step": step, "time": round(now, 3), **values}) + "\n"
        with _told(self._path, f"the record of step {step}"):
            self._record.write(line)
        for name in list(self._trackers):
            with self._dropped(name):
                self._trackers[name].write(step, values, now)

    def sync(self) -> None:
        """Until all that was written is safe: before a checkpoint, behind which nothing comes again.

        Raises:
          MetricsError: it cannot be written.
        """
        with _told(self._path, "its end"):
            self._record.sync()

    def close(self) -> None:
        """Writes what is not written yet, and closes all.

        Raises:
          MetricsError: the record cannot be written.
        """
        for name in list(self._trackers):
            with self._dropped(name):
                self._trackers.pop(name).close()
        with _told(self._path, "its end"):
            self._record.close()

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        with self._dropped(name):
            self._trackers[name] = make()

    @contextlib.contextmanager
    def _dropped(self, name: str) -> Iterator[None]:
        """Around all that a tracker does."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            warnings.warn(
                f"{name} has failed ({type(error).__name__}: {error}) and gets no more figures; {FILE} has them all",
                TrackerWarning,
                stacklevel=4,
            )


class _Disk:
    """Appends at once, all of a line or nothing of it."""

    def __init__(self, path: epath.Path, kept: str):
        part = path.parent / f".{FILE}"
        part.write_text(kept)
        part.replace(path)
        self._file = open(path, "ab", buffering=0)
        self._end = len(kept.encode())

    def write(self, line: str) -> None:
        data = line.encode()
        try:
            written = 0
            while written < len(data):  # a disk that is full takes a part
                written += self._file.write(data[written:])
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(data)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Bucket:
    """Sends the whole, now and then."""

    def __init__(self, path: epath.Path, kept: str):
        self._path, self._lines, self._pace = path, [kept], Pace()
        self._path.write_text(kept)

    def write(self, line: str) -> None:
        self._lines.append(line)
        if self._pace.due():
            self.sync()

    def sync(self) -> None:
        with self._pace:
            self._path.write_text("".join(self._lines))

    def close(self) -> None:
        self._path.write_text("".join(self._lines))


@contextlib.contextmanager
def _told(path: epath.Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a bucket's library has errors of its own
        raise MetricsError(
            f"{path}: {what} cannot be written ({error}). What was written before is whole; make room, or give the "
            "permission, and the same command resumes the run."
        ) from error
