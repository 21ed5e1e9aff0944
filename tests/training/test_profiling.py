"""Traces of a loop that goes on: which steps are in them is read from the profiler's own files."""

import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from lfm_jax.training import profiling
from lfm_jax.training.profiling import ProfileConfig, Profiler, ProfileWarning

STEP = jax.jit(lambda x: x @ x)


@pytest.fixture
def clock(monkeypatch):
    """Moves the time: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(profiling, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def loop(workdir, config, steps=6, at=(), say=lambda line: None):
    """Does so many steps; at: what happens before a step."""
    at, x = dict(at), jnp.eye(8)
    with Profiler(config, workdir, say) as profiler:
        for step in range(1, steps + 1):
            at.get(step, lambda: None)()
            profiler.before(step)
            x = STEP(x)
            profiler.after(step, x)
    return x


def traced(workdir):
    """Folder of each trace: the steps in it."""
    found = {}
    for file in sorted(workdir.glob("profile/*/plugins/profile/*/*.xplane.pb")):
        events = [event for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events]
        steps = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
        found[file.relative_to(workdir).parts[1]] = sorted(steps)
    return found


def test_the_steps_of_the_configuration_are_traced(tmp_path):
    lines = []
    loop(tmp_path, ProfileConfig(first=2, steps=3), say=lines.append)
    assert traced(tmp_path) == {"step_00000002": [2, 3, 4]}
    assert len(lines) == 1 and lines[0].startswith(f"a trace from step 2 on is in {tmp_path}/profile/step_00000002;")


def test_only_the_last_step_of_a_trace_is_waited_for(tmp_path):
    """Or its end would be missing; and the loop is not held up otherwise."""
    waited = []
    with Profiler(ProfileConfig(first=2, steps=2), tmp_path, lambda line: waited.append("end of the trace")) as profiler:
        for step in range(1, 6):
            profiler.before(step)
            profiler.after(step, types.SimpleNamespace(block_until_ready=lambda step=step: waited.append(step)))
    assert waited == [3, "end of the trace"]


def test_a_run_that_ends_ends_its_trace(tmp_path):
    loop(tmp_path, ProfileConfig(first=5, steps=30))
    assert traced(tmp_path) == {"step_00000005": [5, 6]}
    with pytest.raises(KeyError), Profiler(ProfileConfig(first=1), tmp_path) as profiler:
        profiler.before(1)
        raise KeyError("of the training")
    assert "step_00000001" in traced(tmp_path)


def test_nobody_asks_and_nothing_is_traced(tmp_path, clock):
    (tmp_path / "profile_request").touch()  # for a process before this one
    loop(tmp_path, ProfileConfig(), at=[(3, lambda: clock(60)), (5, lambda: clock(60))])
    assert not (tmp_path / "profile").exists()


def test_a_signal_asks(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    loop(tmp_path, ProfileConfig(steps=2), at=[(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))])
    assert traced(tmp_path) == {"step_00000003": [3, 4]}
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_request_waits_for_the_trace_to_end(tmp_path):
    ask = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    loop(tmp_path, ProfileConfig(steps=2), at=[(2, ask), (3, ask)])
    assert traced(tmp_path) == {"step_00000002": [2, 3], "step_00000004": [4, 5]}


def test_a_file_asks_each_time_it_is_written(tmp_path, clock):
    request = tmp_path / "profile_request"
    request.touch()

    def ask(seconds):
        os.utime(request, (seconds, seconds))
        clock(15)

    events = [(2, lambda: ask(1_000)), (4, lambda: ask(2_000)), (6, lambda: clock(15)), (7, lambda: os.utime(request))]
    loop(tmp_path, ProfileConfig(steps=1), steps=9, at=events)
    assert traced(tmp_path) == {"step_00000002": [2], "step_00000004": [4]}  # at 7 the time to look had not come


def test_a_folder_that_does_not_answer_asks_for_nothing(tmp_path, clock):
    (tmp_path / "profile_request").touch()
    with Profiler(ProfileConfig(), tmp_path) as profiler:
        found, profiler._workdir = profiler._workdir, None
        clock(15)
        profiler.before(1)
        profiler._workdir = found
        clock(15)
        profiler.before(2)
    assert not (tmp_path / "profile").exists()


def test_where_signals_do_not_come_the_file_remains(tmp_path, clock):
    def ask():
        (tmp_path / "profile_request").touch()
        clock(15)

    thread = threading.Thread(target=loop, args=(tmp_path, ProfileConfig(steps=1)), kwargs={"at": [(2, ask)]})
    thread.start()
    thread.join()
    assert traced(tmp_path) == {"step_00000002": [2]}


def test_a_profiler_that_is_taken_does_not_stop_the_loop(tmp_path):
    jax.profiler.start_trace(tmp_path / "other")
    try:
        with pytest.warns(ProfileWarning, match="the profiler did not start .Profile has already been started") as told:
            done = loop(tmp_path, ProfileConfig(first=2))
    finally:
        jax.profiler.stop_trace()
    assert len(told) == 1 and done.shape == (8, 8) and traced(tmp_path) == {}


def test_a_trace_that_cannot_be_written_does_not_stop_the_loop(tmp_path):
    (tmp_path / "profile").write_text("a file where its folder would be")
    with pytest.warns(ProfileWarning, match="the profiler did not end"):
        loop(tmp_path, ProfileConfig(first=2, steps=1))
    (tmp_path / "profile").unlink()
    loop(tmp_path, ProfileConfig(first=2, steps=1))
    assert traced(tmp_path) == {"step_00000002": [2]}


@pytest.mark.parametrize("name", ["first", "steps"])
def test_steps_begin_at_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ProfileConfig(**{name: 0})
