"""A corpus cut into units of work, each of which any process on any machine can tokenize, with the same bytes as outcome."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from data_pipelines.sources.documents import Document, DocumentsConfig, SourceFile, Split, read_source_file
from data_pipelines.sources.quarantine import Quarantine
from data_pipelines.tokenization.shard_writer import ShardWriter, write_documents
from data_pipelines.tokenization.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizationConfig:
    """How a corpus is tokenized.

    unit_bytes: source files are taken together up to this size, a larger one is a unit by itself; what was not finished when a
      run was interrupted is done again by units. shard_tokens: a file of tokens is closed when it has this many ids.
    bad_records_limit: the share of records that may be unreadable; these are listed in `quarantine.jsonl`.
    workers: processes on this machine; None: one for each core. Only the first two decide what is written.
    """

    unit_bytes: int = 1 << 28
    shard_tokens: int = 1 << 26
    bad_records_limit: float = 0.001
    workers: int | None = None

    def __post_init__(self):
        for name in ("unit_bytes", "shard_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.bad_records_limit <= 1:
            raise ValueError(f"bad_records_limit must be a share from 0 to 1, got {self.bad_records_limit}")


class Unit(NamedTuple):
    """Consecutive files of a source. bytes: of these."""

    number: int
    files: tuple[SourceFile, ...]
    bytes: int


class Work(NamedTuple):
    """What all units have in common. folder: where their files go. Can be pickled."""

    data: DocumentsConfig
    split: Split
    folder: str
    shard_tokens: int


class Advance(NamedTuple):
    """What was done since the last report: bytes of source files that were read to their end, and tokens."""

    source_bytes: int
    tokens: int


def plan_units(files: list[SourceFile], unit_bytes: int) -> list[Unit]:
    """Cuts files, in their order, into units: as many as fit into `unit_bytes`, or one that does not."""
    units: list[list[SourceFile]] = []
    room = 0
    for file in files:
        if not units or file.bytes > room:
            units.append([])
            room = unit_bytes
        units[-1].append(file)
        room -= file.bytes
    return [Unit(number, tuple(group), sum(file.bytes for file in group)) for number, group in enumerate(units)]


def record_file(unit: int) -> str:
    """The name of the file that is there when a unit is finished, and says what is in it."""
    return f"unit-{unit:05}.json"


def quarantine_file(unit: int) -> str:
    """The name of the file with a unit's bad records, if there are any."""
    return f"quarantine-{unit:05}.jsonl"


def tokenize_unit(
    work: Work, unit: Unit, tokenizer: Tokenizer, threads: int | None, report: Callable[[Advance], None] = lambda advance: None
) -> None:
    """Tokenizes a unit: its shards and its bad records, and last the file that says that it is finished.

    The bytes depend on the source files and on `work` and the tokenizer alone.

    Args:
      threads: for the tokenizer; None: one for each core.
      report: told now and then how far it is.
    Raises:
      ValueError: a source file is damaged as a whole.
    """
    folder = epath.Path(work.folder)
    bad_records = quarantine_file(unit.number)
    progress = _Progress(report)
    with ShardWriter(folder, unit.number, tokenizer, work.shard_tokens) as writer:
        with Quarantine(writer.staging / bad_records) as quarantine:
            documents = _documents(work, unit, quarantine, progress)
            write_documents(documents, tokenizer, writer, threads, lambda: progress.tell(writer.tokens))
        progress.tell(writer.tokens)
        record = {**writer.finish(), "records": dataclasses.asdict(quarantine.counts)}
        if quarantine.counts.bad:
            writer.place(bad_records)
        done = record_file(unit.number)
        (writer.staging / done).write_text(json.dumps(record) + "\n")
        writer.place(done)


class _Progress:
    """Reports differences. source_bytes: of the files that were read to their end."""

    def __init__(self, report: Callable[[Advance], None]):
        self.source_bytes = 0
        self._report = report
        self._told = Advance(0, 0)

    def tell(self, tokens: int) -> None:
        """tokens: so far."""
        now = Advance(self.source_bytes, tokens)
        self._report(Advance(now.source_bytes - self._told.source_bytes, now.tokens - self._told.tokens))
        self._told = now


def _documents(work: Work, unit: Unit, quarantine: Quarantine, progress: _Progress) -> Iterator[Document]:
    for file in unit.files:
        yield from read_source_file(work.data, file, work.split, quarantine)
        progress.source_bytes += file.bytes
