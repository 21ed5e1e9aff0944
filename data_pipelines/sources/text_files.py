"""Texts in files of the usual formats, found and read as a stream, with every bad record named by file and line."""

import functools
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard
from etils import epath

from data_pipelines.sources.parquet_files import read_rows
from data_pipelines.sources.quarantine import Quarantine, good_records
from data_pipelines.sources.records import Fields, Record, parse_json, parse_values, parse_whole

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# A kilobyte of zstandard can stand for 32 MB.
_ZSTD_READ_BYTES = 1 << 12
_SKIP_BYTES = 1 << 20
# How files of a split are named on the Hugging Face hub: `train-00000-of-00002.parquet`, `test.jsonl`, `validation/0000.parquet`.
_SPLIT = re.compile(r"(train(ing)?|valid(ation)?|val|dev|test(ing)?|eval(uation)?)(?![a-z0-9])", re.IGNORECASE)


def find_text_files(source: epath.PathLike) -> list[tuple[str, epath.Path]]:
    """(name, path) of the files of a source that can be read, sorted by name.

    Args:
      source: a file, a folder (searched through and through), or a pattern, as in `books/train-*.zst` or `books/*/train-*.zst`.
        Names are relative to the folder that the source names or lies in, for a pattern the last one before the first `*`. In a
        folder, files of other kinds and hidden ones are passed over.
    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: there is, but no file of a kind that is read; or a folder that holds several splits of a dataset, which no one
        means to train on together. A pattern is taken at its word.
    """
    path = epath.Path(source)
    is_pattern = "*" in str(source)
    if is_pattern:
        root, candidates = _glob(path)
    elif path.is_dir():
        root, candidates = path, list(_walk(path))
    else:
        root, candidates = path.parent, [path] if path.exists() else []
    if not candidates:
        raise FileNotFoundError(f"source {str(source)!r} does not exist; give a file, a folder, or 'stdlib' for Python's own")
    found = sorted((file.relative_to(root).as_posix(), file) for file in candidates if file.name.endswith(SUFFIXES))
    if not found:
        names = ", ".join(file.name for file in candidates[:5])
        raise ValueError(f"source {str(source)!r} holds no file that can be read ({', '.join(SUFFIXES)}), but {names}")
    if not is_pattern:
        _check_splits(root, [name for name, file in found if not is_one_text(file)])
    return found


def is_one_text(path: epath.Path) -> bool:
    """Whether the file is one document, rather than a record each."""
    return path.name.endswith(".txt")


def read_records(
    path: epath.Path, name: str, fields: Fields, wanted: Callable[[int], bool] | None, quarantine: Quarantine | None
) -> Iterator[Record]:
    """The records of a file, read as they are asked for: a line, or some rows of a table, are in memory at a time.

    Args:
      path: a file with one of `SUFFIXES`. A .txt file is one text; blank lines of .jsonl are no records.
      name: of the file, for the quarantine.
      wanted: whether the record of a line or row, counted from 1, is read; None: all are.
      quarantine: takes the bad records.
    Raises:
      ValueError: a bad record and no quarantine, or a damaged file; the message names file and line.
    """
    if is_one_text(path):
        contents, parse = _read_whole(path, fields.max_bytes), parse_whole
    elif path.name.endswith(".parquet"):
        contents, parse = read_rows(path, fields, wanted), parse_values
    else:
        contents, parse = read_lines(path, fields.max_bytes, wanted), parse_json
    yield from good_records(contents, functools.partial(parse, fields=fields), path, name, quarantine)


def _glob(path: epath.Path) -> tuple[epath.Path, list[epath.Path]]:
    """The last folder before the pattern begins, and what matches."""
    if "**" in str(path):  # etils.epath has no such patterns
        raise ValueError(f"source {str(path)!r}: '**' is not understood; give the folder, all of which is read, or a '*' a level")
    parts = []
    while "*" in str(path):
        parts.insert(0, path.name)
        path = path.parent
    return path, list(path.glob("/".join(parts)))


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        yield from _walk(path) if path.is_dir() else [path]


def _check_splits(root: epath.Path, names: list[str]) -> None:
    """Refuses files that are of more than one split of a dataset."""
    splits = {}
    for name in names:
        *folders, file = name.split("/")
        match = _SPLIT.match(file) or next(filter(None, map(_SPLIT.fullmatch, folders)), None)
        if match:
            splits.setdefault(match[0], []).append(name)
    if len(splits) > 1:
        patterns = ", ".join(str(root / _pattern(split, files)) for split, files in sorted(splits.items()))
        raise ValueError(
            f"source {str(root)!r} holds several splits of a dataset, {', '.join(sorted(splits))}; name the one that is meant by "
            f"a pattern: {patterns}"
        )


def _pattern(split: str, names: list[str]) -> str:
    """A pattern that matches the files of a split, as far as they lie equally deep."""
    pattern = []
    for parts in zip(*(name.split("/") for name in names), strict=False):
        starts = all(part.startswith(split) for part in parts)
        pattern.append(parts[0] if len(set(parts)) == 1 else f"{split}*" if starts else "*")
    ends = {next(suffix for suffix in SUFFIXES if name.endswith(suffix)) for name in names}
    return "/".join(pattern) + (ends.pop() if pattern[-1].endswith("*") and len(ends) == 1 else "")


def _read_whole(path: epath.Path, limit: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield 1, file.read(limit + 1)


def read_lines(path: epath.Path, limit: int, wanted: Callable[[int], bool] | None) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are not blank; of a line that is longer than the limit, one byte more than that.

    Args:
      path: a file of lines, which may be compressed.
      wanted: whether a line, counted from 1, is given; None: all are.
    Raises:
      ValueError: a damaged file.
    """
    number = 0
    with path.open("rb") as raw:
        file = _decompress(raw, path.name)
        try:
            if file is not raw and path.stat().length == 0:
                raise EOFError("no byte is there")  # the readers take it for a text without lines
            while line := file.readline(limit + 1):
                number += 1
                blank = not line.strip()
                if len(line) > limit:
                    blank = _skip_line(file, line) and blank
                if not blank and (wanted is None or wanted(number)):
                    yield number, line
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{path}: damaged or cut off near line {number + 1} ({error}); fetch or write it again") from error


def _skip_line(file: BinaryIO, start: bytes) -> bool:
    """Reads on to the end of a line that has begun, without keeping it; whether the rest of it is blank."""
    blank = True
    while start and not start.endswith(b"\n"):
        start = file.readline(_SKIP_BYTES)
        blank = blank and not start.strip()
    return blank


def _decompress(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_ZstdReader(raw)) if name.endswith(".zst") else raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of zstandard frames. The package's own reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = None
        self._ready = memoryview(b"")  # of which a part costs no copy: of 4 KB there may come 128 MB

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer as far as one frame's next bytes go; raises EOFError inside a frame that does not end."""
        while not self._ready:
            if self._frame is None or self._frame.eof:
                compressed = (self._frame.unused_data if self._frame else b"") or self._raw.read(_ZSTD_READ_BYTES)
                if not compressed:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            elif not (compressed := self._raw.read(_ZSTD_READ_BYTES)):
                raise EOFError("a zstandard frame does not end")
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
