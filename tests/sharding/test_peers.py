"""Who holds a run up is found from what the processes say of themselves, and is named."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from lfm_jax.sharding import peers
from lfm_jax.sharding.peers import EXIT_PEER, Watch, WatchConfig, judge, slow

CONFIG = WatchConfig(silent=60, data=20, step=30, save=40, compile=100)
ANY_STEP = WatchConfig(silent=60, step=None)


def beat(phase="step", step=7, seconds=1.0, **changes):
    usual = {
        "number": 1, "host": "a-host", "pid": 4000, "born": "1", "phase": phase, "step": step, "seconds": seconds,
        "state": "running", "error": "", "secondary": False, "code": EXIT_PEER, "data_seconds": 0.0,
    }  # fmt: skip
    return usual | changes


def verdict(*beats, silence=None, config=CONFIG):
    """Of processes 0, 1, ... that were heard of just now, or `silence[process]` seconds ago."""
    heard = {process: peers._Heard(each, 1000.0 - (silence or {}).get(process, 0.1)) for process, each in enumerate(beats)}
    return judge(heard, len(beats), config, 5.0, 1000.0)


def raised(secondary, **changes):
    return beat(state="raised", error="OSError: no room", secondary=secondary, code=1, **changes)


def test_nobody_is_blamed_while_all_goes_on():
    assert verdict(beat(), beat("data", 8), beat("compile", 1, seconds=99)) is None


def test_one_that_is_silent_is_dead_or_frozen():
    found = verdict(beat(), beat("data", 6, pid=4711), beat(), silence={1: 61})
    assert found["culprits"] == [1] and found["code"] == EXIT_PEER
    assert found["text"] == (
        "process 1 on a-host (pid 4711) was in 'data' at step 6, and has not been heard of for 61.0 s. It kept waiting: 0, 2."
    )
    assert [each["pid"] for each in found["frozen"]] == [4711]
    assert verdict(beat(), beat(), silence={1: 59}, config=ANY_STEP) is None


def test_one_that_never_said_a_word_is_missed_too():
    """It died between joining and its first beat."""
    watch = Watch(CONFIG, process=0, count=2, client=object())
    began = watch._answered
    watch._heard[0] = peers._Heard(beat("preparation", None), began + 61)
    found = judge(watch._heard, 2, CONFIG, 5.0, began + 61)
    assert found["culprits"] == [1] and found["text"].startswith("process 1 on an unknown host (pid None) was in 'preparation'")
    assert judge(watch._heard, 2, CONFIG, 5.0, began + 59) is None
    peers._kill_here(found["frozen"])  # nobody


def test_a_failed_collective_makes_silence_suspicious_sooner():
    assert verdict(beat(), beat(), silence={1: 31}, config=ANY_STEP) is None
    assert verdict(raised(secondary=True), beat(), silence={1: 31}, config=ANY_STEP)["culprits"] == [1]
    assert verdict(raised(secondary=True), beat(), silence={1: 29}, config=ANY_STEP) is None


def test_one_that_is_stuck_by_itself_is_named_and_not_those_that_wait_for_it():
    found = verdict(beat("step", 8, seconds=31), beat("data", 8, seconds=25), beat("step", 8, seconds=31))
    assert found["culprits"] == [1] and not found["frozen"]
    assert "process 1 on a-host (pid 4000) was in 'data' at step 8, and has been there for 25.1 s" in found["text"]


def test_those_that_wait_have_patience_with_one_that_may_take_longer():
    assert verdict(beat("step", 8, seconds=31), beat("compile", 8, seconds=31)) is None
    assert verdict(beat("step", 8, seconds=31), beat("preparation", None, seconds=9999)) is None


def test_where_all_wait_the_one_behind_is_named():
    found = verdict(beat("step", 8, seconds=31), beat("save", 7, seconds=31), beat("step", 8, seconds=31))
    assert found["culprits"] == [1]


def test_where_all_wait_at_the_same_step_nobody_in_particular_is():
    found = verdict(beat("step", 8, seconds=31), beat("step", 8, seconds=32))
    assert "it is a device or the network, not one of them" in found["text"] and found["code"] == EXIT_PEER


def test_one_that_raised_is_named_with_its_error():
    found = verdict(beat(), raised(False, phase="data", step=9))
    assert found["culprits"] == [1]
    assert found["text"].startswith("process 1 on a-host (pid 4000) was in 'data' at step 9, and raised OSError: no room.")


def test_a_mistake_of_the_command_is_one_for_all():
    """So that no scheduler tries it again."""
    assert verdict(beat(), beat(state="raised", error="ConfigError: what?", code=2))["code"] == 2


def test_a_failed_collective_is_blamed_on_who_raised_something_else():
    assert verdict(raised(True), raised(False))["culprits"] == [1]


def test_a_failed_collective_that_nobody_else_explains_is_its_own():
    assert verdict(raised(True, seconds=30), beat()) is None
    assert verdict(raised(True, seconds=61), beat())["culprits"] == [0]


def test_those_that_have_left_are_not_missed():
    assert verdict(beat(), beat(state="left"), silence={1: 999}) is None


def test_one_whose_data_takes_most_of_the_time_is_slow():
    assert slow({0: 5.0, 1: 90.0}, {0: 5.5, 1: 99.0}, 10.0) == [(1, 0.9)]
    assert slow({0: 5.0, 1: 90.0}, {0: 14.0, 1: 99.0}, 10.0) == []  # the source is slow for all
    assert slow({0: 5.0, 1: 90.0}, {0: 5.5, 1: 94.0}, 10.0) == []
    assert slow({0: 5.0}, {0: 14.0, 1: 99.0}, 10.0) == []


def test_what_hosts_spend_on_data_is_told_since_the_last_time():
    watch = Watch(WatchConfig(), count=3)
    assert watch.data_seconds() == {}
    for spent, most in (((1.0, 5.0, 2.0), 5.0), ((1.5, 5.0, 2.25), 0.5)):
        watch._heard = {process: peers._Heard(beat(data_seconds=seconds), 0.0) for process, seconds in enumerate(spent)}
        figures = watch.data_seconds()
        assert figures["hosts/data_seconds_most"] == most
    assert figures == {"hosts/data_seconds_most": 0.5, "hosts/data_seconds_median": 0.25, "hosts/slowest_process": 0}


def test_of_many_only_some_are_named():
    found = verdict(*[beat("data", seconds=21)] * 20, *[beat()] * 30)
    assert found["culprits"] == list(range(20))
    assert "; and 12 more, and has been" in found["text"] and found["text"].endswith("20, 21, 22, 23, 24, 25, 26, 27 and others.")


@pytest.mark.parametrize("name", ["silent", "data", "step", "compile", "evaluation", "save", "restore"])
def test_a_limit_is_a_positive_number(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive number of seconds, got 0"):
        WatchConfig(**{name: 0})


def test_a_phase_without_a_limit_takes_as_long_as_it_likes():
    assert WatchConfig(data=None).limit("data") == WatchConfig().limit("preparation") == float("inf")
    assert WatchConfig(step=7).limit("loop") == 7


def test_phases_are_left_for_what_was_before_unless_by_an_error():
    watch = Watch(WatchConfig())
    with watch.at("loop", 3):
        with watch.at("data", 4):
            assert watch._activity[:2] == ("data", 4)
        assert watch._activity[:2] == ("loop", 4)
        with pytest.raises(OSError), watch.at("data", 5):
            raise OSError
        assert watch._activity[:2] == ("data", 5)


@pytest.mark.parametrize(
    "error, of_others",
    [(ValueError("Gloo all-reduce failed: Connection closed by peer"), True), (ValueError("a bad row"), False)],
)
def test_a_failed_collective_is_another_process_s_fault(error, of_others):
    assert peers._is_of_others(error) == of_others


def test_a_failed_save_that_a_failed_collective_is_the_cause_of_is_another_s_fault():
    error = RuntimeError("saving the checkpoint failed")
    error.__cause__ = peers.jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")
    assert peers._is_of_others(error)


def test_a_frozen_process_of_this_machine_is_ended_and_no_other():
    process = subprocess.Popen(["sleep", "999"])
    os.kill(process.pid, signal.SIGSTOP)
    here = {"host": peers.socket.gethostname(), "pid": process.pid, "born": peers._birth(process.pid)}
    peers._kill_here([here | {"host": "elsewhere"}, here | {"born": "0"}])
    assert process.poll() is None
    peers._kill_here([here])
    try:
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()


ALONE = """
import sys, threading
from lfm_jax.sharding import peers
with peers.watch():
    peers.configure(peers.WatchConfig(data=0.5))
    with peers.at("data", 12):
        threading.Event().wait()
"""


def test_a_process_that_is_alone_and_stuck_ends_with_its_stacks():
    ended = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == EXIT_PEER
    assert "run.py: there is no progress since" in ended.stderr and "where 0.5 are allowed. This is process 0" in ended.stderr
    assert "in 'data' at step 12. The same command resumes" in ended.stderr
    assert 'in wait' in ended.stderr and "<module>" in ended.stderr


def test_who_cannot_write_to_the_log_ends_all_the_same():
    """/dev/full is a disk without room for a byte."""
    with open("/dev/full", "wb") as full:
        assert subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, stderr=full, timeout=120).returncode == EXIT_PEER


def test_without_others_an_error_keeps_its_code():
    watch = Watch(WatchConfig())
    assert watch.raised(ValueError("x"), 1) == 1
    watch.leave(0)


def test_a_watch_has_no_threads_until_it_is_started():
    before = set(threading.enumerate())
    watch = Watch(WatchConfig())
    assert set(threading.enumerate()) == before
    watch.start()
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["_guard"]
    watch.leave(0)


def test_what_an_error_ended_is_not_held_against_what_comes_later(monkeypatch):
    """Not between two runs of one process, nor in the next one, nor in a loop that nobody watches."""
    ended = []
    monkeypatch.setattr(Watch, "_pause", 0.1)
    monkeypatch.setattr(Watch, "_die", lambda self, code: ended.append(code) or self._ended.set())

    def fails():
        peers.configure(WatchConfig(step=0.5))
        with peers.at("step", 3):
            raise ValueError("a step went wrong")

    for watched in (peers.watch, contextlib.nullcontext):
        before = set(threading.enumerate())
        with pytest.raises(ValueError, match="went wrong"), watched():
            fails()
        time.sleep(1)
        assert ended == [] and not set(threading.enumerate()) - before
        with peers.watch():
            peers.configure(WatchConfig(step=0.5))
            time.sleep(1)
        assert ended == []
    with peers.watch():
        peers.configure(WatchConfig(step=0.5))
        with peers.at("step", 3):
            time.sleep(1.5)
    assert ended == [EXIT_PEER]


# The last thing that the beat does takes two seconds in jax's client, call after call, whether they are answered or not.
_LEAVES_WHILE_THE_BEAT_IS_UNDER_WAY = """
import contextlib, sys, time
import jax
from lfm_jax.sharding import distributed, peers

def judged(watch):
    end = time.monotonic() + 2
    while time.monotonic() < end:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            watch._client.key_value_set("some", "thing", allow_overwrite=True)

jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 1, 0)
peers.Watch._judged = judged
with peers.watch():
    pass
distributed.leave(0)
"""


def test_no_thread_is_in_jaxs_client_when_a_run_that_went_well_ends():
    """C++ there ends a process whose Python ends meanwhile, by SIGSEGV: a run that had done all would be begun again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _LEAVES_WHILE_THE_BEAT_IS_UNDER_WAY, str(port)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr[-1000:]
