"""Texts in files of the usual formats, read as a stream, with every bad record named by file and line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard
from etils import epath

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# What one text may take: a line without an end would otherwise be read whole, however long.
MAX_TEXT_BYTES = 1 << 26
# A kilobyte of zstandard can stand for 32 MB.
_ZSTD_READ_BYTES = 1 << 12
_PARQUET_ROWS = 256


def find_text_files(source: epath.PathLike) -> list[tuple[str, epath.Path]]:
    """(name, path) of the files of a source that can be read, sorted by name.

    Args:
      source: a file, a folder (searched through and through), or a pattern in the last part of a path, as in `books/train-*.zst`.
        Names are relative to the folder that the source names or lies in. In a folder, files of other kinds and hidden ones are
        passed over.
    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: there is, but no file of a kind that is read.
    """
    path = epath.Path(source)
    if "*" in path.name:
        root, candidates = path.parent, sorted(path.parent.glob(path.name))
    elif path.is_dir():
        root, candidates = path, list(_walk(path))
    else:
        root, candidates = path.parent, [path]
    if not candidates or not all(candidate.exists() for candidate in candidates):
        raise FileNotFoundError(f"source {str(source)!r} does not exist; give a file, a folder, or 'stdlib' for Python's own")
    found = [file for file in candidates if file.name.endswith(SUFFIXES)]
    if not found:
        names = ", ".join(file.name for file in candidates[:5])
        raise ValueError(f"source {str(source)!r} holds no file that can be read ({', '.join(SUFFIXES)}), but {names}")
    return sorted((file.relative_to(root).as_posix(), file) for file in found)


def is_one_text(path: epath.Path) -> bool:
    """Whether the file is one document, rather than a record each."""
    return path.name.endswith(".txt")


def read_texts(path: epath.Path, text_field: str) -> Iterator[tuple[int, str]]:
    """(line or row, counted from 1; text) of every record of a file.

    Args:
      path: a file with one of `SUFFIXES`. A .txt file is one text; blank lines of .jsonl are no records.
      text_field: the field (column) that holds the text.
    Raises:
      ValueError: a record that is no UTF-8 or no JSON object, whose text is missing, empty or no string, a text or line longer
        than `MAX_TEXT_BYTES`, or a damaged file; the message names file and line.
    """
    if is_one_text(path):
        records = _read_whole(path)
    elif path.name.endswith(".parquet"):
        records = _read_parquet(path, text_field)
    else:
        records = _read_jsonl(path, text_field)
    for index, text in records:
        if not text:
            raise ValueError(f"{path}:{index}: the text is empty; remove the record")
        yield index, text


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        yield from _walk(path) if path.is_dir() else [path]


def _read_whole(path: epath.Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path}: more than {MAX_TEXT_BYTES} bytes are one text; split the file, or write a .jsonl of its parts")
    yield 1, _decode(content, f"{path}:1")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: no UTF-8 ({error.reason} at byte {error.start}); convert or remove the record") from error


def _read_jsonl(path: epath.Path, text_field: str) -> Iterator[tuple[int, str]]:
    number = 0
    with path.open("rb") as raw:
        file = _decompress(raw, path.name)
        while True:
            number += 1
            try:
                line = file.readline(MAX_TEXT_BYTES + 1)
            except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                raise ValueError(f"{path}: damaged or cut off near line {number} ({error}); fetch or write it again") from error
            if not line:
                return
            if len(line) > MAX_TEXT_BYTES:
                raise ValueError(f"{path}:{number}: the line is longer than {MAX_TEXT_BYTES} bytes; split the record")
            if line.strip():
                yield number, _text_of(line, text_field, f"{path}:{number}")


def _decompress(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_ZstdReader(raw)) if name.endswith(".zst") else raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of zstandard frames. The package's own reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = None
        self._ready = b""

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
            self._ready = self._frame.decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _text_of(line: bytes, text_field: str, where: str) -> str:
    text = _decode(line, where)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}); repair or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with the field {text_field!r}, got {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"{where}: there is no field {text_field!r}, but {_names(record)}; set text_field to the text's")
    return _checked(record[text_field], text_field, where)


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none at all"


def _checked(text: Any, text_field: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_field!r} is {type(text).__name__}, not text; set text_field to the field with the text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON
        raise ValueError(f"{where}: {text_field!r} is no UTF-8 ({error.reason}); repair or remove the record") from error
    return text


def _read_parquet(path: epath.Path, text_field: str) -> Iterator[tuple[int, str]]:
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            if text_field not in file.schema_arrow.names:
                raise ValueError(
                    f"{path}: there is no column {text_field!r}, but {_names(file.schema_arrow.names)}; set text_field "
                    "to the text's"
                )
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(text_field).to_pylist():
                    number += 1
                    yield number, _checked(text, text_field, f"{path}:{number}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no Parquet file, or a damaged one ({error}); fetch or write it again") from error
