"""The folder in which the units of a corpus come together: what is there already, what is missing, and when it is whole."""

import concurrent.futures
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from etils import epath

from data_pipelines.sources.documents import DocumentsConfig, SourceFile, Split, list_source_files
from data_pipelines.sources.quarantine import RecordCounts
from data_pipelines.tokenization.shard_writer import (
    describe_tokenizer,
    dtype_for,
    part_of,
    publish,
    refuse_existing,
    write_index,
    write_whole,
)
from data_pipelines.tokenization.token_shards import FORMAT, INDEX, TokenShards, lengths_file
from data_pipelines.tokenization.tokenizer import Tokenizer
from data_pipelines.tokenization.units import TokenizationConfig, Unit, Work, plan_units, quarantine_file, record_file
from lfm_jax.configuration import flatten, to_mapping

T = TypeVar("T")

QUARANTINE = "quarantine.jsonl"
_PLAN = "plan.json"
# A run ends early where, as it went so far, there will be this many times too many bad records: the first units may be the dirty
# ones, and their records longer or shorter than others.
_CERTAINLY = 10
# Settings that say where the text lies.
_PLACES = {"source", "held_out_source", "data_dir"}
# Small files are read side by side: one from a bucket takes as long as many.
_READERS = 32


class Assembly:
    """Takes up or begins the hidden folder beside the one that is to be, and turns it into that one when all units are there.

    work: what units need besides themselves. missing: the units that are to be tokenized. source_bytes: of all units.
    """

    def __init__(
        self,
        data: DocumentsConfig,
        split: Split,
        tokenizer: Tokenizer,
        folder: epath.PathLike,
        config: TokenizationConfig,
    ):
        """Lists the source and looks at what an earlier run has left.

        Raises:
          FileExistsError: the folder is there already.
          FileNotFoundError: the source does not exist.
          ValueError: the source cannot be read, or units were made of other text or with other settings.
        """
        self._folder = epath.Path(folder)
        refuse_existing(self._folder)
        self._part = part_of(self._folder)
        files = list_source_files(data, split)
        self._units = plan_units(files, config.unit_bytes)
        self._config = config
        self._dtype = dtype_for(tokenizer.vocab_size).str
        self._about = {
            "tokenizer": describe_tokenizer(tokenizer), "source": to_mapping(data), "split": split,
            "source_files": _describe_files(files), "unit_bytes": config.unit_bytes, "shard_tokens": config.shard_tokens,
        }  # fmt: skip
        self.work = Work(data, split, str(self._part), config.shard_tokens)
        self.source_bytes = sum(unit.bytes for unit in self._units)
        self._is_indexed = (self._part / INDEX).exists()
        self._take_up()
        self._records = {} if self._is_indexed else self._find_finished()
        self.missing = [] if self._is_indexed else [unit for unit in self._units if unit.number not in self._records]
        self._seen_bytes = self.source_bytes - sum(unit.bytes for unit in self.missing)
        self._seen = self._counts()

    def finished(self, unit: Unit) -> None:
        """Takes note that a unit was tokenized, and stops early where there are far too many bad records.

        Raises:
          ValueError: there are many more bad records already than all of the source may have.
        """
        self._records[unit.number] = record = _read_record(self._part, unit)
        self._seen += RecordCounts(**record["records"])
        self._seen_bytes += unit.bytes
        expected = self._seen.seen * self.source_bytes / max(1, self._seen_bytes)
        if sum(self._seen.bad.values()) > _CERTAINLY * self._config.bad_records_limit * expected:
            self._check_records()

    def finish(self) -> None:
        """Lets the folder appear.

        Raises:
          FileNotFoundError: a unit is not finished.
          ValueError: too many bad records, or no document at all.
        """
        if not self._is_indexed:
            waiting = [unit for unit in self._units if unit.number not in self._records]
            self._records |= _in_threads(lambda unit: _read_record(self._part, unit), waiting)
            self._check_records()
            self._refuse_nothing()
            write_index(self._part, self._about, self._sums())
        self._remove_scaffolding()
        publish(self._part, self._folder)

    def _take_up(self) -> None:
        """Begins the folder, unless one with the same settings is there."""
        made_with = self._part / (INDEX if self._is_indexed else _PLAN)
        if not made_with.exists():  # not one unit can be there
            if self._part.exists():
                self._part.rmtree()
            self._part.mkdir(parents=True)
            write_whole(made_with, json.dumps({"format": FORMAT, **self._about}, indent=2) + "\n")
            return
        then, now = flatten(json.loads(made_with.read_text())), flatten({"format": FORMAT, **self._about})
        changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{self._part} holds what was tokenized before an interruption, of other text or with other settings: "
                f"{'; '.join(changed)}; go on with the same, or delete it to begin anew"
            )

    def _find_finished(self) -> dict[int, dict[str, Any]]:
        """What there is of each unit that an earlier run has finished."""
        there = {path.name for path in self._part.iterdir()}
        begun = [unit for unit in self._units if record_file(unit.number) in there]
        records = _in_threads(lambda unit: _whole_record(self._part, unit), begun)
        return {number: record for number, record in records.items() if record is not None}

    def _sums(self) -> dict[str, Any]:
        """What the index says of all units together."""
        records = [self._records[unit.number] for unit in self._units]
        sums = {name: sum(record[name] for record in records) for name in ("documents", "tokens", "text_bytes")}
        counts = self._counts()
        about = {"dtype": self._dtype, "records": {"seen": counts.seen, "bad": counts.bad}}
        return {**sums, **about, "shards": [shard for record in records for shard in record["shards"]]}

    def _counts(self) -> RecordCounts:
        """Of all units that are finished, in their order."""
        return sum((RecordCounts(**self._records[number]["records"]) for number in sorted(self._records)), RecordCounts())

    def _check_records(self) -> None:
        """Lists the bad records of all finished units in one file, and refuses too many."""
        bad = [unit for unit in self._units if self._records.get(unit.number, {}).get("records", {}).get("bad")]
        with (self._part / QUARANTINE).open("wb") as file:
            for start in range(0, len(bad), _READERS):
                group = bad[start : start + _READERS]
                contents = _in_threads(lambda unit: (self._part / quarantine_file(unit.number)).read_bytes(), group)
                file.writelines(contents.values())
        self._counts().check(self._config.bad_records_limit, self._part / QUARANTINE)

    def _refuse_nothing(self) -> None:
        if any(record["documents"] for record in self._records.values()):
            return
        self._part.rmtree()
        raise ValueError(
            f"there is no document to tokenize in the {self.work.split!r} split of {self.work.data.source!r}; change "
            "held_out_share, or name other text"
        )

    def _remove_scaffolding(self) -> None:
        """What only the work itself needed, and what killed processes have left."""
        for path in self._part.iterdir():
            if path.name.startswith("."):
                path.rmtree() if path.is_dir() else path.unlink()
            elif path.name == _PLAN or path.name.startswith(("unit-", "quarantine-")):
                path.unlink()


def check_source(shards: TokenShards, data: DocumentsConfig, split: Split) -> None:
    """Token shards are of a split of `data`, as far as their index says of what; the text may lie elsewhere by now.

    Raises:
      FileNotFoundError: it should lie elsewhere, and does not.
      ValueError: they are of other text.
    """
    source = shards.made_of["source"]
    if not isinstance(source, dict):
        return
    then, now = {"split": shards.made_of["split"], **source}, {"split": split, **to_mapping(data)}
    changed = [name for name in now if name in then and then[name] != now[name]]
    if not changed:
        return
    has_other_text = not set(changed) <= _PLACES or (then.get("held_out_source") is None) != (data.held_out_source is None)
    if has_other_text or _describe_files(list_source_files(data, split)) != shards.made_of["source_files"]:
        raise ValueError(
            f"{shards.folder} was tokenized from other text: "
            f"{'; '.join(f'{name} was {then[name]}, is {now[name]}' for name in changed)}; go on with the same, take another "
            "--workdir, or delete the folder to tokenize again"
        )


def _describe_files(files: list[SourceFile]) -> dict[str, Any]:
    """What tells these files from others, without where they lie."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([file.name, file.bytes, file.first, file.last]).encode())
    return {"count": len(files), "bytes": sum(file.bytes for file in files), "sha256": digest.hexdigest()}


def _in_threads(function: Callable[[Unit], T], units: Iterable[Unit]) -> dict[int, T]:
    """By the unit's number."""
    units = list(units)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as threads:
        return {unit.number: result for unit, result in zip(units, threads.map(function, units), strict=True)}


def _read_record(part: epath.Path, unit: Unit) -> dict[str, Any]:
    path = part / record_file(unit.number)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: that unit is not tokenized; the same command goes on with it")
    return json.loads(path.read_text())


def _whole_record(part: epath.Path, unit: Unit) -> dict[str, Any] | None:
    """None if a file of the unit is not as it was written: a machine that lost power may have lost what it had not on disk."""
    try:
        record = _read_record(part, unit)
    except ValueError:
        return None
    for shard in record["shards"]:
        path = part / shard["file"]
        if not path.exists() or path.stat().length != shard["bytes"] or not (part / lengths_file(shard["file"])).exists():
            return None
    is_listed = not record["records"]["bad"] or (part / quarantine_file(unit.number)).exists()
    return record if is_listed else None
