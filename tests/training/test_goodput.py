"""Every second of a run has one kind, over kills and restarts; the judge is a list of what was done, second by second."""

import contextlib
import copy
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from unittest import mock

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_jax.training import goodput
from lfm_jax.training.goodput import KINDS, SPENT, GoodputWarning, Ledger, read_seconds, table, uncounted_seconds


class Clock:
    """Both clocks of a machine; the wall clock can be set."""

    def __init__(self):
        self.now, self.offset = 50.0, 1e9

    def spend(self, seconds):
        self.now += seconds

    @contextlib.contextmanager
    def in_use(self):
        fake = types.SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now + self.offset)
        with mock.patch.object(goodput, "time", fake):
            yield self


@pytest.fixture
def clock():
    with Clock().in_use() as clock:
        yield clock


def kill(ledger):
    """What remains of it when its process is gone."""
    ledger._closed.set()
    jax.monitoring.unregister_event_duration_listener(ledger._heard)


def without_zeros(seconds):
    return {kind: value for kind, value in seconds.items() if value}


def test_time_inside_is_not_counted_outside(tmp_path, clock):
    with Ledger(tmp_path, age=7.0) as ledger:
        clock.spend(1)
        with ledger.kind("evaluation"):
            clock.spend(10)
            with ledger.kind("save"):
                clock.spend(100)
            clock.spend(1000)
        assert without_zeros(ledger.seconds()) == {"start": 7, "other": 1, "evaluation": 1010, "save": 100}
    assert read_seconds(tmp_path) == ledger.seconds()


def test_what_a_wait_was_is_known_afterwards(tmp_path, clock):
    with Ledger(tmp_path) as ledger:
        with ledger.kind("data_wait") as wait:
            clock.spend(3)
            ledger.write()
            wait.kind = "step"
        with ledger.kind("data_wait"):
            clock.spend(4)
    assert without_zeros(ledger.seconds()) == {"step": 3, "data_wait": 4}


def train(ledger, clock, steps, seconds=2.0):
    for step in steps:
        with ledger.kind("step"):
            clock.spend(seconds)
        ledger.step(step)


def test_steps_done_again_are_wasted(tmp_path, clock):
    ledger = Ledger(tmp_path)
    ledger.begin(0)
    train(ledger, clock, range(1, 11))
    with ledger.kind("save"):
        clock.spend(1)
    train(ledger, clock, range(11, 14), seconds=5.0)
    with ledger.kind("step"):  # step 14 is not over
        clock.spend(3)
        ledger.write()
        clock.spend(9)
    kill(ledger)
    clock.spend(60)
    with Ledger(tmp_path, age=4.0) as ledger:
        with ledger.kind("restore"):
            clock.spend(2)
        ledger.begin(10)
        train(ledger, clock, range(11, 15), seconds=5.0)
    expected = {"step": 20 + 20, "wasted": 15 + 3, "save": 1, "down": 9 + 60 - 4, "start": 4, "restore": 2}
    assert without_zeros(ledger.seconds()) == read_without_zeros(tmp_path) == expected


def read_without_zeros(workdir):
    return without_zeros(read_seconds(workdir))


def test_between_two_saves_the_time_is_shared_evenly(tmp_path, clock):
    """A restart from a step of which nothing was noted."""
    ledger = Ledger(tmp_path)
    ledger.begin(0)
    train(ledger, clock, range(1, 11))
    with ledger.kind("save"):
        pass
    ledger.close()
    with Ledger(tmp_path) as ledger:
        ledger.begin(4)
    assert read_without_zeros(tmp_path) == {"step": 8, "wasted": 12}


def test_what_a_run_goes_back_over_twice_is_wasted_once(tmp_path, clock):
    """The newest checkpoint is found damaged at the second restart."""
    for start in (0, 10, 5):
        ledger = Ledger(tmp_path)
        ledger.begin(start)
        for step in range(start + 1, start + 11):
            train(ledger, clock, [step])
            if step % 5 == 0:
                with ledger.kind("save"):
                    pass
        ledger.close()
    assert read_without_zeros(tmp_path) == {"step": 10 + 20, "wasted": 10 + 20}


def test_a_restart_that_never_trained_wastes_nothing(tmp_path, clock):
    ledger = Ledger(tmp_path)
    ledger.begin(0)
    train(ledger, clock, range(1, 4))
    ledger.close()
    Ledger(tmp_path).close()
    assert read_without_zeros(tmp_path) == {"step": 6}


def test_rolled_back_steps_are_skipped_and_those_of_another_process_wasted(tmp_path, clock):
    ledger = Ledger(tmp_path)
    ledger.begin(0)
    train(ledger, clock, range(1, 11))
    ledger.close()
    with Ledger(tmp_path) as ledger:
        ledger.begin(10)
        train(ledger, clock, range(11, 16), seconds=7.0)
        ledger.skip(12)
        with ledger.kind("step"):
            clock.spend(1)
        ledger.roll_back(5)
        train(ledger, clock, range(6, 9))
    assert read_without_zeros(tmp_path) == {"step": 10 + 6, "wasted": 10, "skipped": 36}


def test_the_time_after_an_orderly_end_is_not_the_runs(tmp_path, clock):
    with Ledger(tmp_path) as ledger:
        clock.spend(1)
    clock.spend(10_000)
    with pytest.raises(SystemExit), Ledger(tmp_path) as ledger:
        clock.spend(1)
        raise SystemExit(75)
    clock.spend(50)
    with Ledger(tmp_path) as ledger:
        pass
    assert without_zeros(ledger.seconds()) == {"other": 2, "down": 50}


def test_a_wall_clock_that_goes_back_makes_no_time_negative(tmp_path, clock):
    ledger = Ledger(tmp_path)
    clock.spend(100)
    ledger.close()
    clock.offset -= 3600
    clock.spend(10)
    with Ledger(tmp_path, age=5.0) as ledger:
        clock.spend(1)
        clock.offset -= 3600
        clock.spend(1)
    assert without_zeros(ledger.seconds()) == {"other": 102}


def test_compiling_is_counted_wherever_it_happens_and_once(tmp_path, clock):
    """As JAX reports it: the tracing of an inner function within that of the outer one."""
    with Ledger(tmp_path) as ledger, ledger.kind("evaluation"):
        clock.spend(1)
        clock.spend(5)  # an outer function's tracing: 2 seconds, and the inner one's 3
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 3.0)
        clock.spend(2)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 7.0)
        jax.monitoring.record_event_duration_secs("/jax/checkpoint/write", 1.0)
        clock.spend(4)
    assert without_zeros(ledger.seconds()) == {"evaluation": 7, "compile": 5}
    clock.spend(7)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 7.0)
    assert ledger.seconds()["compile"] == 5  # it is closed


def test_another_thread_may_compile_meanwhile(tmp_path, clock):
    with Ledger(tmp_path) as ledger, ledger.kind("evaluation"):
        clock.spend(5)
        event = ("/jax/core/compile/jaxpr_trace_duration", 3.0)
        other = threading.Thread(target=jax.monitoring.record_event_duration_secs, args=event)
        other.start()
        other.join()
    assert without_zeros(ledger.seconds()) == {"evaluation": 5}


def test_jax_reports_its_compilations(tmp_path):
    with Ledger(tmp_path) as ledger:
        with ledger.kind("step"):
            jax.jit(lambda x: x * 2 + 1)(3.0)
        seconds = ledger.seconds()
    assert 0 < seconds["compile"] and sum(seconds.values()) > seconds["compile"]


SECONDS = st.integers(0, 1000)
TRAIN = st.tuples(st.just("train"), SECONDS, SECONDS)
EVENTS = st.lists(
    st.one_of(
        TRAIN, TRAIN, st.tuples(st.just("save")), st.tuples(st.sampled_from(("skip", "save", "write"))),
        st.tuples(st.just("spend"), st.sampled_from(SPENT), st.sampled_from(SPENT), SECONDS, SECONDS),
        st.tuples(st.just("roll_back"), st.integers(0, 5)),
        st.tuples(st.just("restart"), st.sampled_from(("kill", "tear", "end", "crash")), st.integers(0, 5), SECONDS, SECONDS,
                  st.integers(-2000, 2000)),
    ),
    min_size=20, max_size=60,
)  # fmt: skip


class Judge:
    """What was done, one entry for each stretch of time: (kind, step or None, seconds)."""

    def __init__(self, began, age):
        self.began, self.start, self.finished = began - age, None, False
        self.entries = [["start", None, age]]
        self.written = None

    def ended(self):
        return self.began + sum(seconds for _, _, seconds in self.entries)


def judged(processes):
    total = dict.fromkeys(KINDS, 0.0)
    for index, process in enumerate(processes):
        later = [other.start for other in processes[index + 1 :] if other.start is not None]
        for kind, step, seconds in process.entries:
            wasted = kind == "step" and step is not None and any(step > start for start in later)
            total["wasted" if wasted else kind] += seconds
    for before, after in zip(processes, processes[1:], strict=False):
        total["down"] += 0 if before.finished else max(0, after.began - before.ended())
    return total


class Run:
    """Does the same with a ledger and before the judge."""

    def __init__(self, workdir, clock):
        self.workdir, self.clock, self.before = workdir, clock, []
        self.saved = [0]
        self.begin(0, 0)

    def begin(self, step, age):
        if self.before:
            age = min(age, max(0, self.clock.now + self.clock.offset - self.before[-1].ended()))
        self.ledger = Ledger(self.workdir, age=age)
        self.judge = Judge(self.clock.now + self.clock.offset, age)
        self.ledger.begin(step)
        self.judge.start = self.step = step
        self.write()

    def write(self):
        self.ledger.write()
        self.judge.written = None
        self.judge.written = copy.deepcopy(self.judge)

    def spend(self, kind, inner, seconds, inner_seconds):
        with self.ledger.kind(kind):
            self.clock.spend(seconds)
            with self.ledger.kind(inner):
                self.clock.spend(inner_seconds)
        self.judge.entries += [[kind, self.step + 1, seconds], [inner, self.step + 1, inner_seconds]]

    def train(self, wait, seconds):
        with self.ledger.kind("data_wait"):
            self.clock.spend(wait)
        with self.ledger.kind("step"):
            self.clock.spend(seconds)
        self.step += 1
        self.ledger.step(self.step)
        self.judge.entries += [["data_wait", None, wait], ["step", self.step, seconds]]

    def relabel(self, done):
        for entry in self.judge.entries:
            if entry[0] == "step" and done(entry[1]):
                entry[0] = "skipped"

    def skip(self):
        if self.step not in self.saved:
            self.ledger.skip(self.step)
            self.relabel(lambda step: step == self.step)

    def save(self):
        with self.ledger.kind("save"):
            self.clock.spend(1)
        self.judge.entries.append(["save", None, 1])
        self.saved.append(self.step)

    def roll_back(self, index):
        step = self.saved[index % len(self.saved)]
        self.saved = [saved for saved in self.saved if saved <= step]
        self.ledger.roll_back(step)
        self.relabel(lambda done: done > step)
        self.step, self.judge.start = step, min(step, self.judge.start)

    def restart(self, how, index, gap, age, jump):
        process = self.judge
        if how in ("kill", "tear"):
            kill(self.ledger)
            process = process.written
        else:
            process.finished = how == "end"
            self.ledger.__exit__(None, None if how == "end" else KeyboardInterrupt(), None)
        if how == "tear":
            file = self.workdir / goodput.FILE
            file.write_text(file.read_text()[:-7])
        else:
            self.before.append(process)
        self.clock.spend(gap)
        self.clock.offset += jump
        step = self.saved[index % len(self.saved)]
        self.saved = [saved for saved in self.saved if saved <= step]
        self.begin(step, age)


@settings(max_examples=200)
@given(EVENTS)
def test_no_second_is_lost_or_counted_twice(events):
    with tempfile.TemporaryDirectory() as workdir, Clock().in_use() as clock:
        run = Run(goodput.Path(workdir), clock)
        for name, *arguments in events:
            getattr(run, name)(*arguments)
        seconds = run.ledger.seconds()
        run.ledger.close()
        assert seconds == pytest.approx(judged([*run.before, run.judge]), abs=1e-6)
        assert read_seconds(workdir) == pytest.approx(seconds, abs=0.01)
        rows = table(seconds)
        assert all(row["seconds"] >= 0 for row in rows)
        assert sum(row["share"] for row in rows) == pytest.approx(1.0 if any(seconds.values()) else 0.0)


def test_damaged_lines_are_time_in_which_nothing_is_known_to_have_run(tmp_path, clock):
    for _ in range(4):
        ledger = Ledger(tmp_path)
        clock.spend(10)
        ledger.close()
    file = tmp_path / goodput.FILE
    first, second, third, last = file.read_text().splitlines()
    whole = json.loads(second)
    broken = [second[:40], json.dumps({"began": 1}), "7", second.replace("other", "no_kind"), second.replace("10.0", "NaN")]
    broken += [json.dumps(whole | change) for change in ({"seconds": [1]}, {"steps": [[1]]}, {"steps": 7}, {"more": 1})]
    for damage in broken:
        file.write_text("\n".join([first, damage, third, last]) + "\n")
        assert read_without_zeros(tmp_path) == {"other": 30, "down": 10}
    assert without_zeros(Ledger(tmp_path, writes=False).seconds()) == {"other": 30, "down": 10}


def test_no_ledger_is_no_time(tmp_path):
    assert read_without_zeros(tmp_path) == {} and list(read_seconds(tmp_path)) == list(KINDS)
    assert [row["share"] for row in table(read_seconds(tmp_path))] == [0.0] * len(KINDS)


def test_only_the_process_that_writes_does(tmp_path):
    with Ledger(tmp_path, writes=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path, clock):
    ledger = Ledger(tmp_path)
    part = tmp_path / f".{goodput.FILE}"
    part.mkdir()
    with pytest.warns(GoodputWarning, match=r"goodput\.jsonl cannot be written: .*Is a directory.*Training goes on\."):
        ledger.write()
    clock.spend(5)
    ledger.write()
    part.rmdir()
    ledger.close()
    assert read_without_zeros(tmp_path) == {"other": 5}


@pytest.mark.parametrize("kind", ["evalution", "wasted", "down"])
def test_a_kind_that_is_none_is_refused(tmp_path, kind):
    with Ledger(tmp_path) as ledger, pytest.raises(ValueError, match=f"'{kind}' is no kind of time that is spent"):
        with ledger.kind(kind):
            pass


_PREPARES = """
import sys
from lfm_jax.training import goodput

class Telling(goodput.Ledger):
    def write(self):
        super().write()
        print("written", flush=True)

goodput._WRITE_SECONDS = 0.02
with Telling(sys.argv[1]) as ledger, ledger.kind("preparation"):
    sys.stdin.read()
"""


def test_a_killed_process_has_written_what_it_did_meanwhile(tmp_path):
    """In the midst of something long, of which no step tells."""
    command = [sys.executable, "-c", _PREPARES, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(4):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    (line,) = (tmp_path / goodput.FILE).read_text().splitlines()
    assert json.loads(line)["seconds"].keys() <= {"preparation", "other"}
    assert read_seconds(tmp_path)["preparation"] > 0


def test_the_age_of_a_process_is_from_its_start():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    code = "import time; from lfm_jax.training.goodput import uncounted_seconds as age; print(age(), time.clock_gettime(7))"
    age, now = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    imports = 0.05  # jax alone takes longer
    assert imports < age <= now - before + 0.02  # it is counted in ticks


def test_where_the_system_does_not_say_the_age_is_none(monkeypatch):
    monkeypatch.setattr(Ledger, "last_closed", None)
    with mock.patch.object(goodput, "Path", side_effect=FileNotFoundError):
        assert uncounted_seconds() == 0.0


def test_of_runs_one_after_the_other_in_a_process_no_second_counts_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "last_closed", None)
    alone, (first, second) = uncounted_seconds(), (tmp_path / name for name in ("first", "second"))
    for folder in (first, second):
        folder.mkdir()
        with Ledger(folder, age=uncounted_seconds()):
            time.sleep(0.05)
    assert read_seconds(first)["start"] >= alone - 0.01  # the file has milliseconds
    assert read_seconds(second)["start"] < 0.05
