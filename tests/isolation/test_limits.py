"""A child process with limits: what ends or stops it becomes an error that names the file and the limit, and nothing else."""

import importlib.util
import os
from pathlib import Path

import pytest

from lfm_jax.isolation.limits import LimitError, Limits, call_limited

_SPEC = importlib.util.spec_from_file_location("child_functions", Path(__file__).with_name("child_functions.py"))
child_functions = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(child_functions)
LIMITS = Limits(cpu_seconds=2, seconds=60, memory_bytes=1 << 29)


def call(function, data=b"abc", **changes):
    return call_limited(function, data, name="some/file", limits=LIMITS._replace(**changes))


def test_the_result_comes_back():
    data = bytes(range(256)) * 100_000  # more than a pipe holds, lines and all
    assert call(child_functions.count, data[1:]) == {"bytes": len(data) - 1, "first": "01"}
    assert call(child_functions.count, b"") == {"bytes": 0, "first": ""}


def test_the_child_starts_bare(monkeypatch):
    """Neither our packages nor heavy ones are imported, and nothing of the environment that could be a secret."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    loaded = set(call(child_functions.modules))
    assert not loaded & {"jax", "numpy", "lfm_jax", "experiments", "pickle", "site"}
    assert "SECRET_TOKEN" not in call(child_functions.environment)


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (child_functions.spin, {"cpu_seconds": 1}, "some/file: more than 1 seconds of processor time"),
        (child_functions.wait, {"seconds": 1.0}, "some/file: no answer in 1 seconds"),
        (child_functions.eat, {}, "some/file: more than 512 MiB of memory"),
        (child_functions.abort_without_memory, {}, "some/file: more than 512 MiB of memory"),
        (child_functions.abort, {}, r"some/file: it ended the process that looked at it \(signal 6: memory is fine, but this"),
        (child_functions.leave, {}, r"some/file: it ended the process that looked at it \(exit code 3: no word\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_limit_is_named(function, changes, message):
    with pytest.raises(LimitError, match=message):
        call(function, **changes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (child_functions.refuse, "^some/file: abc is not wanted$"),
        (child_functions.fail, "^some/file: KeyError: 'nothing'$"),
        (child_functions.panic, "^some/file: PanicException: index out of range$"),
        (child_functions.no_json, "some/file: TypeError: Object of type set is not JSON serializable"),
        (child_functions.answer_at_length, "some/file: the result has 134217741 bytes, at most 67108864 are taken"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_raised_there_is_raised_here(function, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(function)
    assert not isinstance(raised.value, LimitError)


def test_what_is_printed_there_is_no_answer():
    assert call(child_functions.talk) == "quiet"


def test_no_disk_is_filled(tmp_path):
    """Neither with messages nor with files."""
    with pytest.raises(ValueError, match="some/file: OSError: .*File too large"):
        call(child_functions.talk_without_end)
    with pytest.raises(ValueError, match="some/file: OSError: .*File too large"):
        call(child_functions.write_a_file, os.fsencode(tmp_path / "large"))
    assert (tmp_path / "large").stat().st_size <= 1 << 16


def _children():
    return {child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


def test_no_child_is_left():
    before = _children()
    with pytest.raises(LimitError, match="no answer in 1 seconds"):
        call(child_functions.wait, seconds=1.0)
    assert _children() <= before  # of which one may have ended meanwhile
