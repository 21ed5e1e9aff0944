"""The escape suite: programs that try to get past the wall of `lfm_jax.isolation`, and what each must not achieve.

A program prints BREACH for what it managed, and `Host` looks for itself: at its sockets, files and processes, before and after.
It needs the standard library only, so that it can be run as another user by another interpreter:

    python -m experiments.benchmarks.isolation_attacks bubblewrap|landlock [attack ...]
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.isolation_programs import ATTACKS, PRELUDE, Attack
from lfm_jax.isolation import interpreter
from lfm_jax.isolation.bubblewrap import Bubblewrap
from lfm_jax.isolation.landlock import Landlock
from lfm_jax.isolation.wall import Outcome, Wall, run_python

WALLS: dict[str, Wall] = {wall.name: wall for wall in (Bubblewrap(), Landlock())}
VARIABLE = "LFM_JAX_ISOLATION_SECRET"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """breaches: what was achieved, which must be nothing; how: what the attempts met."""

    breaches: list[str]
    how: str
    outcome: Outcome


class Host:
    """What an attack is after: a secret in files, in the environment and behind a descriptor, sockets, a process, a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.mark = f"m{secrets.token_hex(6)}"  # as long as a process's name may be, and all digits of a number that sleep takes
        self.number = f"3600.{secrets.randbelow(10**12):012d}"
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / "secret").write_text(self.token)
        (self.home / "kept").mkdir()
        (self.home / "kept" / "file").write_text("kept")
        self.boxes = folder / "boxes"
        self.boxes.mkdir()
        self.sockets: dict[str, socket.socket] = {}

    def addresses(self) -> dict[str, object]:
        """What a program is told, so that it need not search."""
        found = {name: server.getsockname() for name, server in self.sockets.items()}
        found = {name: "@" + value[1:].decode() if isinstance(value, bytes) else value for name, value in found.items()}
        return {
            **found, "secret": str(self.home / "secret"), "home": str(self.home), "file": str(self.home / "kept" / "file"),
            "repository": str(Path(__file__).resolve()), "victim": self.victim.pid, "host": os.getpid(), "mark": self.mark,
            "number": self.number, "variable": VARIABLE,
        }  # fmt: skip

    @contextlib.contextmanager
    def open(self) -> Iterator["Host"]:
        """With everything in place."""
        with contextlib.ExitStack() as stack:
            for name, family, kind, address in (
                ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
                ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                ("unix_stream", socket.AF_UNIX, socket.SOCK_STREAM, str(self.home / "stream")),
                ("unix_datagram", socket.AF_UNIX, socket.SOCK_DGRAM, str(self.home / "datagram")),
                ("abstract_stream", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.token[:8]}s"),
                ("abstract_datagram", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{self.token[:8]}d"),
            ):
                server = self.sockets[name] = stack.enter_context(socket.socket(family, kind))
                server.bind(address)
                if kind == socket.SOCK_STREAM:
                    server.listen()
                server.setblocking(False)
            self.victim = stack.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
            stack.callback(self.victim.kill)
            secret = stack.enter_context(open(self.home / "secret"))
            os.set_inheritable(secret.fileno(), True)
            os.environ[VARIABLE] = self.token
            stack.callback(os.environ.pop, VARIABLE)
            before, tempfile.tempdir = tempfile.tempdir, str(self.boxes)
            stack.callback(setattr, tempfile, "tempdir", before)
            self.before = self._state()
            yield self

    def _state(self) -> dict[str, object]:
        """What must be the same after as before."""
        files = {}
        for path in sorted(self.home.rglob("*")):
            status = path.lstat()
            files[str(path)] = (status.st_mode, status.st_uid, status.st_mtime_ns, status.st_nlink, status.st_size)
        process = f"/proc/{self.victim.pid}"
        limits = Path(process, "limits").read_text()
        affinity = os.sched_getaffinity(self.victim.pid)
        priority = os.getpriority(os.PRIO_PROCESS, self.victim.pid)
        stopped = Path(process, "stat").read_text().rpartition(")")[2].split()[0] in "tT"
        return {"files": files, "the other process": (self.victim.poll(), limits, affinity, priority, stopped)}

    def breaches(self) -> list[str]:
        """What an attack has done that can be seen from here."""
        found = [f"{what} changed" for what, value in self._state().items() if value != self.before[what]]
        for name, server in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                server.accept()[0].close() if server.type == socket.SOCK_STREAM else server.recv(100)
                found.append(f"something arrived at {name}")
        found += [f"process {pid} is left" for pid in self._left()]
        found += [f"{path} is left" for path in self.boxes.iterdir()]
        return found

    def _left(self) -> list[int]:
        left = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    named = (entry / "comm").read_text() + (entry / "cmdline").read_text()
                    left += [int(entry.name)] * (self.mark in named or self.number in named)
        return left


@contextlib.contextmanager
def open_host() -> Iterator[Host]:
    """A host in a folder of its own, which every user may pass through: not its permissions, the wall has to hold."""
    with tempfile.TemporaryDirectory(prefix="host_") as folder:
        os.chmod(folder, 0o755)
        with Host(Path(folder)).open() as host:
            yield host


def program(attack: Attack, host: Host) -> str:
    """The attack's source, with what it needs to know of the host."""
    return f"HOST = {host.addresses()!r}\n{PRELUDE}\n{attack.source}"


def run_attack(attack: Attack, host: Host, wall: Wall) -> Verdict:
    """Runs it behind the wall and says what it achieved."""
    outcome = run_python(program(attack, host), limits=attack.limits, stdin=attack.stdin, wall=wall)
    said = outcome.stdout + outcome.stderr
    breaches = [line for line in said.splitlines() if line.startswith("BREACH")] + host.breaches()
    if host.token in said:
        breaches.append("the secret came out")
    if outcome.reason not in attack.reasons:
        breaches.append(f"it ended for {outcome.reason}, expected {' or '.join(attack.reasons)}: {said[-500:]}")
    if outcome.reason == "finished" and outcome.exit_code not in attack.exit_codes:
        breaches.append(f"exit code {outcome.exit_code}: the attack did not run to its end: {said[-500:]}")
    if len(said) > attack.limits.output_bytes:
        breaches.append(f"{len(said)} characters came out")
    met = sorted(set(re.findall(r"^held: .*?: (\w+)", said, re.MULTILINE)))
    how = outcome.reason if outcome.reason != "finished" else ", ".join(met)
    return Verdict(breaches=breaches, how=how or "nothing left", outcome=outcome)


def run_suite(wall: str, names: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """A row for each attack, or each of those named, behind the wall of this name."""
    with open_host() as host:
        for attack in ATTACKS:
            if not names or attack.name in names:
                verdict = run_attack(attack, host, WALLS[wall])
                seconds = round(verdict.outcome.seconds, 3)
                yield {"attack": attack.name, "breaches": verdict.breaches, "how": verdict.how, "seconds": seconds}


def run_suite_as(user: int, wall: str, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """`run_suite` by an ordinary user, for root to call: from copies of the files needed, which that user may read.

    Raises:
      RuntimeError: no interpreter that the user can reach, or the suite did not run to its end.
    """
    python = interpreter.executable_in(interpreter.home())
    if not interpreter.is_everybodys(Path(python)):
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None:
        raise RuntimeError("no python3 in /usr/bin or /usr/local/bin, and an ordinary user cannot reach the one of this process")
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="copy_") as folder:
        for file in (*(root / "lfm_jax" / "isolation").glob("*.py"), *Path(__file__).parent.glob("isolation_*.py")):
            copy = Path(folder, file.relative_to(root))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = subprocess.run(
            [python, "-B", "-m", __name__, wall, *names], cwd=folder, user=user, group=user, extra_groups=[],
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the suite as user {user} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main(wall: str, *names: str) -> None:
    """Prints, in JSON, the rows of `run_suite`."""
    print(json.dumps(list(run_suite(wall, names))))


if __name__ == "__main__":
    main(*sys.argv[1:])
