"""Traces of JAX's profiler while a run goes on: of steps that the configuration names, or from now on, when somebody asks."""

import contextlib
import dataclasses
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from etils import epath

REQUEST = "profile_request"
FOLDER = "profile"
# Looking for the file takes some 50 ms in a bucket.
_LOOK_SECONDS = 15.0


class ProfileWarning(UserWarning):
    """The profiler has failed; training goes on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """first: the first step of a trace that is made without being asked for; None: there is none. steps: how many a trace has."""

    first: int | None = None
    steps: int = 3

    def __post_init__(self):
        for name in ("first", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Profiler:
    """Traces steps of a loop into `profile/step_NUMBER/` of the workdir, in the form that xprof reads.

    Besides those of the configuration, the next steps are traced when SIGUSR1 comes, or when the file `profile_request` in the
    workdir is written or touched, which is looked at every 15 seconds and never removed: every process of a run sees it, and
    traces its own devices. Whatever goes wrong is told, and the loop goes on. A context manager, for one loop at a time; where it
    is not in the main thread, which alone gets signals, the file remains.
    """

    def __init__(self, config: ProfileConfig, workdir: epath.PathLike, say: Callable[[str], None] = print):
        """say: gets a line for each trace."""
        self._config, self._say = config, say
        self._workdir = epath.Path(workdir)
        self._asked, self._last, self._seen = False, None, None
        self._annotation: contextlib.AbstractContextManager = contextlib.nullcontext()
        self._before: Any = None

    def __enter__(self) -> Self:
        self._seen, self._looked = self._request(), time.monotonic()
        with contextlib.suppress(ValueError):  # not the main thread
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
        if self._last is not None:
            self._stop()

    def before(self, step: int) -> None:
        """Step `step` is about to be handed to the device."""
        if self._last is None and (step == self._config.first or self._is_asked()):
            self._start(step)
        if self._last is not None:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def after(self, step: int, results: Any) -> None:
        """Step `step` has been handed over; `results`, arrays that it computes, are waited for where it is a trace's last."""
        if self._last is None:
            return
        self._annotation.__exit__(None, None, None)
        if step >= self._last:
            jax.block_until_ready(results)
            self._stop()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _is_asked(self) -> bool:
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked, before = now, self._seen
            self._seen = self._request()
            self._asked |= self._seen not in (None, before)
        asked, self._asked = self._asked, False
        return asked

    def _request(self) -> float | None:
        """When the file was last written, None where there is none."""
        try:
            path = self._workdir / REQUEST
            return path.stat().mtime if path.exists() else None
        except Exception:  # a bucket that does not answer asks for nothing new
            return self._seen

    def _start(self, step: int) -> None:
        with _told("start"):
            # A folder on the local disk takes it first: JAX may not know the workdir's file system, and makes no trace any more
            # after one that it could not write.
            self._made = tempfile.mkdtemp(prefix="profile_")
            jax.profiler.start_trace(self._made)
            self._first, self._last = step, step + self._config.steps - 1

    def _stop(self) -> None:
        self._last = None
        folder = self._workdir / FOLDER / f"step_{self._first:08}"
        with _told("end"):
            jax.profiler.stop_trace()
            for file in filter(Path.is_file, Path(self._made).rglob("*")):
                target = folder / file.relative_to(self._made)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            shutil.rmtree(self._made)
            self._say(f"a trace from step {self._first} on is in {folder}; xprof shows it")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the profiler's are of no common kind
        warnings.warn(f"the profiler did not {what} ({error}); training goes on", ProfileWarning, stacklevel=5)
