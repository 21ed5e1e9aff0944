"""Token shards written: documents tokenized into numbered files, and the folder that appears when all of them are there."""

import concurrent.futures
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from data_pipelines.sources.documents import Document
from data_pipelines.tokenization.token_shards import FORMAT, INDEX, TokenShards, lengths_file, read_token_shards, sha256_of
from data_pipelines.tokenization.tokenizer import Tokenizer

# A record by itself can be read without its neighbours; ids hardly compress, and reading them should cost nothing.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# What is tokenized at a time: enough for many cores, little beside the machine's memory.
_BATCH_CHARACTERS = 1 << 22
# Files that are copied at a time where folders cannot be renamed.
_COPIES = 16


def write_token_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: epath.PathLike,
    *,
    shard_tokens: int = 1 << 26,
    threads: int | None = None,
) -> TokenShards:
    """Tokenizes a stream of documents, in this process, into a new folder that appears when all of it is there.

    For the text of files, `tokenize_corpus` does the same on all cores and can be interrupted. The folder has one record a
    document in `tokens-00000-SSS.array_record`, their lengths in `lengths-00000-SSS.npy`, and `index.json` with the counts, the
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
    refuse_existing(folder)
    part = part_of(folder)
    if part.exists():
        part.rmtree()
    part.mkdir(parents=True)
    with _progress() as progress, ShardWriter(part, 0, tokenizer, shard_tokens) as writer:
        task = progress.add_task("tokenizing", total=None, figures="")
        write_documents(
            documents, tokenizer, writer, threads,
            lambda: progress.update(task, figures=f"{writer.documents:,} documents, {writer.tokens:,} tokens"),
        )  # fmt: skip
        counts = writer.finish()
    if not counts["documents"]:
        part.rmtree()
        raise ValueError("there is no document to tokenize")
    about = {"tokenizer": describe_tokenizer(tokenizer), "shard_tokens": shard_tokens}
    write_index(part, about, {**counts, "records": {"seen": counts["documents"], "bad": {}}})
    publish(part, folder)
    return read_token_shards(folder, tokenizer)


def refuse_existing(folder: epath.Path) -> None:
    """Raises a FileExistsError if token shards are there."""
    if last_written(folder).exists():
        raise FileExistsError(f"{folder} exists; read it with read_token_shards, or delete it to tokenize again")


def last_written(folder: epath.Path) -> epath.Path:
    """What is there when all of a published folder is: elsewhere than on disk, a folder without an index is being copied."""
    return folder / INDEX if is_remote(folder) else folder


def part_of(folder: epath.Path) -> epath.Path:
    """Where the folder grows."""
    return folder.parent / f".{folder.name}.part"


def is_remote(path: epath.Path) -> bool:
    """Whether it is not on disk."""
    return "://" in os.fspath(path)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the index says of it."""
    return {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest type that all ids fit into, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    writer: "ShardWriter",
    threads: int | None,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Tokenizes documents into a writer; while one batch of them is tokenized, the next is read.

    Args:
      threads: for the tokenizer; None: one for each core.
      report: called after each batch.
    """
    batches = _batches(documents)
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(next, batches, None)
        while batch := coming.result():
            coming = ahead.submit(next, batches, None)
            texts = [document.text for document in batch]
            for document, ids in zip(batch, tokenizer.encode_batch(texts, threads), strict=True):
                writer.add(ids, len(document.text.encode()), document.difficulty)
            report()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, disable=not sys.stderr.isatty(), transient=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `_BATCH_CHARACTERS`."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class ShardWriter:
    """Writes the documents of one unit of work to numbered files, each of which is closed when it is full: a context manager.

    Every file is written in a folder of this writer's own and appears under its name when it is whole, so that a writer that was
    killed, or two of the same unit at a time, harm nothing.

    documents, tokens: what was added so far. staging: the folder of this writer's own, on disk.
    """

    def __init__(self, folder: epath.Path, unit: int, tokenizer: Tokenizer, shard_tokens: int):
        """folder: exists; unit: number for the files' names; shard_tokens: a file is closed when it has this many ids."""
        self.documents = 0
        self.tokens = 0
        self._text_bytes = 0
        self._folder, self._unit, self._shard_tokens = folder, unit, shard_tokens
        self._dtype = dtype_for(tokenizer.vocab_size)
        self._shards: list[dict[str, Any]] = []
        self._file: array_record_module.ArrayRecordWriter | None = None
        self._lengths: list[int] = []
        self._difficulties: list[float] = []
        # array_record writes local files only.
        beside = None if is_remote(folder) else os.fspath(folder)
        self._staging = tempfile.TemporaryDirectory(prefix=f".unit-{unit:05}-", dir=beside)
        self.staging = epath.Path(self._staging.name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Removes what has not got its name."""
        with contextlib.suppress(RuntimeError):  # of a file that is thrown away
            if self._file is not None:
                self._file.close()
        self._staging.cleanup()

    def add(self, ids: list[int], text_bytes: int, difficulty: float | None = None) -> None:
        """Appends a document. text_bytes: of its text in UTF-8."""
        if self._file is None:
            self._shards.append({"file": f"tokens-{self._unit:05}-{len(self._shards):03}.array_record"})
            path = self.staging / self._shards[-1]["file"]
            self._file = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
            self._lengths, self._difficulties, self._room = [], [], self._shard_tokens
        self._file.write(np.asarray(ids, self._dtype).tobytes())
        self._lengths.append(len(ids))
        if difficulty is not None:
            self._difficulties.append(difficulty)
        self.documents += 1
        self.tokens += len(ids)
        self._text_bytes += text_bytes
        self._room -= len(ids)
        if self._room <= 0:
            self._close()

    def finish(self) -> dict[str, Any]:
        """Closes the last file; returns documents, tokens, text_bytes and the entries of the files for the index."""
        if self._file is not None:
            self._close()
        counts = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self._text_bytes}
        return {**counts, "dtype": self._dtype.str, "shards": self._shards}

    def place(self, name: str) -> None:
        """Gives a whole file of the staging folder its place."""
        place(self.staging / name, self._folder / name)

    def _close(self) -> None:
        self._file.close()
        self._file = None
        shard = self._shards[-1]
        file, lengths = shard["file"], lengths_file(shard["file"])
        with (self.staging / lengths).open("wb") as written:
            np.save(written, np.asarray(self._lengths, "<u4"))
        difficulty = math.fsum(self._difficulties) / len(self._difficulties) if self._difficulties else None
        shard |= {"documents": len(self._lengths), "tokens": sum(self._lengths), "difficulty": difficulty}
        shard |= {"bytes": (self.staging / file).stat().length, "sha256": sha256_of(self.staging / file)}
        shard |= {"lengths_sha256": sha256_of(self.staging / lengths)}
        self.place(lengths)
        self.place(file)


def place(local: epath.Path, target: epath.Path) -> None:
    """Moves a whole file from disk to where it belongs, which has all of it at once or nothing."""
    if is_remote(target):  # an object appears when all of it has arrived
        local.copy(target, overwrite=True)
        local.unlink()
    else:
        local.replace(target)


def write_index(part: epath.Path, about: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Writes the index.

    Args:
      about: how the shards were made: the tokenizer and whatever else decided their bytes.
      counts: as `ShardWriter.finish` gives them, of all units together.
    """
    write_whole(part / INDEX, json.dumps({"format": FORMAT, **about, **counts}, indent=2) + "\n")


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that appears when it is whole."""
    with tempfile.TemporaryDirectory(prefix=".unit-", dir=None if is_remote(path) else os.fspath(path.parent)) as staging:
        local = epath.Path(staging) / path.name
        local.write_text(text)
        place(local, path)


def publish(part: epath.Path, folder: epath.Path) -> None:
    """Lets a finished folder appear under its name; where folders cannot be renamed, file by file, the index last."""
    if not is_remote(folder):
        part.rename(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [path for path in part.iterdir() if path.name != INDEX]
    with concurrent.futures.ThreadPoolExecutor(_COPIES) as copies:
        list(copies.map(lambda path: path.copy(folder / path.name, overwrite=True), files))
    (part / INDEX).copy(folder / INDEX, overwrite=True)
    part.rmtree()
