"""Datasets of TensorFlow Datasets that were prepared as ArrayRecord, read in ranges of records without TensorFlow."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.sources.quarantine import Quarantine, good_records
from data_pipelines.sources.records import Fields, Record, no_field, parse_values

if TYPE_CHECKING:
    from tensorflow_datasets.core.dataset_builder import DatasetBuilder

PREFIX = "tfds:"
# Records of a range: some ten megabytes of text, and the same whatever else is known of the dataset.
RANGE_RECORDS = 1 << 15
# What is fetched at a time: a call for each record is slow.
_READ_RECORDS = 256


class RecordRange(NamedTuple):
    """A range of a split's records: what `SourceFile` says of it."""

    name: str
    path: str
    bytes: int
    first: int
    last: int


def is_prepared_dataset(source: str) -> bool:
    """Whether a source names a dataset of TensorFlow Datasets."""
    return source.startswith(PREFIX)


def find_record_ranges(source: str, data_dir: epath.PathLike | None) -> list[RecordRange]:
    """The ranges of up to `RANGE_RECORDS` that make up a split, in order; their bounds depend on the number of records alone.

    Args:
      source: "tfds:", the name as `tfds.builder` takes it (`name`, `name/config`, `name/config:version`), and "#" with the split,
        which may be left out where there is one only. Without a version: the newest that was prepared.
      data_dir: where it was prepared; None: where TensorFlow Datasets looks by itself.
    Raises:
      FileNotFoundError: no such dataset was prepared there.
      ValueError: it was prepared in another format than ArrayRecord, or has no such split, or several and none is named.
    """
    dataset, _, split = source.removeprefix(PREFIX).partition("#")
    builder = _builder(dataset, data_dir)
    splits = builder.info.splits
    if split not in splits and (split or len(splits) != 1):
        names = ", ".join(f"{PREFIX}{dataset}#{name}" for name in sorted(splits))
        raise ValueError(f"source {source!r}: expected one split of the dataset, got {split or 'none'!r}; there are {names}")
    (split,) = [split] if split else splits
    total, size = splits[split].num_examples, splits[split].num_bytes
    base = f"{builder.info.full_name}/{split}"
    ranges = []
    for first in range(1, total + 1, RANGE_RECORDS):
        last = min(first + RANGE_RECORDS - 1, total)
        share = size * last // total - size * (first - 1) // total
        ranges.append(RecordRange(f"{base}:{first:012d}-{last:012d}", str(builder.data_path), share, first, last))
    return ranges


def read_record_range(
    path: epath.Path,
    name: str,
    first: int,
    last: int,
    fields: Fields,
    wanted: Callable[[int], bool] | None,
    quarantine: Quarantine | None,
) -> Iterator[Record]:
    """The records of a range, numbered from 1 within their split, a few hundred in memory at a time.

    Args:
      path, first, last: of a RecordRange. name: the part of its name before the range, which ends in "/" and the split.
      wanted: whether the record of a number is read; None: all are.
      quarantine: takes the bad records.
    Raises:
      ValueError: a bad record and no quarantine, no feature of the name, or a damaged file.
    """
    builder = _opened(path)
    for field, setting in ((fields.text, "text_field"), (fields.difficulty, "difficulty_field")):
        if field is not None and field not in builder.info.features:
            raise ValueError(f"{PREFIX}{name}: {no_field(field, sorted(builder.info.features), 'feature', setting)}")
    numbers = [number for number in range(first, last + 1) if wanted is None or wanted(number)]
    values = _values(builder, name.rpartition("/")[2], first, last, numbers, fields)
    yield from good_records(values, lambda value: parse_values(value, fields), f"{PREFIX}{name}", name, quarantine)


def _values(
    builder: "DatasetBuilder", split: str, first: int, last: int, numbers: list[int], fields: Fields
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """(number, (text, difficulty)) of the records of those numbers."""
    from tensorflow_datasets import decode

    features = builder.info.features
    # Nothing but text and difficulty is decoded: a dataset may have pictures.
    others = {name: decode.SkipDecoding() for name in features if name not in (fields.text, fields.difficulty)}
    source = builder.as_data_source(f"{split}[{first - 1}:{last}]", deserialize_method=decode.DeserializeMethod.RAW_BYTES)
    for start in range(0, len(numbers), _READ_RECORDS):
        chosen = numbers[start : start + _READ_RECORDS]
        try:
            records = source.__getitems__([number - first for number in chosen])
            if not all(records):  # that is how array_record reads a file of which 64 KB are left
                raise ValueError("a record is empty")
            examples = [features.deserialize_example_np(record, decoders=others) for record in records]
        except Exception as error:  # array_record and protobuf have many kinds
            raise ValueError(
                f"{builder.data_path}: records {chosen[0]} to {chosen[-1]} of {split!r} cannot be read ({error}); a file is "
                "damaged: prepare the dataset again"
            ) from error
        for number, example in zip(chosen, examples, strict=True):
            difficulty = None if fields.difficulty is None else example[fields.difficulty]
            yield number, (example[fields.text], difficulty.item() if isinstance(difficulty, np.generic) else difficulty)


def _builder(dataset: str, data_dir: epath.PathLike | None) -> "DatasetBuilder":
    """The dataset as it was prepared, whether or not its code is there: code may need TensorFlow, and may have changed since."""
    from tensorflow_datasets.core import read_only_builder, registered
    from tensorflow_datasets.core.file_adapters import FileFormat

    remedy = f"prepare it with `tfds build {dataset.partition(':')[0]} --file_format=array_record"
    remedy += f" --data_dir={data_dir}`" if data_dir else "`"
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir and str(data_dir))
    except registered.DatasetNotFoundError as error:
        reason = str(error).partition("\n")[0]
        message = f"{PREFIX}{dataset}: {reason} Name it as tfds.builder does and set data_dir, or {remedy}"
        raise FileNotFoundError(message) from error
    if FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        found = builder.info.file_format.value
        raise ValueError(
            f"{PREFIX}{dataset} in {builder.data_path} is {found}, and only array_record is read; convert it with `tfds "
            f"convert_format --dataset_version_dir={builder.data_path} --out_file_format=array_record`"
        )
    if "://" in str(builder.data_path):
        raise ValueError(f"{PREFIX}{dataset} is in {builder.data_path}, but ArrayRecord is read from disks; copy it to one")
    return _opened(builder.data_path)


def _opened(path: epath.PathLike) -> "DatasetBuilder":
    from tensorflow_datasets.core import read_only_builder

    return read_only_builder.builder_from_directory(path, file_format="array_record")
