"""Other places for a run's numbers: TensorBoard's event files always, Weights & Biases and trackio where they are asked for."""

import importlib.util
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from etils import epath

from lfm_jax.configuration import nearest

PROJECT = "lfm_jax"
RUN_ID = "run_id"


class Tracker(Protocol):
    """A place that figures go to. Whatever it raises is told once, and it gets no more of them; training goes on."""

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Figures of a step; now: seconds since 1970. Steps that a resumed run does again come again."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuses what `open_tracker` could not open, before hours of work.

    Raises:
      ValueError: a name is unknown or there twice, or its package is not installed.
    """
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"{name!r} is no tracker. {nearest(name, _TRACKERS)}")
        if list(names).count(name) > 1:
            raise ValueError(f"the tracker {name!r} is named twice; name it once")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the tracker {name!r} needs the package of that name: pip install -e '.[trackers]' installs it")


def open_tracker(name: str, workdir: epath.PathLike, config: Mapping[str, Any]) -> Tracker:
    """Opens one of `check_trackers`; it goes on with the run that it was opened for in this workdir before.

    Args:
      config: what it shall say of the run's settings.

    Raises:
      ValueError: Weights & Biases would keep its files on a disk that nobody has asked it to.
      Exception: whatever the tracker's library finds wrong.
    """
    return _TRACKERS[name](epath.Path(workdir), config)


class Pace:
    """When something slow may be done again: at most every half minute, and in at most a hundredth of the time.

    A context manager around doing it.
    """

    def __init__(self):
        self._due = 0.0

    def due(self) -> bool:
        """Whether it may."""
        return time.monotonic() >= self._due

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        now = time.monotonic()
        self._due = now + max(30.0, 99 * (now - self._began))


class TensorBoard:
    """Event files in `tensorboard/` of the workdir.

    They are written by the thread that calls: tensorboardX's own writer has a thread and a queue of ten, and when a full disk has
    ended the thread, whoever adds an eleventh event waits forever.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        """Goes on after `step`: TensorBoard is told to forget what it has of later ones."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder = epath.Path(workdir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # The suffix: its files have names by the second, and a run may be resumed within one.
        self._writer = EventsWriter(os.fspath(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        self._pace = Pace()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        """Writes an event; those since the file was last flushed, half a minute or more, may be lost with the process."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.write_event(self._event(step=step, wall_time=now, summary=self._summary(value=scalars)))
        if self._pace.due():
            with self._pace:  # it waits for the disk, or sends the whole file to a bucket
                self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class _WeightsAndBiases:
    """https://docs.wandb.ai. Without the network, unless WANDB_MODE asks for it: `wandb sync` uploads wandb/ in the workdir."""

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        mode = os.environ.get("WANDB_MODE", "offline")
        remote = "://" in os.fspath(workdir)
        if remote and mode == "offline":
            raise ValueError(f"wandb keeps what it has not sent on the local disk, and {workdir} is none; set WANDB_MODE=online")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=_run_id(workdir), resume="allow", name=workdir.name,
            dir=None if remote else os.fspath(workdir), mode=mode, config=dict(config),
        )  # fmt: skip
        # Its own count of steps only rises, and a resumed run does some again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """https://huggingface.co/docs/trackio. It keeps runs in a database on the local disk, which `trackio show` shows."""

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]):
        import trackio

        name = f"{workdir.name}-{_run_id(workdir)}"
        # The machine's load is not asked for, and the page that shows runs is none to start from here.
        self._run = trackio.init(
            project=PROJECT, name=name, config=dict(config), resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def write(self, step: int, values: Mapping[str, float], now: float) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS = {"wandb": _WeightsAndBiases, "trackio": _Trackio}


def _run_id(workdir: epath.Path) -> str:
    """What the run in the workdir is called by the trackers, from the first time on."""
    path = workdir / RUN_ID
    known = path.read_text().strip() if path.exists() else ""
    if not re.fullmatch(r"[0-9a-f]{8}", known):
        known = uuid.uuid4().hex[:8]
        path.write_text(known + "\n")
    return known
