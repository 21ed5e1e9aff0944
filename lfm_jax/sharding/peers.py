"""Whom a run waits for: every process says what it is doing, and one that is dead, frozen or stuck is named and the run ended.

jax notices dead and frozen processes, after 100 seconds and by number; one that is alive and does not come to a collective it
never notices. So each process has two threads here. *Beat* writes what the process is doing to the key-value store of process 0's
coordination service; process 0 reads them all and judges, the others read its verdict. *Guard* looks whether the beat is
answered: if not, it is the coordinator itself that is gone or frozen. Whoever learns of a verdict prints it with the stacks of
its threads and ends at once, by `os._exit`: an ordinary exit waits in jax for the others.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed as jax_distributed  # its client, whose key-value store has no public name

EXIT_PEER = 76  # a process was dead, frozen or stuck: the same command, again; with an error of one all leave with its code
# What a process does when it waits for the others, as far as this side can see.
WAITING = ("step", "save", "barrier")
_BEATS, _FIRST = "lfm_jax/beat/", "lfm_jax/first/"  # of each; what process 0 tells the others
# Words of errors that come of a process that is gone; libraries put them into errors of their own.
_OF_OTHERS = ("Gloo", "Barrier timed out", "UNAVAILABLE", "Connection closed by peer", "Socket closed", "coordination service")
_RAISED, _RUNNING, _LEFT = "raised", "running", "left"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Seconds after which a run is ended by one of its processes.

    silent: that nothing has been heard of it: it is dead or frozen.
    data, step, compile, evaluation, save, restore: that it stays in this phase; None: as long as it likes. Of those that wait for
      others the cause is sought in the others.
    """

    silent: float = 60.0
    data: float | None = 900.0
    step: float | None = 900.0
    compile: float | None = 3600.0
    evaluation: float | None = 7200.0
    save: float | None = 1800.0
    restore: float | None = 3600.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"{field.name} must be a positive number of seconds, got {value}")

    def limit(self, phase: str) -> float:
        """Of a phase, whatever its name: those that are no fields have no limit, and what is between them is a part of a step."""
        seconds = getattr(self, "step" if phase == "loop" else phase, None)
        return float("inf") if seconds is None else seconds


class _Activity(NamedTuple):
    phase: str
    step: int | None
    since: float


class _Heard(NamedTuple):
    """The last beat of a process, and when it came."""

    beat: dict[str, Any]
    at: float


_NO_BEAT = {
    "number": 0, "host": "an unknown host", "pid": None, "born": None, "phase": "preparation", "step": None, "seconds": 0.0,
    "state": _RUNNING, "error": "", "secondary": False, "code": EXIT_PEER, "data_seconds": 0.0,
}  # fmt: skip


class Watch:
    """What this process is doing, and the threads that tell it and watch the others; without others, only the limits.

    Args:
      client: of jax's coordination service; None for a process that is alone.
    """

    def __init__(self, config: WatchConfig, process: int = 0, count: int = 1, client: Any = None):
        self.config, self.process, self.count = config, process, count
        self._client = client
        self._activity = _Activity("preparation", None, time.monotonic())
        self._state, self._error, self._secondary, self._code = _RUNNING, "", False, EXIT_PEER
        self._number = 0
        self._answered = self._judged_at = time.monotonic()
        # Of process 0, who judges: all are expected from the beginning. Of another: process 0, once it has been heard of.
        expected = range(count) if client is not None and process == 0 else ()
        self._heard = {index: _Heard(_NO_BEAT, self._answered) for index in expected}
        # Seconds that this process spent on data, which the others wait for; what all had spent when the figures were last asked
        # for, and when the slow were last looked for.
        self._data_seconds, self._told_seconds, self._looked_at = 0.0, {}, (time.monotonic(), {})
        self._verdict: dict[str, Any] | None = None
        self._known, self._ended, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._hurry.set()  # the first beat comes at once
        self._threads: list[threading.Thread] = []

    @property
    def _pause(self) -> float:
        return min(5.0, max(0.25, self.config.silent / 12))

    def start(self) -> None:
        """Begins to beat and to guard."""
        duties = [self._guard] if self._client is None else [self._beat, self._guard]
        self._threads = [threading.Thread(target=duty, name=duty.__name__, daemon=True) for duty in duties]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def at(self, phase: str, step: int | None = None) -> Iterator[None]:
        """While it lasts, the process is in `phase`; then it is, anew, in what it was before.

        After an error it stays there: where it happened is what the others are told.
        """
        before, self._activity = self._activity, _Activity(phase, step, time.monotonic())
        yield
        now = time.monotonic()
        if phase == "data":
            self._data_seconds += now - self._activity.since
        self._activity = before._replace(since=now, step=step if step is not None else before.step)

    def raised(self, error: BaseException, code: int) -> int:
        """Tells the others that an error ends this process, and learns who began it; returns the code to leave with.

        A failed collective is most often another's fault: then it waits until that one is found, or is silent for too long.
        """
        if self._client is None:
            return code
        self._error, self._secondary = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", _is_of_others(error)
        self._code, self._state = code, _RAISED
        self._hurry.set()
        patience = self.config.silent + 2 if self._secondary else 4 * self._pause + 2
        if not self._known.wait(patience) or self.process in self._verdict["culprits"]:
            return code
        return self._verdict["code"]

    def leave(self, code: int) -> None:
        """Says that this process ends by itself, with `code`; process 0, which the others need for it, waits for them a while."""
        self._code, self._state = code, _LEFT
        if self._client is not None and not self._known.is_set():
            self._hurry.set()
            deadline = time.monotonic() + 4 * self._pause + 2
            everyone = lambda: sum(heard.beat["state"] == _LEFT for heard in self._heard.values()) >= self.count
            needed = self.process == 0 and code  # jax waits at the end of a run that went well
            while time.monotonic() < deadline and not (everyone() if needed else not self._hurry.is_set()):
                time.sleep(0.02)
        self._ended.set()
        self._hurry.set()
        if not code:  # Python's own end crashes where a thread is in jax's client
            for thread in self._threads:
                thread.join(self._pause)

    def data_seconds(self) -> dict[str, float]:
        """In process 0: what the processes spent on data since this was last asked for: the most, whose it is, and the median."""
        spent = _data_seconds(self._heard)
        since = {process: seconds - self._told_seconds.get(process, 0.0) for process, seconds in spent.items()}
        self._told_seconds = spent
        if not since:
            return {}
        slowest = max(since, key=since.get)
        return {
            "hosts/data_seconds_most": since[slowest], "hosts/data_seconds_median": statistics.median(since.values()),
            "hosts/slowest_process": slowest,
        }  # fmt: skip

    def _beat(self) -> None:
        while True:
            self._hurry.wait(self._pause)
            if self._ended.is_set():
                return
            hurried = self._hurry.is_set()
            try:
                self._client.key_value_set(f"{_BEATS}{self.process}", json.dumps(self._said()), allow_overwrite=True)
                if hurried:
                    self._hurry.clear()
                verdict = self._judged() if self.process == 0 else self._told()
            except jax.errors.JaxRuntimeError:
                self._ended.wait(self._pause)
                continue  # the guard counts how long
            self._answered = time.monotonic()
            if verdict is not None and self._state != _LEFT:
                self._obey(verdict)
                return

    def _said(self) -> dict[str, Any]:
        self._number += 1
        activity = self._activity
        return {
            "number": self._number, "host": socket.gethostname(), "pid": os.getpid(), "born": _birth(os.getpid()),
            "phase": activity.phase, "step": activity.step, "seconds": time.monotonic() - activity.since,
            "state": self._state, "error": self._error, "secondary": self._secondary, "code": self._code,
            "data_seconds": self._data_seconds,
        }  # fmt: skip

    def _told(self) -> dict[str, Any] | None:
        """The verdict of process 0, and what it is doing."""
        told = {key.removeprefix(_FIRST): json.loads(text) for key, text in self._client.key_value_dir_get(_FIRST)}
        if "beat" in told:
            self._heard[0] = _Heard(told["beat"], time.monotonic())
        return told.get("verdict")

    def _judged(self) -> dict[str, Any] | None:
        """In process 0: what is wrong, if anything is, once the others can read it."""
        now = time.monotonic()
        if now - self._judged_at > max(3 * self._pause, self.config.silent / 2):  # this process was frozen, not the others
            self._heard = {process: each._replace(at=now) for process, each in self._heard.items()}
        self._judged_at = now
        for key, text in self._client.key_value_dir_get(_BEATS):
            process, beat = int(key.rpartition("/")[2]), json.loads(text)
            if process not in self._heard or self._heard[process].beat["number"] != beat["number"]:
                self._heard[process] = _Heard(beat, now)
        self._client.key_value_set(f"{_FIRST}beat", json.dumps(self._heard[0].beat), allow_overwrite=True)
        looked, before = self._looked_at
        if now - looked >= self.config.silent:
            self._looked_at = now, _data_seconds(self._heard)
            for process, share in slow(before, self._looked_at[1], now - looked):
                who = _who(process, self._heard[process].beat)
                _tell(f"run.py: {who} is slow: its data takes {share:.0%} of the time, and the others wait")
        verdict = judge(self._heard, self.count, self.config, self._pause, now)
        if verdict is not None:
            self._client.key_value_set(f"{_FIRST}verdict", json.dumps(verdict), allow_overwrite=True)
        return verdict

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Ends this process as the verdict says; the main thread does it where it is on its way out already."""
        self._verdict = verdict
        raised = self._state == _RAISED
        if not raised or self.process not in verdict["culprits"]:
            self._say(verdict["text"], stacks=not raised)
        self._state = _LEFT
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_BEATS}{self.process}", json.dumps(self._said()), allow_overwrite=True)
            if self.process == 0:
                self._wait_for_others([beat["pid"] for beat in verdict["frozen"]])
        _kill_here(verdict["frozen"])
        if raised:
            self._known.set()
            return
        self._die(self._code if self.process in verdict["culprits"] and self._error else verdict["code"])

    def _wait_for_others(self, frozen: list[int]) -> None:
        """The end of process 0 aborts the others: first they shall have said what they know."""
        deadline = time.monotonic() + 2 * self._pause + 1
        while time.monotonic() < deadline:
            beats = [json.loads(text) for _, text in self._client.key_value_dir_get(_BEATS)]
            if len(beats) == self.count and all(beat["state"] == _LEFT or beat["pid"] in frozen for beat in beats):
                return
            time.sleep(self._pause / 4)

    def _guard(self) -> None:
        """Looks from outside at the beat, which waits for ever where the coordinator is frozen, and at the time of one alone."""
        looked = time.monotonic()
        while not self._ended.wait(self._pause / 2):
            now, before = time.monotonic(), self._activity
            if now - looked > self.config.silent / 2:  # this process was frozen, not the coordinator
                self._answered = now
            looked = now
            if self._client is None:
                limit = self.config.limit(before.phase)
                if now - before.since > limit:
                    self._say(f"there is no progress since {now - before.since:.1f} s, where {limit:g} are allowed.")
                    self._die(EXIT_PEER)
            elif time.monotonic() - self._answered > self.config.silent and self._state == _RUNNING:
                self._say(self._coordinator(f"has not answered for {time.monotonic() - self._answered:.1f} s"))
                if self.process and 0 in self._heard:
                    _kill_here([self._heard[0].beat])
                self._die(EXIT_PEER)

    def _coordinator(self, what: str) -> str:
        if self.process == 0:
            return f"the coordination service of this process, which is process 0, {what}."
        if 0 not in self._heard:
            return f"process 0 at {jax_distributed.global_state.coordinator_address}, the coordinator, {what}."
        heard = self._heard[0]
        return f"{_who(0, heard.beat)}, the coordinator, {what}; it was {_where(heard.beat)} when last heard of."

    def aborted(self) -> None:
        """What jax is about to abort this process for: that the coordinator is gone, most often."""
        if self._state == _LEFT or (self._state == _RAISED and not self._secondary):
            self._die(self._code)
        if self._verdict is None:
            gone = self._coordinator("is gone, if the reason above does not say otherwise")
            self._say(f"jax aborts this process: {gone}", stacks=False)
        self._die(EXIT_PEER if self._verdict is None else self._verdict["code"])

    def _say(self, text: str, *, stacks: bool = True) -> None:
        activity = self._activity
        mine = f"This is process {self.process} on {socket.gethostname()} (pid {os.getpid()}), {_where(activity._asdict())}."
        text = f"run.py: {text} {mine} The same command resumes from the newest checkpoint."
        _tell(text)
        if stacks:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _die(self, code: int) -> NoReturn:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def judge(
    heard: dict[int, _Heard], count: int, config: WatchConfig, pause: float, now: float
) -> dict[str, Any] | None:
    """Who holds the run up, None while nobody does: {"text", "culprits", "code", "frozen": beats of those that cannot end}.

    Args:
      heard: the last beat of each process that has been heard of, and when it came.
      pause: seconds between beats.
    """
    beats = {process: each.beat for process, each in sorted(heard.items()) if each.beat["state"] != _LEFT}
    silence = {process: now - heard[process].at for process in beats}
    consequence = [process for process, beat in beats.items() if beat["state"] == _RAISED and beat["secondary"]]
    # Where a collective has failed, the one that is not heard of need not be waited for as long.
    patience = min(config.silent, max(3.0, 6 * pause)) if consequence else config.silent
    for process, beat in beats.items():
        if beat["state"] == _RAISED and not beat["secondary"]:
            return _verdict(beats, [process], f"raised {beat['error']}", beat["code"])
    silent = [process for process in beats if silence[process] > patience]
    if silent:
        what = f"has not been heard of for {max(silence[process] for process in silent):.1f} s"
        return _verdict(beats, silent, what, frozen=True)
    stay = {process: beat["seconds"] + silence[process] for process, beat in beats.items() if beat["state"] == _RUNNING}
    late = [process for process in stay if stay[process] > config.limit(beats[process]["phase"])]
    busy = [process for process in stay if beats[process]["phase"] not in WAITING]
    culprits = [process for process in late if process in busy]
    if late and not busy:  # who is behind keeps the others waiting
        steps = {process: beats[process]["step"] or 0 for process in stay}
        culprits = [process for process in stay if steps[process] == min(steps.values())]
    if len(culprits) == count > 1 and not busy:
        what = f"all wait, for {max(stay.values()):.1f} s: it is a device or the network, not one of them"
        return _verdict(beats, culprits, what)
    if culprits:
        return _verdict(beats, culprits, f"has been there for {max(stay[process] for process in culprits):.1f} s")
    worn = [process for process in consequence if silence[process] + beats[process]["seconds"] > config.silent]
    if worn:
        return _verdict(beats, worn, f"raised {beats[worn[0]]['error']}", beats[worn[0]]["code"])
    return None


def slow(before: dict[int, float], now: dict[int, float], elapsed: float) -> list[tuple[int, float]]:
    """(process, share of the time that it spent on data), of those with more than half where the others have less than a quarter.

    Args:
      before, now: seconds that each process had spent on data then, and `elapsed` seconds later.
    """
    shares = {process: (seconds - before[process]) / elapsed for process, seconds in now.items() if process in before}
    if len(shares) < 2 or statistics.median_low(shares.values()) > 0.25:
        return []
    return [(process, share) for process, share in shares.items() if share > 0.5]


def _data_seconds(heard: dict[int, _Heard]) -> dict[int, float]:
    return {process: each.beat["data_seconds"] for process, each in sorted(heard.items())}


def _verdict(
    beats: dict[int, dict[str, Any]], culprits: list[int], what: str, code: int = EXIT_PEER, *, frozen: bool = False
) -> dict[str, Any]:
    named = "; ".join(f"{_who(process, beats[process])} was {_where(beats[process])}" for process in culprits[:8])
    named += f"; and {len(culprits) - 8} more" if len(culprits) > 8 else ""
    others = [process for process in beats if process not in culprits]
    waiting = f" It kept waiting: {', '.join(map(str, others[:8]))}{' and others' if len(others) > 8 else ''}." if others else ""
    text = f"{named}, and {what}.{waiting}"
    return {
        "text": text, "culprits": culprits, "code": code,
        "frozen": [beats[process] for process in culprits] if frozen else [],
    }  # fmt: skip


def _who(process: int, beat: dict[str, Any]) -> str:
    return f"process {process} on {beat['host']} (pid {beat['pid']})"


def _where(beat: dict[str, Any]) -> str:
    return f"in '{beat['phase']}'" + (f" at step {beat['step']}" if beat["step"] is not None else "")


def _is_of_others(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, says that a collective or the coordination failed, and not why."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or any(word in str(error) for word in _OF_OTHERS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _birth(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks: with the number alone it could be another."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _tell(text: str) -> None:
    """To the log, if it can be written: the disk it is on may be what is full, and the others wait all the same."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _kill_here(beats: list[dict[str, Any]]) -> None:
    """Ends processes that cannot end by themselves, as far as they run on this machine."""
    for beat in beats:
        if beat["host"] == socket.gethostname() and beat["born"] and _birth(beat["pid"]) == beat["born"]:
            with contextlib.suppress(OSError):
                os.kill(beat["pid"], signal.SIGKILL)


_watch = Watch(WatchConfig())


def at(phase: str, step: int | None = None) -> contextlib.AbstractContextManager[None]:
    """While it lasts, this process is in `phase`, at `step`; see `WatchConfig` for what that allows."""
    return _watch.at(phase, step)


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Watches this process for the time of a run and, where it is one of several (`jax.distributed` runs), the others.

    Of several, until the process ends: the others want to know how it does. Where it is alone it may have more runs, or be a
    notebook's, and what an earlier one was in the midst of when an error ended it is over.
    """
    global _watch
    client = jax_distributed.global_state.client
    if client is None:
        _watch = Watch(WatchConfig())
    else:
        _watch = Watch(WatchConfig(), jax.process_index(), jax.process_count(), client)
        _say_who_is_gone(_watch)
    _watch.start()
    try:
        yield
    finally:
        if client is None:
            _watch.leave(0)


def configure(config: WatchConfig) -> None:
    """From now on these limits hold."""
    _watch.config = config


def data_seconds() -> dict[str, float]:
    """See `Watch.data_seconds`."""
    return _watch.data_seconds()


def raised(error: BaseException, code: int) -> int:
    """See `Watch.raised`."""
    return _watch.raised(error, code)


def leave(code: int) -> None:
    """See `Watch.leave`."""
    _watch.leave(code)


def _say_who_is_gone(watched: Watch) -> None:
    """jax aborts a process whose coordinator is gone. A handler of the signal says so in our words, and leaves with our code.

    It must be C's own: Python's handlers run later, in the main thread, and there is no later.
    """
    global _on_abort  # or it would be collected
    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: watched.aborted())
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGABRT), _on_abort)
