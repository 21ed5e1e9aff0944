"""Parquet as the Hugging Face hub has it: layouts, kinds of columns, null texts, row groups, memory."""

import json
import tracemalloc

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines import DocumentsConfig, Quarantine, read_documents

TEXTS = ["one", "two caf\u00e9", "one", "four \U0001f600" * 50, "one"]


def _config(source, **settings):
    return DocumentsConfig(source=str(source), **{"held_out_share": 1.0, **settings})


def _write(path, column, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": list(range(len(column))), "text": column}), path, **options)


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary(),
             pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
    ids=str,
)  # fmt: skip
def test_every_type_of_string_column_gives_the_same_texts(kind, tmp_path):
    column = pyarrow.array(TEXTS).cast(kind)
    _write(tmp_path / "a.parquet", column, row_group_size=2)
    assert parquet.read_schema(tmp_path / "a.parquet").field("text").type == kind
    documents = list(read_documents(_config(tmp_path), "held_out"))
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"a.parquet:{row}" for row in range(1, 6)]


def test_bad_rows_are_put_aside_and_rows_keep_their_numbers(tmp_path):
    """Over the bounds of row groups and of what is read at a time."""
    values = [f"text {n}".encode() for n in range(1000)]
    bad = {3: None, 300: b"", 512: b"\xff\xfe", 999: b"x" * 101}
    for row, value in bad.items():
        values[row] = value
    offsets = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int32)
    buffers = [pyarrow.py_buffer(np.packbits([value is not None for value in values], bitorder="little").tobytes()),
               pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(b"".join(value or b"" for value in values))]  # fmt: skip
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(values), buffers)
    _write(tmp_path / "in" / "a.parquet", column, row_group_size=150)
    with Quarantine(tmp_path / "bad") as quarantine:
        documents = list(read_documents(_config(tmp_path / "in", max_text_bytes=100), "held_out", quarantine))
    assert {document.name: document.text for document in documents} == {
        f"a.parquet:{row + 1}": value.decode() for row, value in enumerate(values) if row not in bad
    }
    entries = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert {(entry["where"], entry["reason"]) for entry in entries} == {
        ("a.parquet:4", "no_text"), ("a.parquet:301", "empty"), ("a.parquet:513", "no_utf8"), ("a.parquet:1000", "too_long"),
    }  # fmt: skip
    assert quarantine.counts.seen == 1000
    with pytest.raises(ValueError, match="a.parquet:513: no UTF-8 .invalid start byte at byte 0"):
        list(read_documents(_config(tmp_path / "in" / "a.parquet"), "held_out", _Deaf(513)))
    with pytest.raises(ValueError, match="a.parquet:1000: the text is longer than 100 bytes; split the record"):
        list(read_documents(_config(tmp_path / "in", max_text_bytes=100), "held_out", _Deaf(1000)))


class _Deaf(Quarantine):
    """Passes over bad records before a row."""

    def __init__(self, row):
        super().__init__("nowhere")
        self._row = row

    def add(self, where, bad):
        if where.endswith(f":{self._row}"):
            raise ValueError(f"{where}: {bad}")


def test_the_layouts_of_the_hub_are_read(tmp_path):
    """Shards of a split in `data`, or subsets as folders; the card and hidden files are passed over."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset card\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "x.jsonl").write_text("no record")
    for language in ("en", "de"):
        for shard in range(2):
            _write(tmp_path / language / f"train-{shard:05d}-of-00002.parquet", [f"{language} {shard} {row}" for row in range(3)])
    everything = [f"{language} {shard} {row}" for language in ("de", "en") for shard in (0, 1) for row in range(3)]
    for source in (tmp_path, tmp_path / "*" / "train-*.parquet"):
        documents = list(read_documents(_config(source), "held_out"))
        assert [document.text for document in documents] == everything
        assert documents[0].name == "de/train-00000-of-00002.parquet:1"
    documents = list(read_documents(_config(tmp_path / "en"), "held_out"))
    assert [document.text for document in documents] == everything[6:]
    _write(tmp_path / "en" / "validation-00000-of-00001.parquet", ["held out"])
    with pytest.raises(ValueError, match="holds several splits of a dataset, train, validation; name"):
        list(read_documents(_config(tmp_path), "held_out"))


def test_difficulty_comes_from_its_column(tmp_path):
    table = {"text": ["a", "b", "c"], "loss": pyarrow.array([1.5, None, 3.0], pyarrow.float32()), "level": [1, 2, 3]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    documents = read_documents(_config(tmp_path, difficulty_field="level"), "held_out")
    assert [document.difficulty for document in documents] == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="a.parquet:2: 'loss' is None, not a finite number; repair it, or unset difficulty"):
        list(read_documents(_config(tmp_path, difficulty_field="loss"), "held_out"))
    with pytest.raises(ValueError, match="no column 'score', but 'text', 'loss', 'level'; set difficulty_field to the diffic"):
        list(read_documents(_config(tmp_path, difficulty_field="score"), "held_out"))


def test_a_missing_column_is_an_error_even_with_a_quarantine(tmp_path):
    _write(tmp_path / "in" / "a.parquet", TEXTS)
    message = "no column 'body', but 'id', 'text'; set text_field to the text's"
    with pytest.raises(ValueError, match=message), Quarantine(tmp_path / "bad") as quarantine:
        list(read_documents(_config(tmp_path / "in", text_field="body"), "held_out", quarantine))


def test_rows_of_the_two_splits_are_everything_under_their_numbers(tmp_path):
    """Over the bounds of row groups and of what is read at a time."""
    _write(tmp_path / "a.parquet", [f"text {row}" for row in range(1, 1001)], row_group_size=300)
    config = _config(tmp_path, held_out_share=0.3)
    sides = [list(read_documents(config, split)) for split in ("train", "held_out")]
    assert 230 < len(sides[1]) < 370  # 0.3 of 1000, about five standard deviations around it
    assert sorted(document.text for side in sides for document in side) == sorted(f"text {row}" for row in range(1, 1001))
    assert all(document.text == f"text {document.name.partition(':')[2]}" for side in sides for document in side)


def test_a_changed_bit_is_noticed_where_pages_have_checksums(tmp_path):
    """Not only where it breaks the page's form: in the middle of a text."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    _write(tmp_path / "a.parquet", ["a" * 1000, "b" * 1000], **options)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"b" * 900, b"b" * 899 + b"c", 1))
    with pytest.raises(ValueError, match="a.parquet: no Parquet file, or a damaged one .*CRC.*; fetch or write it again"):
        list(read_documents(_config(tmp_path), "held_out"))


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """One of 64 MB, in pages of 1 MB, that hardly compresses; by the accounts of Python and of Arrow together."""
    random = np.random.default_rng(0)
    column = [random.integers(97, 123, 1 << 14, dtype=np.uint8).tobytes().decode() for _ in range(4096)]
    _write(tmp_path / "a.parquet", column, use_dictionary=False, write_batch_size=64)
    del column
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    for _ in read_documents(_config(tmp_path), "held_out"):
        most = max(most, pool.bytes_allocated() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20 << 20
