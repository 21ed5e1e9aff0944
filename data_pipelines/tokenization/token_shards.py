"""Documents as ids on disk, read at random: ArrayRecord files, beside each the lengths of its documents, and one index."""

import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from data_pipelines.tokenization.tokenizer import Tokenizer

INDEX = "index.json"
FORMAT = 2
# Files that a process has open at a time, of maybe 15,000: a reader takes about 8 bytes a document, and so do its lengths.
_OPEN_FILES = 64
# As array_record's own data source opens files: nothing is read ahead of what is asked for.
_READER_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
# An index of a million files is larger. JSON takes up to 24 times its bytes as objects of Python.
_MOST_INDEX_BYTES = 1 << 26
_DTYPES = ("<u2", "<u4")
_FILE = re.compile(r"tokens-[0-9]{5,9}-[0-9]{3,9}\.array_record")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REMAKE = "delete the folder and tokenize again"


class Shard(NamedTuple):
    """A file of documents, its number of documents and that of their ids.

    difficulty: the mean over the documents that have one; None: none has.
    """

    file: str
    documents: int
    tokens: int
    difficulty: float | None


class TokenShards:
    """A tokenized text: a sequence of documents, each an array of ids without special symbols. Can be pickled, used by threads.

    A file is checked when it is opened: that it is there, has the size and the number of records that the index gives, and its
    lengths the SHA-256; so opening the whole costs the same whatever its size. Few files are kept open.

    folder: where it lies. shards: its files. documents, tokens, text_bytes: their number, that of their ids and of the bytes of
    the text in UTF-8. bad_records: how many could not be read and are in `quarantine.jsonl`. vocab_size: ids are below it.
    made_of: what the index says of the text they were made of. fingerprint: of all ids, and of the tokenizer that made them.
    """

    def __init__(self, folder: epath.Path, index: dict[str, Any]):
        """folder, index: as `read_token_shards` has checked them."""
        self.folder = folder
        self.shards = tuple(Shard(*(entry[field] for field in Shard._fields)) for entry in index["shards"])
        self.documents: int = index["documents"]
        self.tokens: int = index["tokens"]
        self.text_bytes: int = index["text_bytes"]
        self.bad_records = sum(index["records"]["bad"].values())
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.made_of = {name: index.get(name) for name in ("source", "split", "source_files")}
        self.fingerprint = _fingerprint(index)
        self._index = index
        self._dtype = np.dtype(index["dtype"])
        self._ends = np.cumsum([shard.documents for shard in self.shards])
        # Not methods: a cache of these would keep the readers of a forgotten object open.
        self._reader = functools.lru_cache(_OPEN_FILES)(functools.partial(_open_records, folder, index["shards"]))
        self._lengths = functools.lru_cache(_OPEN_FILES)(functools.partial(_open_lengths, folder, index["shards"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, (self.folder, self._index)

    def __len__(self) -> int:
        """The number of documents."""
        return self.documents

    def __getitem__(self, document: int) -> np.ndarray:
        """The ids of a document of the whole, counted through all files: as `read`."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        shard = int(np.searchsorted(self._ends, document, side="right"))
        return self.read(shard, int(document) - int(self._ends[shard]) + self.shards[shard].documents)

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, ids of each document of the whole; of a large corpus better file by file, with `lengths_of`."""
        return np.concatenate([self._lengths(shard) for shard in range(len(self.shards))])

    def lengths_of(self, shard: int) -> np.ndarray:
        """[documents] int64, not to be written to: ids of each document of a file.

        Raises:
          FileNotFoundError: its file of lengths is missing.
          ValueError: that file is damaged.
        """
        return self._lengths(shard)

    def read(self, shard: int, document: int) -> np.ndarray:
        """The ids of a document of a file: as `read_many`, which is faster for several."""
        return self.read_many(shard, [document])[0]

    def read_many(self, shard: int, documents: Sequence[int]) -> list[np.ndarray]:
        """The ids of documents of one file, in any order: [length] uint16 or uint32 each.

        Raises:
          IndexError: there is no such document in the file.
          FileNotFoundError: the file, or that of its lengths, is missing.
          ValueError: the file is damaged; the message names it and the document.
        """
        documents = [int(document) for document in documents]
        name, count = self.shards[shard].file, self.shards[shard].documents
        for document in documents:
            if not 0 <= document < count:
                raise IndexError(f"document {document} of {count} in {name}")
        lengths = self._lengths(shard)
        try:
            # Of an empty list, array_record makes the next record.
            records = self._reader(shard).read(documents) if documents else []
            found = [np.frombuffer(record, self._dtype) for record in records]
        except (RuntimeError, ValueError) as error:
            if len(documents) > 1:  # one of them
                return [self.read(shard, document) for document in documents]
            raise ValueError(f"{self.folder / name}: document {documents[0]} cannot be read ({error}); {_REMAKE}") from error
        for document, ids in zip(documents, found, strict=True):
            if len(ids) != lengths[document]:
                raise ValueError(
                    f"{self.folder / name}: document {document} has {len(ids)} ids, {lengths[document]} by "
                    f"{lengths_file(name)}; {_REMAKE}"
                )
        return found


def read_token_shards(folder: epath.PathLike, tokenizer: Tokenizer | None = None, *, check_contents: bool = False) -> TokenShards:
    """Opens a folder of token shards; only its index is read, see `TokenShards`.

    Args:
      tokenizer: the one that the ids are meant for.
      check_contents: also compare the SHA-256 of every file, which reads all of it. A damaged record is noticed anyway, when it
        is read.
    Raises:
      FileNotFoundError: there is no such folder, or it lacks a file.
      ValueError: another tokenizer made the ids, a file is damaged, or counts differ; the message names the file.
    """
    folder = epath.Path(folder)
    index = _read_index(folder / INDEX)
    if tokenizer is not None and index["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(
            f"{folder} was tokenized with another tokenizer ({index['tokenizer']['vocab_size']} ids, fingerprint "
            f"{index['tokenizer']['fingerprint'][:12]}) than the given one ({tokenizer.vocab_size} ids, fingerprint "
            f"{tokenizer.fingerprint[:12]}), so its ids mean something else; {_REMAKE}"
        )
    for shard, entry in enumerate(index["shards"] if check_contents else []):
        _open_records(folder, index["shards"], shard)
        _open_lengths(folder, index["shards"], shard)
        if sha256_of(folder / entry["file"]) != entry["sha256"]:
            raise ValueError(f"{folder / entry['file']} has changed since it was written (SHA-256); {_REMAKE}")
    return TokenShards(folder, index)


def lengths_file(file: str) -> str:
    """The name of the file with the lengths of a shard's documents."""
    return file.replace("tokens", "lengths", 1).replace(".array_record", ".npy")


def sha256_of(path: epath.Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: no tokenized text is there, or a part of one; {_REMAKE}")
    size = path.stat().length
    if size > _MOST_INDEX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {_MOST_INDEX_BYTES}: it is damaged; {_REMAKE}")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMAKE}") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {type(index).__name__}; {_REMAKE}")
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {index.get('format')!r:.100}, this version reads {FORMAT}; {_REMAKE}")
    wrong = _wrong_field(index)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong} is missing or no sound value; {_REMAKE}")
    for count in ("documents", "tokens"):
        total = sum(entry[count] for entry in index["shards"])
        if total != index[count]:
            raise ValueError(f"{path} is damaged: it gives {index[count]} {count}, its files have {total}; {_REMAKE}")
    return index


def _wrong_field(index: dict[str, Any]) -> str | None:
    """The first field of an index that is not what it must be, of those that are read; None: all are."""
    is_count = lambda value: type(value) is int and 0 <= value < 1 << 63
    is_number = lambda value: value is None or type(value) in (int, float) and math.isfinite(value)
    is_text = lambda pattern: lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None
    counts = dict.fromkeys(("documents", "tokens"), is_count)
    entry = counts | {"bytes": is_count, "difficulty": is_number, "file": is_text(_FILE)}
    entry |= dict.fromkeys(("sha256", "lengths_sha256"), is_text(_DIGEST))
    parts = [
        ("", index, counts | {"text_bytes": is_count, "dtype": _DTYPES.__contains__}),
        ("tokenizer.", index.get("tokenizer"), {"vocab_size": is_count, "fingerprint": is_text(re.compile(".+"))}),
        ("records.", index.get("records"), {"bad": lambda bad: isinstance(bad, dict) and all(map(is_count, bad.values()))}),
    ]
    shards = index.get("shards")
    if not isinstance(shards, list):
        return "shards"
    parts += [(f"shards[{number}].", shard, entry) for number, shard in enumerate(shards)]
    for where, part, fields in parts:
        for name, is_sound in fields.items():
            if not (isinstance(part, dict) and name in part and is_sound(part[name])):
                return where + name
    return "shards: a file that is there twice" if len({shard["file"] for shard in shards}) < len(shards) else None


def _fingerprint(index: dict[str, Any]) -> str:
    """SHA-256 of what the ids depend on, not of where the text lay."""
    shards = [[entry["documents"], entry["sha256"], entry["lengths_sha256"]] for entry in index["shards"]]
    return hashlib.sha256(json.dumps([index["dtype"], index["tokenizer"], shards], sort_keys=True).encode()).hexdigest()


def _open_records(folder: epath.Path, entries: list[dict[str, Any]], shard: int) -> array_record_module.ArrayRecordReader:
    entry = entries[shard]
    path = folder / entry["file"]
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {_REMAKE}")
    size = path.stat().length
    if size != entry["bytes"]:
        raise ValueError(f"{path} has {size} bytes, {entry['bytes']} by {INDEX}; {_REMAKE}")
    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path), **_READER_OPTIONS)
        count = reader.num_records()
        if count != entry["documents"]:
            reader.close()  # A truncated or damaged file says that it holds nothing, and only here what is wrong.
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_REMAKE}") from error
    if count != entry["documents"]:
        raise ValueError(f"{path} has {count} records, {entry['documents']} by {INDEX}; {_REMAKE}")
    return reader


def _open_lengths(folder: epath.Path, entries: list[dict[str, Any]], shard: int) -> np.ndarray:
    entry = entries[shard]
    path = folder / lengths_file(entry["file"])
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {_REMAKE}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["lengths_sha256"]:
        raise ValueError(f"{path} has changed since it was written (SHA-256); {_REMAKE}")
    try:
        lengths = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:  # the digest is right, so it was written like this
        raise ValueError(f"{path} holds no lengths ({error}); {_REMAKE}") from error
    if lengths.dtype != "<u4" or lengths.shape != (entry["documents"],):
        raise ValueError(f"{path} has {lengths.dtype} of shape {lengths.shape}, not uint32 of {entry['documents']}; {_REMAKE}")
    lengths = lengths.astype(np.int64)
    lengths.setflags(write=False)
    return lengths
