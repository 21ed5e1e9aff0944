"""The wall that needs nothing installed and no namespaces: landlock for files, seccomp for the rest, a supervisor at the end."""

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

from lfm_jax.isolation import interpreter
from lfm_jax.isolation.plan import Plan
from lfm_jax.isolation.system_calls import filter_program

_CREATE_RULESET, _ADD_RULE = 444, 445
_VERSION_FLAG = 1
_PATH_BENEATH = 1
# Rights to files, in the order of their bits, with the version of the interface that brought them (linux/landlock.h).
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
_MAKE_DEVICES_AND_SOCKETS = 1 << 6 | 1 << 9 | 1 << 11  # MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_ALL_NETWORK, _ALL_SCOPES = 3, 3  # TCP bind and connect since 4; abstract Unix sockets and signals since 6
_FIRST_WITH_NETWORK, _FIRST_WITH_SCOPES = 4, 6
_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Version of the kernel's landlock, 0 without one; 7 is of Linux 6.15."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG))


class Landlock:
    """Needs Linux 5.13 with landlock. As root, a program gets a user of its own."""

    name = "landlock"

    def missing(self) -> str:
        """Why it cannot start here, "" if nothing is known that speaks against it."""
        return "" if version() else "the kernel has no landlock (CONFIG_SECURITY_LANDLOCK, and landlock in the list lsm=)"

    @contextlib.contextmanager
    def plan(self, folder: Path, python: Path) -> Iterator[Plan]:
        """See `Wall`."""
        shares_user = os.geteuid() != 0
        # As the user that everything belongs to, a program could change the permissions of any file, and signal every process.
        program = filter_program(
            platform.machine(), metadata=not shares_user, signals=not shares_user or version() >= _FIRST_WITH_SCOPES
        )
        (folder / "filter").write_bytes(program)
        ruleset = _ruleset(folder / "box")
        try:
            with open(folder / "filter", "rb") as filter_:
                yield Plan(command=[interpreter.executable_in(python)], filter=filter_.fileno(), ruleset=ruleset)
        finally:
            os.close(ruleset)

    def started(self, folder: Path) -> bool:
        """See `Wall`; the supervisor itself says when a program without a wall's process was not begun."""
        return True


def _ruleset(box: Path) -> int:
    """A descriptor of the rules: everything in `box`, to read and execute what the interpreter needs, nothing else."""
    abi = version()
    every = (1 << _FILE_RIGHTS[max(since for since in _FILE_RIGHTS if since <= abi)]) - 1
    fields = [every]
    if abi >= _FIRST_WITH_NETWORK:
        fields.append(_ALL_NETWORK)
    if abi >= _FIRST_WITH_SCOPES:
        fields.append(_ALL_SCOPES)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _check(_libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    try:
        # A program in the box that may be executed and not read would hide from the guard what it writes.
        _allow(ruleset, box, every & ~(_EXECUTE | _MAKE_DEVICES_AND_SOCKETS | _IOCTL_DEVICE))
        for path in interpreter.readable(interpreter.home()):
            _allow(ruleset, Path(path), _EXECUTE | _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
        for path in interpreter.DEVICES:
            _allow(ruleset, Path(path), every & (_READ_FILE | _WRITE_FILE | _TRUNCATE) if path == "/dev/null" else _READ_FILE)
    except BaseException:
        os.close(ruleset)
        raise
    return ruleset


def _allow(ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, descriptor)
        _check(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return result
