"""Our own functions on what comes from outside, in a child process with limits: what would end this process ends the child.

The child is this file run as a program. It gets a function's file and name and the bytes to work on through a pipe and answers in
JSON: nothing is unpickled, and neither jax nor the packages around the function are imported. It keeps a faulty library from
taking this process with it; it is no wall against code (for that there is the sandbox).
"""

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

_MOST_ANSWER_BYTES = 1 << 26
_MOST_ERROR_BYTES = 1 << 16
_MOST_CHARACTERS = 300
# A thread or an arena for each of two hundred cores would take the address space before the work begins.
_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "LC_ALL": "C.UTF-8"}
_INHERITED = ("LD_LIBRARY_PATH", "TZ")
# What allocators of C++ and Rust print before they end the process.
_OUT_OF_MEMORY = ("memory allocation of", "bad_alloc", "MemoryError", "out of memory", "Cannot allocate memory")


class Limits(NamedTuple):
    """What a call may take, Python's start included.

    cpu_seconds: of processor time, so that a busy machine refuses nothing that an idle one allows. seconds: from beginning to
    end. memory_bytes: of address space.
    """

    cpu_seconds: int
    seconds: float
    memory_bytes: int


class LimitError(ValueError):
    """What was looked at takes more than a limit, or ends the process that looks at it; the text says which, and of what."""


def call_limited(function: Callable[[bytes], Any], data: bytes, *, name: str, limits: Limits) -> Any:
    """`function(data)`, computed in a child process.

    Args:
      function: at the top level of a file that imports nothing of ours; takes bytes, returns what JSON can hold.
      name: of the file that `data` is of, for messages.
    Raises:
      LimitError: more time or memory than `limits`, or the child ended without an answer.
      ValueError: the function raised something; the message is `name` and what it said.
    """
    job = {
        "file": inspect.getsourcefile(function), "function": function.__name__, "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes, "path": [entry for entry in sys.path if entry],
    }  # fmt: skip
    environment = _ENVIRONMENT | {name: os.environ[name] for name in _INHERITED if name in os.environ}
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-I", "-S", __file__]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment)
        with child:
            try:
                answer, _ = child.communicate(json.dumps(job).encode() + b"\n" + data, timeout=limits.seconds)
            except subprocess.TimeoutExpired as error:
                raise LimitError(f"{name}: no answer in {limits.seconds:.0f} seconds; it is damaged or hostile") from error
            finally:
                child.kill()  # does nothing to one that has ended
        errors.seek(0)
        said = errors.read(_MOST_ERROR_BYTES).decode(errors="replace")
    return _value(answer, child.returncode, said, name, limits)


def _value(answer: bytes, code: int, said: str, name: str, limits: Limits) -> Any:
    """What the child's answer holds, or the error that its end stands for. said: on its standard error."""
    content = json.loads(answer) if code == 0 and answer else {}
    if "value" in content:
        return content["value"]
    if "error" in content:
        raise ValueError(f"{name}: {content['error']}")
    if code == -signal.SIGXCPU:
        raise LimitError(f"{name}: more than {limits.cpu_seconds} seconds of processor time; it is damaged or hostile")
    if content.get("memory") or any(words in said for words in _OUT_OF_MEMORY):
        raise LimitError(f"{name}: more than {limits.memory_bytes >> 20} MiB of memory; it is damaged or hostile")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = (said.strip().splitlines() or ["no word"])[-1][:_MOST_CHARACTERS]
    raise LimitError(f"{name}: it ended the process that looked at it ({how}: {last}); it is damaged or hostile")


def _serve() -> None:
    """The child: reads the job and the data, answers, ends."""
    job = json.loads(sys.stdin.buffer.readline())
    data = sys.stdin.buffer.read()
    # What libraries print goes to standard error; the answer alone to the pipe.
    answers = os.dup(1)
    os.dup2(2, 1)
    _limit(job["cpu_seconds"], job["memory_bytes"])
    sys.path[:] = job["path"]
    try:
        spec = importlib.util.spec_from_file_location("limited", job["file"])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answer = json.dumps({"value": getattr(module, job["function"])(data)}).encode()
        if len(answer) > _MOST_ANSWER_BYTES:
            raise ValueError(f"the result has {len(answer)} bytes, at most {_MOST_ANSWER_BYTES} are taken")
    except MemoryError:
        answer = b'{"memory": true}'
    except BaseException as error:  # a panic in Rust is no Exception
        text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        answer = json.dumps({"error": text[:_MOST_CHARACTERS]}).encode()
    with os.fdopen(answers, "wb") as file:
        file.write(answer)


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    import resource

    # A core file of an abort, or pages of messages, would fill the disk.
    values = {"CORE": 0, "FSIZE": _MOST_ERROR_BYTES, "CPU": cpu_seconds, "AS": memory_bytes}
    for kind, value in values.items():
        number = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError):  # macOS has no limit on address space
            # Past the soft limit of processor time comes SIGXCPU, past the hard one SIGKILL, which would not say why.
            resource.setrlimit(number, (value, hard if kind == "CPU" else value))


if __name__ == "__main__":
    _serve()
