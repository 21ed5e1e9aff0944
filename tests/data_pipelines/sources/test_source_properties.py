"""What holds for any source: files make up the documents, splits make up the files, no line is lost, also far from any disk."""

import gzip
import io
import json
import pickle

import pyarrow
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipelines import DocumentsConfig, Quarantine, SourceFile, list_source_files, read_documents, read_source_file

_TEXTS = st.lists(st.text(min_size=1), max_size=4)
_FILES = st.dictionaries(
    st.sampled_from([f"{stem}{suffix}" for stem in ("a", "b", "sub/a") for suffix in (".txt", ".jsonl.gz", ".parquet")]),
    _TEXTS,
    min_size=1,
)


def _write(path, texts):
    """Texts as a file of the kind that its name says; the texts that it then holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".txt"):
        texts = ["".join(texts) or "a"]
        path.write_bytes(texts[0].encode())
    elif path.name.endswith(".parquet"):
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), sink)
        path.write_bytes(sink.getvalue().to_pybytes())
    else:
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return texts


def _by_files(config, split):
    """Each file read by itself, from what a process would be sent, the last first."""
    files = pickle.loads(pickle.dumps(list_source_files(config, split)))
    parts = [list(read_source_file(config, file, split)) for file in reversed(files)]
    return [document for part in reversed(parts) for document in part]


def _all(config, split):
    try:
        return list(read_documents(config, split))
    except ValueError as error:
        assert "no document of source" in str(error)
        return []


@settings(max_examples=60)
@given(files=_FILES, share=st.sampled_from([0.1, 0.5, 1.0]))
def test_files_make_up_the_documents_and_splits_make_up_the_files(files, share, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    written = [text for name, texts in files.items() for text in _write(folder / name, texts)]
    config = DocumentsConfig(source=str(folder), held_out_share=share)
    train, held_out = (_all(config, split) for split in ("train", "held_out"))
    assert _by_files(config, "train") == train
    assert _by_files(config, "held_out") == held_out
    assert sorted(document.text for document in train + held_out) == sorted(written)
    assert len({document.name for document in train + held_out}) == len(written)


def _good_text(line):
    """The text of a line that a reader must take, by another road than the reader's; None: a bad line."""
    try:
        text = json.loads(line.decode())["text"]
        return text if isinstance(text, str) and text.encode() else None
    except (ValueError, KeyError, TypeError):
        return None


_GOOD = st.text(min_size=1, max_size=9).map(lambda text: json.dumps({"text": text}).encode())
_PIECES = [b'{"text": "', b'"}', b'{"text": 1}', b"[]", b"\\ud800", b"\xff", b"\xe4\xbd\xa0", b" ", b"\r", b"\n", b"\0", b"\x1c"]
_PIECES += [b"x" * 90, b" " * 90]
_BYTES = st.lists(st.one_of(_GOOD, st.sampled_from(_PIECES), st.binary(max_size=5)), max_size=12).map(b"".join)


@settings(max_examples=200)
@given(lines=st.lists(st.one_of(_GOOD, _BYTES), max_size=8), compress=st.booleans(), share=st.sampled_from([0.4, 1.0]))
def test_of_any_bytes_every_line_is_read_or_put_aside(lines, compress, share, tmp_path_factory):
    """Good lines come through with their numbers, bad ones are counted, blank ones are neither."""
    folder, limit = tmp_path_factory.mktemp("bytes"), 80
    content = b"\n".join(lines)
    name = "a.jsonl.gz" if compress else "a.jsonl"
    (folder / name).write_bytes(gzip.compress(content) if compress else content)
    config = DocumentsConfig(source=str(folder), held_out_share=share, max_text_bytes=limit)
    good, bad, seen = {}, [], 0
    for split in ("train", "held_out"):
        with Quarantine(folder / f"{split}.bad") as quarantine:
            for file in list_source_files(config, split):
                good |= {document.name: document.text for document in read_source_file(config, file, split, quarantine)}
        entries = [json.loads(line) for line in (folder / f"{split}.bad").read_text().splitlines()]
        assert sum(quarantine.counts.bad.values()) == len(entries)
        bad += [entry["where"] for entry in entries]
        seen += quarantine.counts.seen
    lines = {f"{name}:{number}": line for number, line in enumerate(io.BytesIO(content), 1) if line.strip()}
    texts = {where: _good_text(line) for where, line in lines.items() if len(line) <= limit}
    assert good == {where: text for where, text in texts.items() if text is not None}
    assert sorted(bad) == sorted(lines.keys() - good.keys())
    assert seen == len(good) + len(bad) == len(lines)


class _Bucket(MemoryFileSystem):
    """A bucket in memory."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))


@pytest.fixture
def bucket(monkeypatch):
    """A folder on gs://, without the network and without gcsfs."""
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: _Bucket())
    return epath.Path("gs://bucket/corpus")


def test_a_bucket_is_read_as_a_disk_is(bucket, tmp_path):
    """The same documents under the same names, by folder and by pattern, and the same quarantine."""
    read = []
    for folder in (bucket, epath.Path(tmp_path)):
        for name, texts in {"en/a.jsonl.gz": ["one", "two"], "de/a.parquet": ["drei"], "b.txt": ["four"]}.items():
            _write(folder / "in" / name, texts)
        (folder / "in" / "en" / "z.jsonl").write_bytes(b'{"text": "five"}\n\xff\n')
        sides = []
        for source in (folder / "in", folder / "in" / "*" / "*", folder / "in" / "b.txt"):
            config = DocumentsConfig(source=str(source), held_out_share=1.0)
            with Quarantine(folder / "bad.jsonl") as quarantine:
                sides.append(list(read_documents(config, "held_out", quarantine)))
            sides.append((folder / "bad.jsonl").read_bytes())
            sides.append([(file.name, file.bytes) for file in list_source_files(config, "held_out")])
        read.append(sides)
    assert read[0] == read[1]
    assert [document.text for document in read[0][0]] == ["four", "drei", "one", "two", "five"]
    assert b"z.jsonl:2" in read[0][1]
    files = list_source_files(DocumentsConfig(source=str(bucket / "in")), "train")
    assert all(isinstance(file, SourceFile) and file.path.startswith("gs://bucket/corpus/in/") for file in files)
