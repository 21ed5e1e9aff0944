import os

import pytest

from experiments.benchmarks import isolation, isolation_attacks
from experiments.benchmarks.isolation import Config
from experiments.benchmarks.isolation_attacks import run_suite_as
from experiments.results import read_results
from lfm_jax.isolation import Outcome
from lfm_jax.isolation.wall import defect


def test_it_counts_what_was_not_held_and_times_every_wall(monkeypatch, tmp_path):
    held = {"attack": "a", "breaches": [], "how": "EPERM", "seconds": 0.1}
    rows = [held, {**held, "attack": "b", "breaches": ["BREACH"]}]
    monkeypatch.setattr(isolation, "run_suite", lambda wall: rows)
    monkeypatch.setattr(isolation, "run_suite_as", lambda user, wall: rows[:1])
    isolation.main(Config(repetitions=2), tmp_path)
    results = read_results(tmp_path)
    walls = [name for name, wall in isolation_attacks.WALLS.items() if not defect(wall)]
    assert results["walls"] == walls
    assert results["attacks"] == (3 if os.geteuid() == 0 else 2) * len(walls)
    assert results["not_held"] == len(walls)
    for name in (*walls, "python_isolated", "python_without_site"):
        assert 0 < results[f"{name}_start_ms"] <= results[f"{name}_start_p95_ms"]
        assert results[f"{name}_start_processor_ms"] > 0


def test_a_start_that_does_not_print_is_not_timed(monkeypatch):
    wrong = Outcome(reason="finished", exit_code=0, stdout="2\n", stderr="", seconds=0.1)
    monkeypatch.setattr(isolation, "run_python", lambda source, wall: wrong)
    with pytest.raises(RuntimeError, match=r"landlock: print\(1\) printed '2"):
        isolation._starts(Config(repetitions=1), ["landlock"])


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="repetitions and user must be at least 1, got 0 and 1000"):
        Config(repetitions=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it as another user")
def test_a_suite_that_did_not_run_is_no_success(monkeypatch):
    with pytest.raises(RuntimeError, match="(?s)the suite as user 1000 ended with 1: .*no_such_wall"):
        run_suite_as(1000, "no_such_wall", ["network"])
    monkeypatch.setattr(isolation_attacks.interpreter, "is_everybodys", lambda path: False)
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(RuntimeError, match="no python3 in /usr/bin or /usr/local/bin"):
        run_suite_as(1000, "landlock")
