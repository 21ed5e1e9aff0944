"""The manifest of a checkpoint, and the folder of one step: what makes it whole, and how to tell that it is."""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from etils import epath

MANIFEST = "manifest.json"
STATE = "state"
VERIFIED = "verified"
_FORMAT = 1
_PART = f"{MANIFEST}.part"
# Larger files hold values of arrays, which have fingerprints; the smaller ones say how to read them.
_SMALL_BYTES = 1 << 20
# A request to an object store takes some 50 ms, and of hundreds of processes each has written a few files.
_THREADS = 32


def encode(content: dict[str, Any]) -> bytes:
    """The manifest as its file has it. `digest`, the last entry, is of all the others."""
    digest = hashlib.sha256(json.dumps(content, indent=1, allow_nan=False).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, allow_nan=False).encode()


def commit(folder: epath.Path, content: dict[str, Any]) -> None:
    """Writes the manifest of the step in `folder`: with this, and not before, it is a checkpoint.

    To the content it adds the format and, under "files", size and SHA-256 of every file of Orbax's (of large ones the size only).
    On a local disk all these files are there for good before the manifest is, and it before this returns.
    """
    _flush(folder)
    content = {"format": _FORMAT, **content, "files": _describe(folder / STATE)}
    (folder / _PART).write_bytes(encode(content))
    _flush(folder)
    (folder / _PART).replace(folder / MANIFEST)
    _flush(folder)
    _flush(folder.parent, deep=False)


def read(folder: epath.Path, step: int) -> tuple[dict[str, Any] | None, str | None]:
    """(content, None), or (None, what is wrong): the file must be what encoding its content gives, to the byte.

    Raises:
      ValueError: it is sound, and of another format.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        content = json.loads(data)
        del content["digest"]
        sound = encode(content) == data and content["step"] == step
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{MANIFEST} cannot be read: {short(error)}"
    if not sound:
        return None, f"{MANIFEST} is not as it was written for this step: its digest does not fit"
    if content["format"] != _FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {content['format']}, this code reads {_FORMAT}; take newer code")
    return content, None


def damaged_file(folder: epath.Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first of the files of a step that is not as its manifest says, None if nothing is.

    It comes before Orbax reads any of them: what a changed index or shape does to a reader nobody knows.
    """
    try:
        found = _describe(folder / STATE)
    except OSError as error:
        return f"{STATE}/ cannot be read: {short(error)}"
    for name, expected in files.items():
        if name not in found:
            return f"{STATE}/{name} is missing"
        if found[name]["bytes"] != expected["bytes"]:
            return f"{STATE}/{name} has {found[name]['bytes']} bytes, and {expected['bytes']} were written"
        if found[name] != expected:
            return f"{STATE}/{name} is not as it was written: its SHA-256 does not fit"
    return None


def remove(folder: epath.Path) -> None:
    """Removes a step, the manifest first, so that half of it is never taken for whole; what is not of ours stays."""
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name in (_PART, VERIFIED):
            entry.unlink()
        elif entry.name == STATE or entry.name.startswith(f"{STATE}."):
            entry.rmtree()
    if not any(folder.iterdir()):
        folder.rmdir()


def free_bytes(folder: epath.Path) -> int | None:
    """Of the local disk that an existing folder is on, for an ordinary user; None for object stores."""
    if "://" in os.fspath(folder):
        return None
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def short(error: Exception) -> str:
    """The beginning of an error; those of the libraries underneath can fill pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _describe(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Size and, of small files, digest of all files in a folder, at whatever depth, by their path in it."""

    def describe(file: epath.Path) -> dict[str, Any]:
        size = file.stat().length
        return {"bytes": size} | ({"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if size <= _SMALL_BYTES else {})

    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(describe, files)
        return {file.relative_to(folder).as_posix(): entry for file, entry in zip(files, described, strict=True)}


def _files(folder: epath.Path) -> list[epath.Path]:
    return [file for entry in sorted(folder.iterdir()) for file in (_files(entry) if entry.is_dir() else [entry])]


def _flush(folder: epath.Path, *, deep: bool = True) -> None:
    """fsync of a local folder and, if deep, of all in it: Orbax leaves that out for its folders and small files."""
    if "://" in os.fspath(folder):
        return
    for entry in folder.iterdir() if deep else ():
        if entry.is_dir():
            _flush(entry)
        else:
            _fsync(entry)
    _fsync(folder)


def _fsync(path: epath.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
