"""The manifest of a checkpoint, and the folder of one step: what makes it whole, and how to tell that it is."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import zlib
from typing import Any

from etils import epath
from etils.epath import backend

MANIFEST = "manifest.json"
STATE = "state"
VERIFIED = "verified"
_FORMAT = 2
_READ = (1, _FORMAT)  # 1: its large files have no digest
_PART = f"{MANIFEST}.part"
# Larger files hold values of arrays, which have fingerprints; the smaller ones say how to read them.
_SMALL_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
# A manifest of thousands of arrays and hosts has some millions; as objects of Python it is many times as large.
_MOST_BYTES = 1 << 26
# A request to an object store takes some 50 ms, and of hundreds of processes each has written a few files.
_THREADS = 32
# How TensorStore says that it could not reach a file, and the packages whose errors say so of a bucket.
_NOT_REACHED = re.compile(r"\b(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED)\b")
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")


class Unreachable(str):
    """What is wrong with a step whose files cannot be read now: of what is in them it says nothing."""


def encode(content: dict[str, Any]) -> bytes:
    """The manifest as its file has it. `digest`, the last entry, is of all the others."""
    digest = hashlib.sha256(json.dumps(content, indent=1, allow_nan=False).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, allow_nan=False).encode()


def commit(folder: epath.Path, content: dict[str, Any]) -> None:
    """Writes the manifest of the step in `folder`: with this, and not before, it is a checkpoint.

    To the content it adds the format and, under "files", size and digest of every file of Orbax's: SHA-256, and of large ones
    CRC-32, which takes an eighth of the time and misses no single bit. Of a large object in a bucket it has the size alone: the
    bucket keeps a digest, and reading it back would take as long as writing it did. On a local disk all these files are there
    for good before the manifest is, and it before this returns.
    """
    _flush(folder)
    data = encode({"format": _FORMAT, **content, "files": _describe(folder / STATE)})
    if _in_bucket(folder):
        (folder / MANIFEST).write_bytes(data)  # an object is there whole or not at all
        return
    (folder / _PART).write_bytes(data)
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
        if (folder / MANIFEST).stat().length > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        data = (folder / MANIFEST).read_bytes()
        content = json.loads(data)
        del content["digest"]
        sound = encode(content) == data and content["step"] == step
    except Exception as error:  # of what kind depends on the byte that is damaged, and in a bucket on the client
        return None, problem_of(MANIFEST, folder, error)
    if not sound:
        return None, f"{MANIFEST} is not as it was written for this step: its digest does not fit"
    if content["format"] not in _READ:
        raise ValueError(f"{folder / MANIFEST} has format {content['format']}, this code reads {_FORMAT}; take newer code")
    return content, None


def damaged_file(folder: epath.Path, files: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first of the files of a step that is not as its manifest says, None if nothing is.

    It comes before Orbax reads any of them: what a changed index or shape does to a reader nobody knows.
    """
    try:
        found = _found(folder / STATE)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            problems = list(pool.map(lambda name: _difference(found.get(name), files[name]), files))
    except Exception as error:  # a bucket's client has errors of its own
        return problem_of(f"{STATE}/", folder, error)
    return next((f"{STATE}/{name} {problem}" for name, problem in zip(files, problems, strict=True) if problem), None)


def problem_of(what: str, folder: epath.Path, error: BaseException) -> str:
    """That something of a step cannot be read; `Unreachable` if the error is of the way to it: no damage, and it may pass."""
    while error.__cause__ is not None:  # Orbax packs TensorStore's errors into its own
        error = error.__cause__
    client = type(error).__module__.partition(".")[0] in _CLIENTS or isinstance(error, OSError)
    reached = not isinstance(error, PermissionError) and not _NOT_REACHED.search(str(error))
    damaged = isinstance(error, FileNotFoundError) or reached and not (client and _in_bucket(folder))
    return (str if damaged else Unreachable)(f"{what} cannot be read: {short(error)}")


def look_anew(folder: epath.Path) -> None:
    """For a bucket: gcsfs remembers what it has listed, and what others, TensorStore among them, write later it does not see."""
    if _in_bucket(folder):
        backend.fsspec_backend.fs(folder).invalidate_cache()


def remove(folder: epath.Path) -> None:
    """Removes a step, the manifest first, so that half of it is never taken for whole; what is not of ours stays."""
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):  # in a bucket a folder goes with the last file in it
        for entry in folder.iterdir():
            if entry.name in (_PART, VERIFIED):
                entry.unlink()
            elif entry.name == STATE or entry.name.startswith(f"{STATE}."):
                entry.rmtree()
        if not any(folder.iterdir()):
            folder.rmdir()


def free_bytes(folder: epath.Path) -> int | None:
    """Of the local disk that an existing folder is on, for an ordinary user; None for object stores."""
    if _in_bucket(folder):
        return None
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def short(error: BaseException) -> str:
    """The beginning of an error; those of the libraries underneath can fill pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _sha256(file: epath.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _crc32(file: epath.Path) -> str:
    value = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


_DIGESTS = {"sha256": _sha256, "crc32": _crc32}


def _describe(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Size and digest (see `commit`) of all files in a folder, at whatever depth, by their path in it."""

    def describe(file: epath.Path) -> dict[str, Any]:
        size = file.stat().length
        kind = "sha256" if size <= _SMALL_BYTES else None if _in_bucket(folder) else "crc32"
        return {"bytes": size} | ({kind: _DIGESTS[kind](file)} if kind else {})

    files = _found(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(describe, files.values()), strict=True))


def _difference(file: epath.Path | None, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    if file is None:
        return "is missing"
    size = file.stat().length
    if size != expected["bytes"]:
        return f"has {size} bytes, and {expected['bytes']} were written"
    wrong = (kind for kind, digest in _DIGESTS.items() if kind in expected and digest(file) != expected[kind])
    return next((f"is not as it was written: its {kind} does not fit" for kind in wrong), None)


def _found(folder: epath.Path) -> dict[str, epath.Path]:
    look_anew(folder)
    return {file.relative_to(folder).as_posix(): file for file in _files(folder)}


def _in_bucket(folder: epath.Path) -> bool:
    return "://" in os.fspath(folder)


def _files(folder: epath.Path) -> list[epath.Path]:
    return [file for entry in sorted(folder.iterdir()) for file in (_files(entry) if entry.is_dir() else [entry])]


def _flush(folder: epath.Path, *, deep: bool = True) -> None:
    """fsync of a local folder and, if deep, of all in it: Orbax leaves that out for its folders and small files."""
    if _in_bucket(folder):
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
