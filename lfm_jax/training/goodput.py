"""Where a run's time went: every second of it, over all its restarts, has one kind.

`goodput.jsonl` in the workdir has a line for each process that was the first of the run's:

    {"began": seconds since 1970, "start": step it went on after, "finished": false, "seconds": {KIND: seconds, ...},
     "steps": [[first, last, seconds], ...]}

It is written anew, whole and under another name first, every 30 seconds and at the end: object stores know no appending, and a
process that is killed leaves no half of it. What it did since counts as `down`, as does the time to the start of the next one.
Within a process time is taken from the monotonic clock; between two, the wall clock decides, and where it says less than nothing,
nothing is counted. What the kinds are after: ml-goodput-measurement, which needs a cloud account.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import jax
from etils import epath

from lfm_jax.configuration import nearest

FILE = "goodput.jsonl"
# What a process spends its time on, in the order of a table.
SPENT = ("step", "start", "preparation", "compile", "data_wait", "evaluation", "save", "restore", "recovery", "other")
# What becomes of it: steps whose update was skipped or rolled back; steps that a later process did again; and nothing ran.
LOST = ("skipped", "wasted", "down")
KINDS = SPENT + LOST
_WRITE_SECONDS = 30.0
# jax says of each compilation how long tracing, lowering and the compiler took.
_COMPILE_EVENTS = "/jax/core/compile/"


class GoodputWarning(UserWarning):
    """The ledger could not be written; training goes on without it."""


@dataclasses.dataclass
class Span:
    """A stretch of time. Its kind can be changed until it ends: what a wait was, one knows afterwards."""

    kind: str


@dataclasses.dataclass(frozen=True)
class _Process:
    """A line of the file. steps: (first, last, seconds) of steps in a row, from save to save; seconds: of all other kinds."""

    began: float
    start: int | None
    finished: bool
    seconds: dict[str, float]
    steps: list[tuple[int, int, float]]

    @property
    def ended(self) -> float:
        return self.began + math.fsum(self.seconds.values()) + math.fsum(seconds for _, _, seconds in self.steps)


class Ledger:
    """Keeps the account of one process, and knows those of the processes before it; a context manager.

    Time is of the innermost `kind` that is open, of kind "other" where none is, and of kind "compile" while JAX compiles. It is
    for one thread, the one that makes it. An end without an error finishes the run: what comes after is no time of the run.
    """

    last_closed: ClassVar[float | None] = None  # of this process, by its monotonic clock

    def __init__(self, workdir: epath.PathLike, *, writes: bool = True, age: float = 0.0):
        """Goes on with the ledger in `workdir`, an existing folder.

        Args:
          writes: whether the file is written; of several processes, one has to.
          age: seconds of this process before (see `uncounted_seconds`); they are of the kind "start".
        """
        self._path = epath.Path(workdir) / FILE
        self._earlier = _read(self._path)
        now = time.time()
        if self._earlier:  # no second counts twice
            age = min(age, max(0.0, now - self._earlier[-1].ended))
        self._began, self._start, self._finished = now - age, None, False
        self._seconds = dict.fromkeys(SPENT + LOST, 0.0) | {"start": age}
        # Seconds of the step that runs; steps since the last save, one by one; steps before it, from save to save.
        self._running, self._recent, self._saved = 0.0, [], []
        self._stack = [Span("other")]
        self._last = time.monotonic()
        self._lock, self._thread = threading.RLock(), threading.get_ident()
        self._writing, self._warned, self._closed = threading.Lock(), False, threading.Event()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        if writes:
            self.write()
            threading.Thread(target=self._write_now_and_then, name="goodput", daemon=True).start()
        self._writes = writes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finished = error is None
        self.close()

    @contextlib.contextmanager
    def kind(self, kind: str) -> Iterator[Span]:
        """What happens meanwhile is `kind`, except for what is of another within.

        Raises:
          ValueError: it is none that a process spends time on.
        """
        if kind not in SPENT:
            raise ValueError(f"{kind!r} is no kind of time that is spent. {nearest(kind, SPENT)}")
        span = Span(kind)
        with self._lock:
            self._advance()
            if kind == "save":
                self._saved, self._recent = self._folded(), []
            self._stack.append(span)
        try:
            yield span
        finally:
            with self._lock:
                self._advance()
                self._stack.remove(span)

    def begin(self, step: int) -> None:
        """The steps after `step` are done now, for the first time or again."""
        self._start = step

    def step(self, step: int) -> None:
        """Step `step` is over: the time of kind "step" since the one before was its."""
        with self._lock:
            self._advance()
            self._recent.append((step, step, self._running))
            self._running = 0.0

    def skip(self, step: int) -> None:
        """Of step `step` nothing has remained: its time is "skipped"."""
        with self._lock:
            self._seconds["skipped"] += self._take(step, step)

    def roll_back(self, step: int) -> None:
        """The state is that after `step` again: later steps' time is "skipped", and "wasted" where another process did them."""
        with self._lock:
            self._advance()
            self._seconds["skipped"] += self._take(step + 1, math.inf) + self._running
            self._running = 0.0
            self._start = step if self._start is None else min(self._start, step)

    def seconds(self) -> dict[str, float]:
        """Seconds of every kind until now, those of earlier processes among them."""
        return _total([*self._earlier, self._as_it_stands()])

    def write(self) -> None:
        """Writes the file; what goes wrong is told once, and is no reason to stop training."""
        lines = [json.dumps(_plain(process)) + "\n" for process in (*self._earlier, self._as_it_stands())]
        part = self._path.parent / f".{FILE}"
        try:
            with self._writing:
                part.write_text("".join(lines))
                part.replace(self._path)
        except Exception as error:  # a bucket's library has errors of its own
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self._path} cannot be written: {error}. Training goes on.", GoodputWarning, stacklevel=2)

    def close(self) -> None:
        """Writes the file for the last time."""
        if not self._closed.is_set():
            self._closed.set()
            Ledger.last_closed = time.monotonic()
            jax.monitoring.unregister_event_duration_listener(self._heard)
            if self._writes:
                self.write()

    def _write_now_and_then(self) -> None:
        while not self._closed.wait(_WRITE_SECONDS):
            self.write()

    def _advance(self, compiled: float = 0.0) -> None:
        """Books the time since the last call, of which the end was spent compiling."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        compiled = min(compiled, elapsed)  # an inner function's is within the outer one's
        self._seconds["compile"] += compiled
        self._book(self._stack[-1].kind, elapsed - compiled)

    def _book(self, kind: str, seconds: float) -> None:
        if kind == "step":
            self._running += seconds
        else:
            self._seconds[kind] += seconds

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith(_COMPILE_EVENTS) and threading.get_ident() == self._thread:
            with self._lock:
                self._advance(compiled=seconds)

    def _take(self, first: int, last: float) -> float:
        """Takes the time of some steps out of the account; of steps that are known together only, each has the same."""
        taken = []

        def rest(steps: tuple[int, int, float]) -> tuple[int, int, float]:
            begin, end, seconds = steps
            taken.append(seconds * _overlap(steps, first, last))
            return begin, (min(end, first - 1) if last >= end else end), seconds - taken[-1]

        self._saved, self._recent = (
            [left for left in map(rest, steps) if left[0] <= left[1]] for steps in (self._saved, self._recent)
        )
        return math.fsum(taken)

    def _folded(self) -> list[tuple[int, int, float]]:
        if not self._recent:
            return list(self._saved)
        return [*self._saved, (self._recent[0][0], self._recent[-1][1], math.fsum(step[2] for step in self._recent))]

    def _as_it_stands(self) -> _Process:
        """With the time that is not booked yet, for its kind may change still."""
        with self._lock:
            kind, elapsed = self._stack[-1].kind, time.monotonic() - self._last
            seconds, running = dict(self._seconds), self._running
            if kind == "step":
                running += elapsed
            else:
                seconds[kind] += elapsed
            steps = self._folded()
            if running:
                step = steps[-1][1] + 1 if steps else (self._start or 0) + 1
                steps.append((step, step, running))
            return _Process(self._began, self._start, self._finished, seconds, steps)


def read_seconds(workdir: epath.PathLike) -> dict[str, float]:
    """Seconds of every kind, of the run in `workdir`; all 0 where there is no ledger. Damaged lines of it count as down."""
    return _total(_read(epath.Path(workdir) / FILE))


def table(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of kind, seconds and share, in the order of `KINDS`; the shares add up to 1."""
    whole = math.fsum(seconds.values()) or 1.0
    return [{"kind": kind, "seconds": seconds[kind], "share": seconds[kind] / whole} for kind in KINDS]


def summary(seconds: dict[str, float]) -> str:
    """A line of the shares, the largest first."""
    rows = sorted(table(seconds), key=lambda row: -row["share"])
    shares = ", ".join(f"{row['kind']} {row['share']:.1%}" for row in rows if row["share"] >= 0.0005)
    return f"of {math.fsum(seconds.values()):,.0f} seconds, all starts of the run together: {shares}"


def uncounted_seconds() -> float:
    """Of this process, in no ledger: since its last one was closed, or since it began.

    The latter is 0 where the system does not say; Linux does, to a hundredth of a second.
    """
    if Ledger.last_closed is not None:
        return time.monotonic() - Ledger.last_closed
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5), starttime
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _overlap(steps: tuple[int, int, float], first: int, last: float) -> float:
    """The share of the steps that is in first to last."""
    begin, end, _ = steps
    return max(0.0, min(end, last) - max(begin, first) + 1) / (end - begin + 1)


def _total(processes: list[_Process]) -> dict[str, float]:
    total = dict.fromkeys(KINDS, 0.0)
    again = math.inf  # the first of the steps, less one, that a later process did again
    for process in reversed(processes):
        for kind, seconds in process.seconds.items():
            total[kind] += seconds
        for steps in process.steps:
            wasted = steps[2] * _overlap(steps, again + 1, math.inf)
            total["wasted"] += wasted
            total["step"] += steps[2] - wasted
        again = min(again, math.inf if process.start is None else process.start)
    for before, after in zip(processes, processes[1:], strict=False):
        if not before.finished:
            total["down"] += max(0.0, after.began - before.ended)
    return total


def _plain(process: _Process) -> dict[str, Any]:
    """A line's content, in milliseconds; kinds without time are left out."""
    seconds = {kind: round(value, 3) for kind, value in process.seconds.items() if value}
    steps = [(first, last, round(value, 3)) for first, last, value in process.steps]
    return {**dataclasses.asdict(process), "began": round(process.began, 3), "seconds": seconds, "steps": steps}


def _read(path: epath.Path) -> list[_Process]:
    """The processes so far, oldest first; a line that is damaged is none."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            process = _Process(**json.loads(line))
            if process.seconds.keys() <= set(KINDS) and math.isfinite(process.ended):
                found.append(process)
        except (ValueError, TypeError, AttributeError):
            continue
    return found
