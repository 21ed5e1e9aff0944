"""Documents as ids on disk: all of them, the same whoever wrote them, and nothing damaged is taken for whole."""

import inspect
import io
import json
import pickle
import shutil
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import Document, TokenizerConfig, read_token_shards, train_tokenizer, write_token_shards
from data_pipelines.tokenization import token_shards

TEXTS = [part for module in (inspect, io, json, textwrap) for part in inspect.getsource(module).split("\n\n") if part]
DOCUMENTS = [Document(text, str(index)) for index, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TokenizerConfig(vocab_size=600), DOCUMENTS, tmp_path_factory.mktemp("workdir") / "tokenizer")


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "train"
    write_token_shards(iter(DOCUMENTS), tokenizer, folder, shard_tokens=10_000)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "copy")


def test_every_document_is_there(written, tokenizer):
    shards = read_token_shards(written, tokenizer, check_contents=True)
    expected = [tokenizer.encode(text) for text in TEXTS]
    assert len(shards) == shards.documents == len(TEXTS)
    assert [shards[index].tolist() for index in range(len(shards))] == expected
    assert [tokenizer.decode(shards[index]) for index in range(len(shards))] == TEXTS
    assert shards[3].dtype == np.uint16
    assert shards.lengths.tolist() == [len(ids) for ids in expected]
    assert shards.tokens == sum(map(len, expected))
    assert shards.text_bytes == len("".join(TEXTS).encode())
    assert shards.vocab_size == tokenizer.vocab_size
    with pytest.raises(IndexError, match=f"document {len(TEXTS)} of {len(TEXTS)}"):
        shards[len(TEXTS)]


def test_shards_are_closed_when_they_are_full(written):
    index = json.loads((written / "index.json").read_text())
    assert len(index["shards"]) > 3
    assert all(10_000 <= shard["tokens"] for shard in index["shards"][:-1])
    lengths = np.load(written / "lengths.npy")
    assert all(shard["tokens"] < 10_000 + lengths.max() for shard in index["shards"])
    assert sum(shard["documents"] for shard in index["shards"]) == len(TEXTS)
    names = {shard["file"] for shard in index["shards"]} | {"index.json", "lengths.npy"}
    assert {path.name for path in written.iterdir()} == names


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads_or_batches(threads, written, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "_BATCH_BYTES", 1 << (8 + threads))
    write_token_shards(DOCUMENTS, tokenizer, tmp_path / "again", shard_tokens=10_000, threads=threads)
    for path in written.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_more_ids_take_more_bytes(tokenizer, tmp_path):
    class Shifted:
        vocab_size, fingerprint = 1 << 17, "other"

        def encode_batch(self, texts, threads):
            return [[index + (1 << 16) for index in ids] for ids in tokenizer.encode_batch(texts)]

    shards = write_token_shards(DOCUMENTS[:3], Shifted(), tmp_path / "wide")
    assert shards[0].dtype == np.uint32
    assert (shards[0] - (1 << 16)).tolist() == tokenizer.encode(TEXTS[0])


def test_a_copy_in_another_process_reads_the_same(written):
    shards = read_token_shards(written)
    first = shards[5]  # opens a file
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shards))[5], first)


def test_the_fingerprint_is_that_of_all_ids(written, copy, tokenizer, tmp_path):
    shards = read_token_shards(written)
    assert read_token_shards(copy).fingerprint == shards.fingerprint
    changed = [DOCUMENTS[0]._replace(text=TEXTS[0][::-1]), *DOCUMENTS[1:]]
    other = write_token_shards(changed, tokenizer, tmp_path / "other", shard_tokens=10_000)
    assert other.fingerprint != shards.fingerprint


def test_files_elsewhere_are_written_by_way_of_local_ones(written, tokenizer, tmp_path, monkeypatch):
    """A bucket cannot be written by array_record itself."""
    opened = []
    writer = token_shards.array_record_module.ArrayRecordWriter
    spy = lambda path, options: opened.append(path) or writer(path, options)
    monkeypatch.setattr(token_shards.array_record_module, "ArrayRecordWriter", spy)
    monkeypatch.setattr(token_shards, "_is_remote", lambda path: True)
    write_token_shards(DOCUMENTS, tokenizer, tmp_path / "bucket", shard_tokens=10_000)
    assert opened and not any(path.startswith(str(tmp_path)) for path in opened)
    for path in written.iterdir():
        assert (tmp_path / "bucket" / path.name).read_bytes() == path.read_bytes(), path.name


def test_only_a_finished_folder_appears(tokenizer, tmp_path):
    def interrupted():
        yield from DOCUMENTS[:100]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_shards(interrupted(), tokenizer, tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == [".train.part"]
    assert not (tmp_path / ".train.part" / "index.json").exists()
    write_token_shards(DOCUMENTS[:5], tokenizer, tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    with pytest.raises(FileExistsError, match="train exists; read it with read_token_shards, or delete it"):
        write_token_shards(DOCUMENTS, tokenizer, tmp_path / "train")


def test_writing_nothing_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no document to tokenize"):
        write_token_shards([], tokenizer, tmp_path / "train")
    with pytest.raises(ValueError, match="shard_tokens must be positive, got 0"):
        write_token_shards(DOCUMENTS, tokenizer, tmp_path / "train", shard_tokens=0)
    assert not list(tmp_path.iterdir())


def test_tokenizer_hash_mismatch_refused(written, tokenizer, tmp_path):
    other = train_tokenizer(TokenizerConfig(vocab_size=601), DOCUMENTS, tmp_path / "other")
    message = (
        rf"another tokenizer \(600 ids, fingerprint {tokenizer.fingerprint[:12]}\) than the given one \(601 ids, fingerprint"
    )
    with pytest.raises(ValueError, match=message):
        read_token_shards(written, other)
    assert len(read_token_shards(written, tokenizer)) == len(TEXTS)


def _edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def test_another_format_is_refused(copy):
    _edit_index(copy, lambda index: index.update(format=2))
    with pytest.raises(ValueError, match="index.json is of format 2, this version reads 1; delete the folder and tokenize again"):
        read_token_shards(copy)


@pytest.mark.parametrize("name", ["index.json", "lengths.npy", "tokens-00001.array_record"])
def test_a_missing_file_is_named(name, copy):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} (is missing|does not exist).*; delete the folder and tokenize again"):
        read_token_shards(copy)


def test_a_truncated_shard_is_named(copy):
    shard = copy / "tokens-00001.array_record"
    content = shard.read_bytes()
    for end in (len(content) // 2, 0):
        shard.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"tokens-00001.array_record has {end} bytes, {len(content)} by index.json"):
            read_token_shards(copy)


@pytest.mark.parametrize("records", [0, 3])
def test_a_shard_with_fewer_records_is_named(records, copy):
    """A whole file, of a size that the index agrees with."""
    shard = copy / "tokens-00000.array_record"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for _ in range(records):
        writer.write(b"some")
    writer.close()
    _edit_index(copy, lambda index: index["shards"][0].update(bytes=shard.stat().st_size))
    with pytest.raises(ValueError, match=rf"tokens-00000.array_record has {records} records, \d+ by index.json; delete"):
        read_token_shards(copy)


def test_a_shard_that_is_no_array_record_is_named(copy):
    shard = copy / "tokens-00002.array_record"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    with pytest.raises(ValueError, match="tokens-00002.array_record is damaged"):
        read_token_shards(copy)


def test_a_flipped_bit_is_noticed(copy):
    """When the record is read, and before, by the hash of the file."""
    shard = copy / "tokens-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[10_000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens-00000.array_record has changed since it was written \(SHA-256\)"):
        read_token_shards(copy, check_contents=True)
    shards = read_token_shards(copy)
    with pytest.raises(ValueError, match=r"copy: document \d+ cannot be read .*; delete the folder and tokenize again"):
        for index in range(len(shards)):
            shards[index]


def test_lengths_that_changed_are_refused(copy):
    lengths = np.load(copy / "lengths.npy")
    np.save(copy / "lengths.npy", lengths + 1)
    with pytest.raises(ValueError, match=r"lengths.npy has changed since it was written \(SHA-256\)"):
        read_token_shards(copy)


def test_a_record_of_another_length_is_refused(written):
    shards = read_token_shards(written)
    shards.lengths[7] += 1
    with pytest.raises(ValueError, match=rf"document 7 has \d+ ids, {shards.lengths[7]} by lengths.npy"):
        shards[7]
