"""Where text comes from: a stream of documents, each on one side of a split that never changes."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from etils import epath

from data_pipelines.sources.prepared_datasets import find_record_ranges, is_prepared_dataset, read_record_range
from data_pipelines.sources.quarantine import Quarantine
from data_pipelines.sources.records import Fields
from data_pipelines.sources.standard_library import standard_library_files, standard_library_texts
from data_pipelines.sources.text_files import find_text_files, is_one_text, read_records

STANDARD_LIBRARY = "stdlib"
Split = Literal["train", "held_out"]


class Document(NamedTuple):
    """A text that belongs together.

    name: of its file, relative to the source, and what tells it from others of that file. difficulty: as its record states it;
    None where the config names no such field, or where documents are whole files.
    """

    text: str
    name: str
    difficulty: float | None = None


class SourceFile(NamedTuple):
    """A part of a source that is read by itself: a file, or a range of the records of a prepared dataset. Can be pickled.

    name: relative to the source, the same on every machine. path: where it lies. bytes: of the file; of the records, about.
    first, last: the range, both included, counted from 1; None: the whole file.
    """

    name: str
    path: str
    bytes: int
    first: int | None = None
    last: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Where text comes from and how it is split.

    source: one of
      "stdlib": the sources and documentation strings of Python's standard library;
      a file, a folder, or a pattern such as `books/train-*.jsonl.zst` or `books/*/train-*.parquet`, of .txt, .jsonl, .jsonl.gz,
        .jsonl.zst or .parquet, local or gs://; so also the folder of a dataset of the Hugging Face hub;
      "tfds:" and a dataset of TensorFlow Datasets, as `tfds.builder` takes its name, with "#" and its split where it has several:
        `tfds:wiki40b/en:1.3.0#train`. It must have been prepared as ArrayRecord; TensorFlow is not needed to read it.
    data_dir: the folder that "tfds:" datasets were prepared in; None: where TensorFlow Datasets looks by itself.
    text_field: the field of a .jsonl record, the column of a .parquet file, or the feature of a dataset, that holds the text.
    difficulty_field: the one that holds a number by which documents can be ordered, which every record must have; None: there is
      none.
    max_text_bytes: what one text, or one line of a .jsonl, may take: a line without an end would otherwise be read whole.
    held_out_share: the share that is held out: of the files of "stdlib" and .txt, of the records of other files. Which ones is
      decided by a hash of the name, so it stays the same when files are added, in another order or on another machine; but of
      files so few that none has a hash below the share, the one with the least is held out, until one with less is added. 1: all
      of it, for measuring a model.
    held_out_source: another source, all of which is the held-out split; all of `source` is then the training split.
    """

    source: str
    data_dir: str | None = None
    text_field: str = "text"
    difficulty_field: str | None = None
    max_text_bytes: int = 1 << 26
    held_out_share: float = 0.05
    held_out_source: str | None = None

    def __post_init__(self):
        if not 0 < self.held_out_share <= 1:
            raise ValueError(f"held_out_share must be above 0 and at most 1, got {self.held_out_share}")
        if self.held_out_source == self.source:
            raise ValueError(f"held_out_source is source itself, {self.source!r}; name text that is not trained on, or none")
        if self.max_text_bytes < 1:
            raise ValueError(f"max_text_bytes must be positive, got {self.max_text_bytes}")


class _Side(NamedTuple):
    """What a split reads. share: the share of the source that is held out; None: all of the source is in the split."""

    source: str
    share: float | None
    held_out: bool

    def has(self, name: str) -> bool:
        """Whether a record of that name is in the split."""
        return self.share is None or (_fraction(name) < self.share) == self.held_out


def list_source_files(config: DocumentsConfig, split: Split) -> list[SourceFile]:
    """The files that a split is read from, sorted by name, and so the same on every machine.

    Files that are one document each ("stdlib", .txt) are left out where they are in the other split; records of the other split
    are left out by `read_source_file`.

    Raises:
      FileNotFoundError: a source does not exist.
      ValueError: it holds nothing that can be read, or several splits of a dataset (see `find_text_files`, `find_record_ranges`).
    """
    side = _side(config, split)
    if is_prepared_dataset(side.source):
        return [SourceFile(*found) for found in find_record_ranges(side.source, config.data_dir)]
    is_library = side.source == STANDARD_LIBRARY
    files = standard_library_files() if is_library else find_text_files(side.source)
    whole = {name for name, path in files if is_library or is_one_text(path)}
    if side.share is not None:
        held_out = _held_out_files(sorted(whole), side.share)
        files = [(name, path) for name, path in files if name not in whole or (name in held_out) == side.held_out]
    return [SourceFile(name, str(path), epath.Path(path).stat().length) for name, path in files]


def read_source_file(
    config: DocumentsConfig, file: SourceFile, split: Split, quarantine: Quarantine | None = None
) -> Iterator[Document]:
    """The documents of one file that are in the split, in the order of the file; the same on every machine.

    Args:
      file: as `list_source_files` gives it for this config and split.
      quarantine: takes the bad records of this split, and reading goes on. A record of the other split is neither read nor
        counted: it is bad there.
    Raises:
      ValueError: without a quarantine, a bad record (see `BadRecord`). With and without, a file that is damaged as a whole, such
        as a .gz that was cut off: what follows the damage is unknown, so records would be lost uncounted. And a table without the
        text's column, where the setting is wrong rather than a record.
    """
    side = _side(config, split)
    fields = Fields(config.text_field, config.difficulty_field, config.max_text_bytes)
    if side.source == STANDARD_LIBRARY:
        for suffix, text in standard_library_texts(file.name, Path(file.path)):
            if quarantine is not None:
                quarantine.counts.seen += 1
            yield Document(text, file.name + suffix)
        return
    path = epath.Path(file.path)
    if file.first is not None:
        base = file.name.rpartition(":")[0]
        wanted = _wanted(side, base)
        for record in read_record_range(path, base, file.first, file.last, fields, wanted, quarantine):
            yield Document(record.text, f"{base}:{record.index}", record.difficulty)
    elif is_one_text(path):
        for record in read_records(path, file.name, fields, None, quarantine):
            yield Document(record.text, file.name)
    else:
        for record in read_records(path, file.name, fields, _wanted(side, file.name), quarantine):
            yield Document(record.text, f"{file.name}:{record.index}", record.difficulty)


def read_documents(config: DocumentsConfig, split: Split, quarantine: Quarantine | None = None) -> Iterator[Document]:
    """The documents of one split, in the order of their names (records in the order of their file), read as they are asked for.

    Args:
      quarantine: see `read_source_file`.
    Raises:
      FileNotFoundError: a source does not exist.
      ValueError: a record or a file that cannot be read (see `read_source_file`), or a split without any document; nothing is
        left out silently.
    """
    found = False
    for file in list_source_files(config, split):
        for document in read_source_file(config, file, split, quarantine):
            found = True
            yield document
    if found:
        return
    side = _side(config, split)
    if side.share is None:
        raise ValueError(f"source {side.source!r} holds no document")
    raise ValueError(
        f"no document of source {side.source!r} is in the {split!r} split with held_out_share {side.share}; change "
        "held_out_share, or name other text in held_out_source"
    )


def _side(config: DocumentsConfig, split: Split) -> _Side:
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    held_out = split == "held_out"
    if config.held_out_source is not None:
        return _Side(config.held_out_source if held_out else config.source, None, held_out)
    return _Side(config.source, config.held_out_share, held_out)


def _wanted(side: _Side, name: str) -> Callable[[int], bool] | None:
    """Tells whether a record of a file is in the split; None: all are."""
    return None if side.share is None else lambda index: side.has(f"{name}:{index}")


def _held_out_files(names: list[str], share: float) -> set[str]:
    """Which files are held out; of two or more, at least one, which then is not the same whatever is added."""
    held_out = {name for name in names if _fraction(name) < share}
    return held_out or ({min(names, key=_fraction)} if len(names) > 1 else set())


def _fraction(name: str) -> float:
    """A number in [0, 1) that is as good as random and always the same for a name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
