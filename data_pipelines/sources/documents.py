"""Where text comes from: a stream of documents, each on one side of a split that never changes."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from data_pipelines.sources.standard_library import standard_library_files, standard_library_texts
from data_pipelines.sources.text_files import find_text_files, is_one_text, read_texts

STANDARD_LIBRARY = "stdlib"


class Document(NamedTuple):
    """A text that belongs together. name: of its file, relative to the source, and what tells it from others of that file."""

    text: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Where text comes from and how it is split.

    source: "stdlib" (the sources and documentation strings of Python's standard library), or a file, a folder, or a pattern such
      as `books/train-*.jsonl.zst`, of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet; local or gs://.
    text_field: the field of a .jsonl record, or the column of a .parquet file, that holds the text.
    held_out_share: the share that is held out: of the files of "stdlib" and .txt, of the records of other files. Which ones is
      decided by a hash of the name, so it stays the same when files are added, in another order or on another machine. 1: all of
      it, for measuring a model.
    held_out_source: another source, all of which is the held-out split; all of `source` is then the training split.
    """

    source: str
    text_field: str = "text"
    held_out_share: float = 0.05
    held_out_source: str | None = None

    def __post_init__(self):
        if not 0 < self.held_out_share <= 1:
            raise ValueError(f"held_out_share must be above 0 and at most 1, got {self.held_out_share}")
        if self.held_out_source == self.source:
            raise ValueError(f"held_out_source is source itself, {self.source!r}; name text that is not trained on, or none")


def read_documents(config: DocumentsConfig, split: Literal["train", "held_out"]) -> Iterator[Document]:
    """The documents of one split, in the order of their names (records in the order of their file), read as they are asked for.

    Raises:
      FileNotFoundError: a source does not exist.
      ValueError: a record that cannot be read (see `read_texts`), or a split without any document; nothing is left out silently.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    held_out = split == "held_out"
    if config.held_out_source is not None:
        source, share = (config.held_out_source if held_out else config.source), None
    else:
        source, share = config.source, config.held_out_share
    documents = _read(source, config.text_field, share, held_out)
    first = next(documents, None)
    if first is None and share is None:
        raise ValueError(f"source {source!r} holds no document")
    if first is None:
        raise ValueError(
            f"no document of source {source!r} is in the {split!r} split with held_out_share {share}; change held_out_share, or "
            "name other text in held_out_source"
        )
    yield first
    yield from documents


def _read(source: str, text_field: str, share: float | None, held_out: bool) -> Iterator[Document]:
    """The documents of a source: all of them (share None), or those on one side."""
    is_library = source == STANDARD_LIBRARY
    files = standard_library_files() if is_library else find_text_files(source)
    whole = [name for name, path in files if is_library or is_one_text(path)]
    held_out_files = set() if share is None else _held_out_files(whole, share)
    whole_files = set(whole)
    for name, path in files:
        by_file = name in whole_files
        if share is not None and by_file and (name in held_out_files) != held_out:
            continue
        if is_library:
            yield from (Document(text, name + suffix) for suffix, text in standard_library_texts(name, path))
            continue
        for index, text in read_texts(path, text_field):
            document = Document(text, name if by_file else f"{name}:{index}")
            if by_file or share is None or (_fraction(document.name) < share) == held_out:
                yield document


def _held_out_files(names: list[str], share: float) -> set[str]:
    """Which files are held out; of two or more, at least one."""
    held_out = {name for name in names if _fraction(name) < share}
    return held_out or ({min(names, key=_fraction)} if len(names) > 1 else set())


def _fraction(name: str) -> float:
    """A number in [0, 1) that is as good as random and always the same for a name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
