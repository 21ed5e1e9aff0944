"""The wall of namespaces: bubblewrap (bwrap) with a root of its own, no network, no other processes, and our filter."""

import contextlib
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from lfm_jax.isolation import interpreter
from lfm_jax.isolation.plan import Plan
from lfm_jax.isolation.system_calls import filter_program

BOX = "/box"


class Bubblewrap:
    """Needs bubblewrap 0.5 and a kernel that gives user namespaces to ordinary users; as root, it is run as another user."""

    name = "bubblewrap"

    def missing(self) -> str:
        """Why it cannot start here, "" if nothing is known that speaks against it."""
        return "" if shutil.which("bwrap") else "bwrap is not installed (on Debian and Ubuntu: apt-get install bubblewrap)"

    @contextlib.contextmanager
    def plan(self, folder: Path, python: Path) -> Iterator[Plan]:
        """See `Wall`."""
        (folder / "filter").write_bytes(filter_program(platform.machine(), metadata=True, signals=True))
        with open(folder / "filter", "rb") as filter_, open(folder / "status", "wb") as status:
            command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--unshare-user", "--unshare-pid", "--unshare-ipc"]
            command += ["--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
            for path in interpreter.readable(python):
                command += ["--ro-bind", path, path]
            # Nothing else under /dev: a new one could be written to without limit, and /dev/zero be mapped as shared memory.
            for path in interpreter.DEVICES:
                command += ["--dev-bind", path, path]
            command += ["--bind", str(folder / "box"), BOX, "--chdir", BOX, "--remount-ro", "/"]
            command += ["--seccomp", str(filter_.fileno()), "--json-status-fd", str(status.fileno()), "--"]
            command.append(interpreter.executable_in(python))
            # One waits outside, and one inside is the first of its process namespace.
            yield Plan(command=command, filter=filter_.fileno(), status=status.fileno(), wall_processes=2)

    def started(self, folder: Path) -> bool:
        """See `Wall`; bwrap reports the end of a program only if it has begun it."""
        return b'"exit-code"' in (folder / "status").read_bytes()
