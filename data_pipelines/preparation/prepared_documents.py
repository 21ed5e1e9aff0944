"""The last pass: what stays goes to compressed files with a manifest, in the order of the source or of difficulty."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import zstandard
from etils import epath

from data_pipelines.sources.documents import Document

MANIFEST = "manifest.json"
# Buckets that are written at a time: each is an open file and a compressor, of some 2 MB.
_OPEN_BUCKETS = 256
# Buckets are read once and deleted.
_BUCKET_LEVEL = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """shard_bytes: of text (UTF-8), after which a file is closed. compression: level of zstandard, 1 to 19."""

    shard_bytes: int = 1 << 28
    compression: int = 6

    def __post_init__(self):
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, got {self.shard_bytes}")
        if not 1 <= self.compression <= 19:
            raise ValueError(f"compression must be 1 to 19, got {self.compression}")


class Kept(NamedTuple):
    """A document that stays. index: its number in the source. record: of the output, as a line of JSON. text_bytes: its size."""

    index: int
    record: bytes
    text_bytes: int


def record_of(document: Document, difficulty: float | None) -> bytes:
    """The line of the output: text, name and difficulty (bits per byte, four decimals)."""
    rounded = None if difficulty is None else round(float(difficulty), 4)
    # A name may hold bytes that are no UTF-8, which JSON can only spell.
    name = document.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    content = {"text": document.text, "name": name, "difficulty": rounded}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def write_prepared(kept: Iterable[Kept], folder: epath.Path, config: OutputConfig, about: dict[str, Any]) -> None:
    """Writes documents-NNNNN.jsonl.zst and the manifest into a folder.

    Args:
      about: what the manifest says besides the files, with their counts and SHA-256, and the totals.
    """
    files: list[dict[str, Any]] = []
    shard: _Shard | None = None
    for document in kept:
        if shard is None:
            shard = _Shard(folder / f"documents-{len(files):05}.jsonl.zst", config.compression)
        shard.add(document.record, document.text_bytes)
        if shard.text_bytes >= config.shard_bytes:
            files.append(shard.close())
            shard = None
    if shard is not None:
        files.append(shard.close())
    totals = {name: sum(file[name] for file in files) for name in ("documents", "text_bytes")}
    (folder / MANIFEST).write_text(json.dumps({**totals, "files": files, **about}, indent=2, ensure_ascii=False) + "\n")


class _Shard:
    """One file of the output."""

    def __init__(self, path: epath.Path, level: int):
        self.text_bytes = 0
        self._path, self._documents, self._bytes = path, 0, 0
        self._file = path.open("wb")
        self._frame = zstandard.ZstdCompressor(level, write_checksum=True).compressobj()
        self._sha256 = hashlib.sha256()

    def add(self, record: bytes, text_bytes: int) -> None:
        self._write(self._frame.compress(record))
        self._documents += 1
        self.text_bytes += text_bytes

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._bytes += len(content)

    def close(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        self._write(self._frame.flush())
        self._file.close()
        return {
            "file": self._path.name, "documents": self._documents, "text_bytes": self.text_bytes, "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
        }  # fmt: skip


def ordered(
    kept: Callable[[], Iterable[Kept]], scores: np.ndarray, sizes: np.ndarray, bucket_bytes: int, folder: epath.Path
) -> Iterator[Kept]:
    """The documents by score, those of one score by their number, with about `bucket_bytes` of them in memory.

    All scores are known, so each document's place is. The source is read and its documents are put into buckets on disk, each for
    a range of places; then one bucket after the other is sorted. Of more than 256 buckets, that many are made at a time and the
    source is read again for the next.

    Args:
      kept: starts to read the documents that stay, the same each time.
      scores: [documents] float32, of every document of the source; NaN where it does not stay.
      sizes: [documents] int64, bytes of each.
      folder: for the buckets, which are deleted as they are done.
    """
    stays = np.flatnonzero(~np.isnan(scores))
    places = stays[np.argsort(scores[stays], kind="stable")]
    buckets = np.full(len(scores), -1, np.int64)
    _, buckets[places] = np.unique((np.cumsum(sizes[places]) - sizes[places]) // bucket_bytes, return_inverse=True)
    for first in range(0, int(buckets.max(initial=-1)) + 1, _OPEN_BUCKETS):
        chosen = (buckets >= first) & (buckets < first + _OPEN_BUCKETS)
        paths = {bucket: folder / f"bucket-{bucket:05}" for bucket in np.unique(buckets[chosen])}
        _fill(kept(), buckets, paths)
        for path in paths.values():
            documents = sorted(_read(path), key=lambda document: (scores[document.index], document.index))
            path.unlink()
            yield from documents


def _fill(kept: Iterable[Kept], buckets: np.ndarray, paths: dict[int, epath.Path]) -> None:
    files, frames = {}, {}
    try:
        for bucket, path in paths.items():
            files[bucket] = path.open("wb")
            frames[bucket] = zstandard.ZstdCompressor(_BUCKET_LEVEL).compressobj()
        for document in kept:
            bucket = buckets[document.index]
            if bucket in paths:
                line = b"%d %d " % (document.index, document.text_bytes) + document.record
                files[bucket].write(frames[bucket].compress(line))
        for bucket, file in files.items():
            file.write(frames[bucket].flush())
    finally:
        for file in files.values():
            file.close()


def _read(path: epath.Path) -> Iterator[Kept]:
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as content:
        for line in io.BufferedReader(content):
            index, text_bytes, record = line.split(b" ", 2)
            yield Kept(int(index), record, int(text_bytes))
