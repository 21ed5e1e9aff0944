"""Runs Python programs that a language model wrote, behind a wall; where none holds, it runs nothing."""

import dataclasses
import functools
import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Protocol

from lfm_jax.isolation import interpreter, supervisor
from lfm_jax.isolation.bubblewrap import Bubblewrap
from lfm_jax.isolation.landlock import Landlock
from lfm_jax.isolation.plan import Plan

PROGRAM = "main.py"
_LEAST_MEMORY_BYTES = 64 << 20
# More than the longest report: the two outputs and a line before them.
_MOST_LINE_BYTES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """What a program and all processes it starts may take together.

    seconds: from its start to its end. cpu_seconds: of all cores. memory_bytes: of resident memory, and of the address space of
    each process. processes: and threads, at one time. file_bytes: of one file. disk_bytes: what lies in its folder above what it
    was given, 4 KiB an entry included, no more than 64 levels deep; and what is written in all: to files, pipes and output, and
    again where it is overwritten.
    output_bytes: of standard output and error.

    A process that asks for more address space, or a longer file, gets an error from the system and may go on; past any other
    limit, all of it is ended. The guard looks every 20 ms: on what can be used up in that time, the limit is passed by as much.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.memory_bytes < _LEAST_MEMORY_BYTES:
            raise ValueError(f"memory_bytes is {self.memory_bytes}, and Python does not start below {_LEAST_MEMORY_BYTES}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program.

    reason: "finished", or the field of `ProgramLimits` that it was ended for. exit_code: 128 + the signal where one ended it, as
    shells say. stdout, stderr: as far as `output_bytes` goes, what is no UTF-8 replaced. seconds: from start to end.
    """

    reason: str
    exit_code: int
    stdout: str
    stderr: str
    seconds: float


class NoWall(RuntimeError):
    """Nothing on this machine keeps a program from what is not its business; the text says what was tried and what to install."""


class WallFailed(RuntimeError):
    """The wall, which had held when it was tried, could not be put up this time, and the program was not run."""


class Wall(Protocol):
    """A way to start programs."""

    name: str

    def missing(self) -> str:
        """Why it cannot start here, "" if nothing is known that speaks against it."""

    def plan(self, folder: Path, python: Path) -> AbstractContextManager[Plan]:
        """How to start one in `folder`/box, with the interpreter's home found as `python`; for as long as it runs."""

    def started(self, folder: Path) -> bool:
        """Whether a program that has ended by itself was ever begun."""


# Prints "holds" if none of what the two kinds of walls keep away is there: another's file, a socket, a namespace of its own.
_PROBE = """
import ctypes, os, socket
libc = ctypes.CDLL(None)
found = []
for what, attempt in {
    "files": lambda: open(SECRET).read(),
    "sockets": lambda: socket.socket(socket.AF_INET),
    "namespaces": lambda: libc.unshare(0x10000000) and 1 / 0,
}.items():
    try:
        attempt()
        found.append(what)
    except (OSError, ZeroDivisionError):
        pass
print("holds" if not found else found)
"""


@functools.cache
def find_wall() -> Wall:
    """The wall to use on this machine: bubblewrap if it really starts and holds, else landlock and seccomp. Tried once.

    Raises:
      NoWall: neither does.
    """
    tried = {}
    for wall in (Bubblewrap(), Landlock()):
        tried[wall.name] = defect(wall)
        if not tried[wall.name]:
            return wall
    raise NoWall(
        "programs of a model are not run on this machine, for nothing would hold them. "
        + " ".join(f"{name}: {why}." for name, why in tried.items())
        + " Install bubblewrap and allow user namespaces, or take a kernel with landlock (Linux 5.13)."
    )


def defect(wall: Wall) -> str:
    """Why `wall` is of no use on this machine, "" if it starts and holds."""
    why = wall.missing()
    if why:
        return why
    with tempfile.NamedTemporaryFile() as secret:
        os.chmod(secret.name, 0o644)  # it is the wall that has to keep it
        try:
            outcome = run_python(_PROBE.replace("SECRET", repr(secret.name)), wall=wall)
        except WallFailed as error:
            return str(error)
    if (outcome.reason, outcome.stdout) != ("finished", "holds\n"):
        return f"it starts and does not hold: {outcome.reason}, {outcome.stdout or outcome.stderr}"
    return ""


def run_python(
    source: str,
    *,
    limits: ProgramLimits | None = None,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
    wall: Wall | None = None,
) -> Outcome:
    """Runs a program in a process of its own and returns when it, and every process it has started, has ended.

    It has Python's standard library and the system's programs, a folder of its own as working directory, and nothing else: no
    network, no other files, no environment, no /proc, no /dev/shm (so no locks of multiprocessing, and no shared memory). The
    folder is gone afterwards. Runs may be many at a time, from as many threads.

    Args:
      source: the program.
      limits: default `ProgramLimits()`.
      stdin: what it can read from its standard input.
      files: content by name, relative to its folder; modules among them can be imported.
      wall: default `find_wall()`.

    Raises:
      NoWall: there is none on this machine.
      WallFailed: the program was not begun.
      ValueError: a file's name leads out of the folder, or is the program's.
    """
    wall = wall or find_wall()
    limits = limits or ProgramLimits()
    folder = Path(tempfile.mkdtemp(prefix="isolation_"))
    try:
        _fill(folder, source, stdin, files or {})
        python = interpreter.home()
        bind = ""
        if os.geteuid() == 0:
            folder.chmod(0o711)  # the program's user passes through to what is given to it
            if not interpreter.is_everybodys(python):
                (folder / "python").mkdir()
                bind = f"{python}:{folder / 'python'}"
                python = folder / "python"
        with wall.plan(folder, python) as plan:
            data = _supervise(_arguments(folder, limits, plan, bind), plan, limits)
        return _outcome(data, wall, folder)
    finally:
        supervisor.remove(folder)


def _fill(folder: Path, source: str, stdin: str, files: Mapping[str, str | bytes]) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) in (".", PROGRAM):
            raise ValueError(f"files must have names below the program's folder, other than {PROGRAM}; got {name!r}")
    for name, content in {"stdin": stdin, f"box/{PROGRAM}": source, **{f"box/{name}": files[name] for name in files}}.items():
        path = folder / name
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        # A model writes whatever it likes, half of a surrogate pair included.
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))


def _arguments(folder: Path, limits: ProgramLimits, plan: Plan, bind: str) -> list[str]:
    settings = {
        **dataclasses.asdict(limits),
        "folder": folder,
        "box": folder / "box",
        "stdin": folder / "stdin",
        "bind": bind,
        "ruleset": "" if plan.ruleset is None else plan.ruleset,
        "filter": plan.filter,
        "wall_processes": plan.wall_processes,
    }
    # Compiled, where it could be written: the run of a small program takes little longer than the compilation.
    compiled = supervisor.__cached__
    file = compiled if compiled and os.path.exists(compiled) else supervisor.__file__
    start = [interpreter.executable_in(interpreter.home()), "-I", "-S", file]
    program = [*plan.command, *interpreter.OPTIONS, PROGRAM]
    return [*start, *(f"{name}={value}" for name, value in settings.items()), "--", *program]


def _supervise(arguments: list[str], plan: Plan, limits: ProgramLimits) -> bytes:
    """The supervisor's report. When its standard input closes, because we end, it ends everything."""
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=plan.descriptors,
        env=interpreter.ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            return process.stdout.read(limits.output_bytes + _MOST_LINE_BYTES)
        finally:
            process.stdin.close()


def _outcome(data: bytes, wall: Wall, folder: Path) -> Outcome:
    line, _, outputs = data.partition(b"\n")
    if not line:
        raise WallFailed(f"{wall.name}: the program was ended, for its supervisor was killed")
    reason, code, seconds, size = line.decode().split()
    out, err = (part.decode(errors="replace") for part in (outputs[: int(size)], outputs[int(size) :]))
    if reason == "failed" or (reason == "finished" and not wall.started(folder)):
        raise WallFailed(f"{wall.name} did not start: {err.strip()}")
    return Outcome(reason=reason, exit_code=int(code), stdout=out, stderr=err, seconds=float(seconds))
