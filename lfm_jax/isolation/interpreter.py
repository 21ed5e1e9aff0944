"""What a program behind a wall may read: the Python that runs it, without installed packages, and the system's libraries."""

import os
import sys
from pathlib import Path

# Not /usr as a whole: images keep applications under /usr/src and /usr/local.
_SYSTEM = (
    "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
# Sets and dictionaries are in the same order in every run, so that the same program says the same.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": ".", "TMPDIR": ".",
    # Each thread would reserve 64 MiB of address space for itself.
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
# No packages, nothing cached; the program's folder is where it imports from.
OPTIONS = ("-S", "-s", "-B")


def home() -> Path:
    """The folder of the interpreter behind this one, where this is one of a virtual environment."""
    return Path(sys.base_prefix).resolve()


def executable_in(python: Path) -> str:
    """The interpreter's file, where `home` is found as `python`."""
    return str(python / Path(sys._base_executable).resolve().relative_to(home()))


def readable(python: Path) -> list[str]:
    """Files and folders to be read and executed; python: where `home` will be found."""
    own = [str(python / name) for name in ("bin", "lib", "lib64") if (home() / name).exists()]
    return list(dict.fromkeys((*own, *filter(os.path.exists, _SYSTEM))))


def is_everybodys(path: Path) -> bool:
    """Whether a user who is nobody can reach it: others may pass through it and every folder above it."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))
