"""Rows of Parquet files: text and difficulty, read in pieces."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from etils import epath

from data_pipelines.sources.records import Fields, no_field

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

_ROWS = 256
_READ_BYTES = 1 << 20


def read_rows(
    path: epath.Path, fields: Fields, wanted: Callable[[int], bool] | None
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """(row counted from 1, (text, difficulty)) of the rows wanted (None: all).

    A text is bytes, not yet known to be UTF-8, whatever type of strings the column has; what is no string stays what it is. In
    memory are 256 rows, and a page of each column.

    Raises:
      ValueError: no Parquet, a damaged file, or no column of the name; all of its records would be bad.
    """
    import pyarrow
    from pyarrow import parquet

    with path.open("rb") as raw:
        try:
            # A row group, or its columns, may be gigabytes: without these two it would be read whole before its first row.
            file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)
            for field, setting in ((fields.text, "text_field"), (fields.difficulty, "difficulty_field")):
                if field is not None and field not in file.schema_arrow.names:
                    raise ValueError(f"{path}: {no_field(field, file.schema_arrow.names, 'column', setting)}")
            yield from _rows(file, fields, wanted)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no Parquet file, or a damaged one ({error}); fetch or write it again") from error


def _rows(
    file: "parquet.ParquetFile", fields: Fields, wanted: Callable[[int], bool] | None
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    import pyarrow

    first = 1
    columns = [field for field in (fields.text, fields.difficulty) if field is not None]
    for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
        rows = [row for row in range(len(batch)) if wanted is None or wanted(first + row)]
        chosen = pyarrow.array(rows, pyarrow.int64())
        texts = _bytes(batch.column(fields.text)).take(chosen).to_pylist()
        difficulties = [None] * len(rows)
        if fields.difficulty is not None:
            difficulties = batch.column(fields.difficulty).take(chosen).to_pylist()
        for row, *values in zip(rows, texts, difficulties, strict=True):
            yield first + row, tuple(values)
        first += len(batch)


def _bytes(column: "pyarrow.Array") -> "pyarrow.Array":
    """Strings of any type as bytes: a string that is no UTF-8 is then a bad record, not the end of the file."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_string = types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type)
    return column.cast(pyarrow.large_binary()) if is_string else column
