"""The SHA-256 of every file of an exported folder, in the format of `sha256sum`: safetensors has no checksum of its own.

It finds what was damaged or mixed up on the way. Whoever changes the files on purpose can change it as well.
"""

import hashlib
import re
from collections.abc import Mapping

from etils import epath

MANIFEST = "MANIFEST.sha256"
# What a model is read from; a manifest that is there must list all such files.
_READ = (".safetensors", ".json", ".model", ".jinja")
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_MOST_BYTES = 1 << 20
_ADVICE = "export or fetch the folder again"


def write_manifest(folder: epath.Path, digests: Mapping[str, str]) -> None:
    """Writes MANIFEST.sha256, so that `sha256sum -c MANIFEST.sha256` in the folder checks it.

    digests: SHA-256 of files that are known, by name; the others in the folder are read. Folders in it are none of its own.
    """
    files = [file for file in folder.iterdir() if file.name != MANIFEST and not file.is_dir()]
    found = {file.name: digests.get(file.name) or _sha256(file) for file in files}
    (folder / MANIFEST).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())))


def check_manifest(folder: epath.Path) -> None:
    """Compares a folder with its MANIFEST.sha256, which reads all of its files; does nothing where there is none.

    Raises:
      FileNotFoundError: a file that is listed is missing.
      ValueError: a file is not the one that was exported, or is not listed, or the manifest is damaged; the text names the file.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    listed = _read(manifest)
    unlisted = sorted(file.name for file in folder.iterdir() if file.name.endswith(_READ) and file.name not in listed)
    if unlisted:
        raise ValueError(f"{folder}: {unlisted[0]} is there, but {MANIFEST} does not list it; {_ADVICE}, or remove the file")
    for name, digest in listed.items():
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: {name} is missing, which {MANIFEST} lists; {_ADVICE}")
        _check(folder / name, digest)


def check_file(path: epath.PathLike) -> None:
    """Compares one file with the MANIFEST.sha256 beside it; does nothing where there is none, or it does not list the file.

    Raises:
      ValueError: it is not the one that was exported, or the manifest is damaged.
    """
    file = epath.Path(path)
    if (file.parent / MANIFEST).exists() and file.exists():
        digest = _read(file.parent / MANIFEST).get(file.name)
        if digest is not None:
            _check(file, digest)


def _check(file: epath.Path, digest: str) -> None:
    if _sha256(file) != digest:
        raise ValueError(
            f"{file.parent}: {file.name} is not the file that was exported (SHA-256); {_ADVICE}, or remove {MANIFEST} if the "
            "change is meant"
        )


def _read(manifest: epath.Path) -> dict[str, str]:
    """Digest by name."""
    size = manifest.stat().length
    if size > _MOST_BYTES:
        raise ValueError(f"{manifest} has {size} bytes, which is no list of a model's files; {_ADVICE}")
    listed = {}
    for number, line in enumerate(manifest.read_bytes().decode(errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{manifest}:{number}: expected a SHA-256, two spaces and a name, got {line!r:.100}; {_ADVICE}")
        if listed.setdefault(match[2], match[1]) != match[1]:
            raise ValueError(f"{manifest}:{number}: {match[2]} has two digests; {_ADVICE}")
    return listed


def _sha256(file: epath.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
