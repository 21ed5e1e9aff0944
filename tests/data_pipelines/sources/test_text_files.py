"""Files of text: what comes out of each format, and what is said of bad ones."""

import gzip
import io
import json
import tracemalloc

import pyarrow
import pytest
import zstandard
from etils import epath
from pyarrow import parquet

from data_pipelines.sources import text_files
from data_pipelines.sources.quarantine import Quarantine
from data_pipelines.sources.records import Fields
from data_pipelines.sources.text_files import find_text_files, read_records

TEXTS = ["plain", "line\nbreaks\r\nand\ttabs", "caf\u00e9 \u4f60\u597d \U0001f600", " ", "long " * 20_000]


def read_texts(path, text_field="text", *, limit=1 << 26, quarantine=None):
    """(line, text) of every record of a file."""
    fields = Fields(text_field, None, limit)
    return ((record.index, record.text) for record in read_records(path, path.name, fields, None, quarantine))


def _lines(texts=TEXTS):
    return "".join(json.dumps({"id": 7, "body": text}) + "\n" for text in texts).encode()


def _write_jsonl(path):
    path.write_bytes(_lines())


def _write_gzip(path):
    path.write_bytes(gzip.compress(_lines(TEXTS[:2])) + gzip.compress(_lines(TEXTS[2:])))


def _write_zstandard(path):
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(_lines(TEXTS[:2])) + compress(_lines(TEXTS[2:])))


def _write_parquet(path):
    table = pyarrow.table({"id": list(range(len(TEXTS))), "body": TEXTS})
    parquet.write_table(table, path, row_group_size=2)


WRITERS = {".jsonl": _write_jsonl, ".jsonl.gz": _write_gzip, ".jsonl.zst": _write_zstandard, ".parquet": _write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_texts(suffix, tmp_path):
    path = epath.Path(tmp_path / f"texts{suffix}")
    WRITERS[suffix](path)
    assert list(read_texts(path, "body")) == list(enumerate(TEXTS, start=1))


def test_a_text_file_is_one_text_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    assert list(read_texts(epath.Path(tmp_path / "a.txt"), "text")) == [(1, "\ufeffone\r\ntwo\n\n")]


def test_blank_lines_are_no_records_but_are_counted(tmp_path):
    path = epath.Path(tmp_path / "a.jsonl")
    path.write_text('\n{"text": "a"}\n  \n{"text": "b"}')
    assert list(read_texts(path, "text")) == [(2, "a"), (4, "b")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_that_was_cut_off_is_noticed(suffix, tmp_path):
    """Wherever it was cut: zstandard's own reader says nothing."""
    path = epath.Path(tmp_path / f"texts{suffix}")
    WRITERS[suffix](path)
    content = path.read_bytes()
    for end in (len(content) - 1, len(content) - 9, 20):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=rf"texts{suffix}: damaged or cut off near line \d"):
            list(read_texts(path, "body"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_of_which_nothing_is_left_is_noticed(suffix, tmp_path):
    path = epath.Path(tmp_path / f"texts{suffix}")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"texts{suffix}: damaged or cut off near line 1 .no byte is there"):
        list(read_texts(path, "body"))


def test_a_few_bytes_that_stand_for_many_are_not_copied_again_and_again(tmp_path):
    """Else a gigabyte of zeros, 32 KB in zstandard, takes hours."""
    path = epath.Path(tmp_path / "zeros.jsonl.zst")
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(1 << 25)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="zeros.jsonl.zst:1: the line is longer than 1000 bytes"):
        list(read_texts(path, limit=1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * (1 << 25)


def test_a_damaged_compressed_file_is_noticed(tmp_path):
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = epath.Path(tmp_path / f"texts{suffix}")
        path.write_bytes(b"this is neither of them")
        with pytest.raises(ValueError, match="damaged or cut off near line 1"):
            list(read_texts(path, "body"))


def _parquet(table):
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(table), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a.txt:1: no UTF-8 \(invalid start byte at byte 4\); convert or remove"),
        ("a.txt", b"", "a.txt:1: the text is empty; remove the record"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: no UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', "a.jsonl:2: the text is empty"),
        ("a.jsonl", b'{"text": "a"\n', "a.jsonl:1: no JSON .*; repair or remove the line"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: no JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: no JSON .*digits"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: expected a JSON object with the field 'text', got list"),
        ("a.jsonl", b'{"title": 1, "body": 2}\n', "a.jsonl:1: there is no field 'text', but 'title', 'body'; set text_field"),
        ("a.jsonl", b"{}\n", "a.jsonl:1: there is no field 'text', but none at all"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: 'text' is NoneType, not text; set text_field"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: 'text' is no UTF-8 .surrogates not allowed"),
        ("a.parquet", _parquet({"title": ["a"], "n": [1]}), "a.parquet: there is no column 'text', but 'title', 'n'; set"),
        ("a.parquet", _parquet({"text": ["a", None]}), "a.parquet:2: 'text' is NoneType, not text"),
        ("a.parquet", _parquet({"text": [1]}), "a.parquet:1: 'text' is int, not text"),
        ("a.parquet", _parquet({"text": ["a", ""]}), "a.parquet:2: the text is empty"),
        ("a.parquet", b"PAR1 nothing", "a.parquet: no Parquet file, or a damaged one"),
    ],
)
def test_a_bad_record_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(epath.Path(tmp_path / name), "text"))


def test_a_text_without_end_is_not_read_whole(tmp_path):
    exact = json.dumps({"text": "x" * 87}) + "\n"
    assert len(exact) == 100
    path = epath.Path(tmp_path / "a.jsonl")
    path.write_text(exact * 2 + exact.replace("x", "xx", 1))
    texts = read_texts(path, limit=100)
    assert [next(texts)[0], next(texts)[0]] == [1, 2]
    with pytest.raises(ValueError, match="a.jsonl:3: the line is longer than 100 bytes; split the record"):
        next(texts)
    path = epath.Path(tmp_path / "a.txt")
    path.write_text("x" * 101)
    with pytest.raises(ValueError, match="a.txt:1: more than 100 bytes are one text; split the file"):
        next(read_texts(path, limit=100))


class _Spy(io.BytesIO):
    """Writes down how much each line was asked for."""

    def __init__(self, content):
        super().__init__(content)
        self.sizes = []

    def readline(self, size=-1):
        self.sizes.append(size)
        return super().readline(size)


def test_no_more_is_read_at_once_than_a_text_may_have(tmp_path, monkeypatch):
    """Of a line that is longer, what follows is read in pieces, and the lines after it keep their numbers."""
    good = b'{"text": "a"}\n'
    spy = _Spy(good + b"x" * 100 + b"\n" + good + b" " * 100 + b"\n" + good + b"y" * 31)
    monkeypatch.setattr(text_files, "_decompress", lambda raw, name: spy)
    monkeypatch.setattr(text_files, "_SKIP_BYTES", 40)
    (tmp_path / "a.jsonl").write_text("in the spy's place")
    with Quarantine(tmp_path / "bad") as quarantine:
        texts = list(read_texts(epath.Path(tmp_path / "a.jsonl"), limit=30, quarantine=quarantine))
    assert texts == [(1, "a"), (3, "a"), (5, "a")]
    assert quarantine.counts.bad == {"too_long": 2} and quarantine.counts.seen == 5
    assert [json.loads(line)["where"] for line in (tmp_path / "bad").read_text().splitlines()] == ["a.jsonl:2", "a.jsonl:6"]
    assert set(spy.sizes) == {31, 40}


def test_a_line_of_the_limit_is_read_and_one_byte_more_is_not(tmp_path):
    """With the end of the line, or without it at the end of the file."""
    line = b'{"text": "0123456789"}'
    for content, count in ((line + b"\n", 1), (line + b" \n", 0), (line + b" ", 1), (line + b"  ", 0)):
        (tmp_path / "a.jsonl").write_bytes(content + (b"" if content[-1:] != b"\n" else line + b"\n"))
        with Quarantine(tmp_path / "bad") as quarantine:
            texts = list(read_texts(epath.Path(tmp_path / "a.jsonl"), limit=len(line) + 1, quarantine=quarantine))
        assert len(texts) == count + content.endswith(b"\n")
        assert sum(quarantine.counts.bad.values()) == 1 - count


def test_a_folder_is_searched_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.jsonl", "a/y.parquet", "c/d/e.jsonl.gz", "README.md", ".hidden.txt", ".git/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, _ in find_text_files(tmp_path)] == ["a/y.parquet", "a/z.jsonl", "b.txt", "c/d/e.jsonl.gz"]
    assert [name for name, _ in find_text_files(tmp_path / "a")] == ["y.parquet", "z.jsonl"]
    assert [name for name, _ in find_text_files(tmp_path / "b.txt")] == ["b.txt"]
    assert [name for name, _ in find_text_files(tmp_path / "a" / "*.jsonl")] == ["z.jsonl"]


def test_a_source_without_text_is_refused(tmp_path):
    for missing in (tmp_path / "none", tmp_path / "*.txt"):
        with pytest.raises(FileNotFoundError, match="does not exist; give a file, a folder, or 'stdlib'"):
            find_text_files(missing)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"holds no file that can be read \(.txt, .jsonl, .* but notes.md"):
        find_text_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_text_files(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"'\*\*' is not understood; give the folder, all of which is read, or a '\*' a level"):
        find_text_files(tmp_path / "**" / "train.jsonl")


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_a_pattern_may_have_stars_in_its_folders(tmp_path):
    _touch(tmp_path, "a/en/train-0.jsonl", "a/de/train-0.jsonl", "a/de/test-0.jsonl", "b/en/train-0.jsonl", "c/train-0.jsonl")
    names = [name for name, _ in find_text_files(tmp_path / "a" / "*" / "train-*.jsonl")]
    assert names == ["de/train-0.jsonl", "en/train-0.jsonl"]
    assert [name for name, _ in find_text_files(tmp_path / "*" / "en" / "*")] == ["a/en/train-0.jsonl", "b/en/train-0.jsonl"]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0-of-1.parquet"],
         ["data/test-0-of-1.parquet", "data/train-*.parquet"]),
        ([f"{language}/{split}-{n}-of-2.parquet" for language in ("en", "de") for split in ("train", "val") for n in (0, 1)],
         ["*/train-*.parquet", "*/val-*.parquet"]),
        (["en/train/0.parquet", "en/train/1.parquet", "en/dev/0.parquet"], ["en/dev/0.parquet", "en/train/*.parquet"]),
        (["train.jsonl", "train.jsonl.gz", "eval_a.jsonl"], ["eval_a.jsonl", "train*"]),
    ],
)  # fmt: skip
def test_a_folder_of_several_splits_is_refused_with_the_patterns_to_write(names, patterns, tmp_path):
    """Each pattern that the message gives finds the files of its split."""
    _touch(tmp_path, *names, "README.md", ".gitattributes")
    with pytest.raises(ValueError, match="holds several splits of a dataset, .*; name the one that is meant by") as error:
        find_text_files(tmp_path)
    written = str(error.value).partition("by a pattern: ")[2].split(", ")
    assert [path.removeprefix(f"{tmp_path}/") for path in written] == [pattern.replace("-*", "*") for pattern in patterns]
    found = [path for pattern in written for _, path in find_text_files(pattern)]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == sorted(names)
    assert len(find_text_files(tmp_path / names[0])) == 1


def test_files_of_one_split_and_names_that_only_begin_like_one_are_read(tmp_path):
    """And whole files, such as a tree of code has in a folder of tests."""
    _touch(tmp_path, "train-0.jsonl", "train-1.jsonl", "testament.jsonl", "values.jsonl", "test/a.txt", "dev/b.txt", "dev/c.txt")
    assert len(find_text_files(tmp_path)) == 7
