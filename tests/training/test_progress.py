"""A bar on a terminal, lines in a log."""

import io

import pytest
from rich.console import Console

from lfm_jax.training import progress
from lfm_jax.training.progress import LoopProgress


@pytest.fixture
def clock(monkeypatch):
    """Sets the time: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_a_log_gets_a_line_every_ten_seconds_and_the_last(clock):
    log = io.StringIO()
    with LoopProgress("training", 40, 10, Console(file=log)) as bar:
        for step, seconds in ((11, 1), (12, 9), (20, 11), (21, 12), (22, 20), (25, 22), (40, 23)):
            clock(seconds)
            bar.update(step, f"loss {step}")
    assert log.getvalue().splitlines() == [
        "training 20/40  loss 20  0:00:22 left",  # 20 more steps at 11 seconds for ten
        "training 25/40  loss 25  0:00:22 left",
        "training 40/40  loss 40  0:00:00 left",
    ]


def test_a_step_without_a_text_writes_no_line(clock):
    log = io.StringIO()
    with LoopProgress("training", 2, 0, Console(file=log)) as bar:
        clock(60)
        bar.update(2)
    assert log.getvalue() == ""


def test_long_times_are_told_in_hours(clock):
    log = io.StringIO()
    with LoopProgress("training", 3001, 0, Console(file=log)) as bar:
        clock(3725 / 3000)
        bar.update(1)
        clock(11)
        bar.update(9, "slow")
    assert log.getvalue() == "training 9/3001  slow  1:00:57 left\n"


def test_a_line_is_printed_whole_as_it_is(clock):
    log = io.StringIO()
    line = f"resumed at step 1 [of] {'very ' * 60}many"
    LoopProgress("training", 2, 0, Console(file=log)).print(line)
    assert log.getvalue() == line + "\n"


def test_a_terminal_gets_a_bar(clock):
    screen = io.StringIO()
    with LoopProgress("training", 40, 10, Console(file=screen, force_terminal=True, width=120)) as bar:
        bar.update(25, "loss 2.5")
        bar.update(26)
    shown = screen.getvalue()
    assert "training" in shown and "26/40" in shown and "loss 2.5" in shown and "left" in shown
