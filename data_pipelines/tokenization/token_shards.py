"""Documents as ids on disk: ArrayRecord files with an index, read at random."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from data_pipelines.sources.documents import Document
from data_pipelines.tokenization.tokenizer import Tokenizer

INDEX = "index.json"
LENGTHS = "lengths.npy"
_FORMAT = 1
# A record by itself can be read without its neighbours; ids hardly compress, and reading them should cost nothing.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# What is tokenized at a time: enough for every core, little beside the machine's memory.
_BATCH_BYTES = 1 << 23
_REMAKE = "delete the folder and tokenize again"


class _Records(NamedTuple):
    """All records of one file, in the form in which array_record takes it without opening the file."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TokenShards:
    """A tokenized text: a sequence of documents, each an array of ids without special symbols. Can be pickled.

    documents, tokens, text_bytes: their number, that of their ids and of the bytes of the text in UTF-8. lengths: [documents]
    int64, ids of each document. vocab_size: ids are below it. fingerprint: of all ids, and of the tokenizer that made them.
    """

    def __init__(self, folder: epath.Path, index: dict[str, Any], lengths: np.ndarray):
        """folder, index, lengths: as `read_token_shards` has checked them."""
        self.documents: int = index["documents"]
        self.tokens: int = index["tokens"]
        self.text_bytes: int = index["text_bytes"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.lengths = lengths
        self.fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
        self._folder = folder
        self._dtype = np.dtype(index["dtype"])
        files = [
            _Records(os.fspath(folder / shard["file"]), 0, shard["documents"], shard["documents"]) for shard in index["shards"]
        ]
        self._records = array_record_data_source.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        """The number of documents."""
        return self.documents

    def __getitem__(self, document: int) -> np.ndarray:
        """The ids of a document, [length] uint16 or uint32.

        Raises:
          IndexError: there is no such document.
          ValueError: its record is damaged.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        try:
            ids = np.frombuffer(self._records[int(document)], self._dtype)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self._folder}: document {document} cannot be read ({error}); {_REMAKE}") from error
        if len(ids) != self.lengths[document]:
            raise ValueError(
                f"{self._folder}: document {document} has {len(ids)} ids, {self.lengths[document]} by {LENGTHS}; {_REMAKE}"
            )
        return ids


def write_token_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: epath.PathLike,
    *,
    shard_tokens: int = 1 << 26,
    threads: int | None = None,
) -> TokenShards:
    """Tokenizes a stream of documents into a new folder, which appears under its name only when all of it is there.

    The folder has one record a document in `tokens-NNNNN.array_record`, `lengths.npy`, and `index.json` with the counts, the
    tokenizer's fingerprint and a SHA-256 of each file. Its bytes do not depend on the number of threads.

    Args:
      documents: read once; what is in memory at a time is a few megabytes.
      folder: must not exist; what an interrupted run has left beside it is removed.
      shard_tokens: a file is closed when it has this many ids.
      threads: for the tokenizer; None: one for each core.
    Raises:
      FileExistsError: the folder is there already.
      ValueError: there is no document, or `shard_tokens` is not positive.
    """
    folder = epath.Path(folder)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, got {shard_tokens}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; read it with read_token_shards, or delete it to tokenize again")
    part = folder.parent / f".{folder.name}.part"
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    writer = _ShardWriter(part, np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"), shard_tokens)
    with writer, _progress() as progress:
        task = progress.add_task("tokenizing", total=None, figures="")
        for batch in _batches(documents):
            for text, ids in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
                writer.add(ids, len(text.encode()))
            progress.update(task, figures=f"{len(writer.lengths):,} documents, {writer.tokens:,} tokens")
    if not writer.lengths:
        part.rmtree()
        raise ValueError("there is no document to tokenize")
    writer.finish(tokenizer)
    part.rename(folder)
    return read_token_shards(folder, tokenizer)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, disable=not sys.stderr.isatty(), transient=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """The texts, in groups of about `_BATCH_BYTES`."""
    batch, size = [], 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Writes records to numbered files, each of which is closed when it is full."""

    def __init__(self, folder: epath.Path, dtype: np.dtype, shard_tokens: int):
        self.lengths: list[int] = []
        self.tokens = 0
        self._text_bytes = 0
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: array_record_module.ArrayRecordWriter | None = None
        # array_record writes local files only.
        self._staging = tempfile.TemporaryDirectory() if _is_remote(folder) else None

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._close()
        if self._staging is not None:
            self._staging.cleanup()

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Appends a document."""
        if self._file is None:
            self._shards.append({"file": f"tokens-{len(self._shards):05}.array_record", "documents": 0, "tokens": 0})
            self._file = array_record_module.ArrayRecordWriter(os.fspath(self._local()), _WRITER_OPTIONS)
        shard = self._shards[-1]
        self._file.write(np.asarray(ids, self._dtype).tobytes())
        self.lengths.append(len(ids))
        self.tokens += len(ids)
        self._text_bytes += text_bytes
        shard["documents"] += 1
        shard["tokens"] += len(ids)
        if shard["tokens"] >= self._shard_tokens:
            self._close()

    def finish(self, tokenizer: Tokenizer) -> None:
        """Writes the lengths and, last, the index."""
        with (self._folder / LENGTHS).open("wb") as file:
            np.save(file, np.asarray(self.lengths, np.int64))
        index = {
            "format": _FORMAT,
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "text_bytes": self._text_bytes,
            "dtype": self._dtype.str,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
            "lengths_sha256": _sha256(self._folder / LENGTHS),
            "shards": self._shards,
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _local(self) -> Path:
        return Path(self._folder if self._staging is None else self._staging.name) / self._shards[-1]["file"]

    def _close(self) -> None:
        self._file.close()
        self._file = None
        local, shard = self._local(), self._shards[-1]
        shard |= {"bytes": local.stat().st_size, "sha256": _sha256(epath.Path(local))}
        if self._staging is not None:
            epath.Path(local).copy(self._folder / local.name)
            local.unlink()


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_token_shards(folder: epath.PathLike, tokenizer: Tokenizer | None = None, *, check_contents: bool = False) -> TokenShards:
    """Opens what `write_token_shards` has written.

    Args:
      tokenizer: the one that the ids are meant for.
      check_contents: also compare the SHA-256 of every file, which reads all of it. A damaged record is noticed anyway, when it
        is read.
    Raises:
      FileNotFoundError: there is no such folder, or it lacks a file.
      ValueError: another tokenizer made the ids, a file is damaged, or counts differ; the message names the file.
    """
    folder = epath.Path(folder)
    if not (folder / INDEX).exists():
        raise FileNotFoundError(f"{folder / INDEX} does not exist: no tokenized text is there, or a part of one; {_REMAKE}")
    index = json.loads((folder / INDEX).read_text())
    if index.get("format") != _FORMAT:
        raise ValueError(f"{folder / INDEX} is of format {index.get('format')!r}, this version reads {_FORMAT}; {_REMAKE}")
    if tokenizer is not None and index["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was tokenized with another tokenizer ({index['tokenizer']['vocab_size']} ids, fingerprint "
            f"{index['tokenizer']['fingerprint'][:12]}) than the given one ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:12]}), so its ids mean something else; {_REMAKE}"
        )
    for shard in index["shards"]:
        _check_shard(folder / shard["file"], shard, check_contents)
    return TokenShards(folder, index, _read_lengths(folder, index))


def _check_shard(path: epath.Path, shard: dict[str, Any], check_contents: bool) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {_REMAKE}")
    size = path.stat().length
    if size != shard["bytes"]:
        raise ValueError(f"{path} has {size} bytes, {shard['bytes']} by {INDEX}; {_REMAKE}")
    # A truncated file can say that it holds nothing.
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMAKE}") from error
    if count != shard["documents"]:
        raise ValueError(f"{path} has {count} records, {shard['documents']} by {INDEX}; {_REMAKE}")
    if check_contents and _sha256(path) != shard["sha256"]:
        raise ValueError(f"{path} has changed since it was written (SHA-256); {_REMAKE}")


def _read_lengths(folder: epath.Path, index: dict[str, Any]) -> np.ndarray:
    path = folder / LENGTHS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {_REMAKE}")
    if _sha256(path) != index["lengths_sha256"]:
        raise ValueError(f"{path} has changed since it was written (SHA-256); {_REMAKE}")
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)
