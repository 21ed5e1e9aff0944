"""Rows kept beside the tokens: file by file, made once, gone on with, and refused when they are of something else."""

import errno
import json
import pickle
import shutil

import numpy as np
import pytest

from data_pipelines import (
    Document,
    TokenizerConfig,
    pack_documents,
    pack_shards,
    read_token_shards,
    train_tokenizer,
    write_token_shards,
)
from data_pipelines.loading import packed_shards
from data_pipelines.loading.fill_in_the_middle import grown_lengths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = " ".join(f"word{number} {number * 7919}" for number in range(500))
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(TokenizerConfig(vocab_size=290), [Document(words, "words")], folder)


@pytest.fixture
def shards(tokenizer, tmp_path):
    random = np.random.default_rng(0)
    documents = [Document("".join(map(chr, random.integers(97, 123, size))), "") for size in random.integers(1, 200, 60)]
    return write_token_shards(documents, tokenizer, tmp_path / "train", shard_tokens=1000)


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_file_is_packed_by_itself(shards):
    packed = pack_shards(shards, 48)
    assert len(packed.rows) == len(shards.shards) > 3
    positions = 0
    for shard in range(len(shards.shards)):
        found, expected = packed.packing(shard), pack_documents(shards.lengths_of(shard), 48, seed=shard)
        for array, other in zip(found[:-1], expected[:-1], strict=True):
            np.testing.assert_array_equal(array, other)
        assert packed.rows[shard] == len(found)
        positions += int(found.lengths.sum())
    assert positions == shards.tokens + shards.documents
    assert packed.pad_share == pytest.approx(1 - positions / (48 * packed.rows.sum()))
    # Chance is not the same in every file.
    assert packed.packing(0).documents[:5].tolist() != packed.packing(1).documents[:5].tolist()


def test_middles_are_counted(shards):
    packed = pack_shards(shards, 128, fill_in_the_middle=0.5)
    assert (shards.folder / "rows-128-fim-0.5").is_dir()
    for shard in range(len(shards.shards)):
        moved = packed.moved_middles(shard)
        grown = grown_lengths(shards.lengths_of(shard), moved)
        assert int(packed.packing(shard).lengths.sum()) == int((grown + 1).sum())
    assert sum(packed.moved_middles(shard).sum() for shard in range(len(shards.shards))) > 10


def test_rows_are_made_once_and_gone_on_with(shards, tokenizer, monkeypatch):
    """What a stopped call has finished is not done again, and the outcome is the same to the byte."""
    expected = pack_shards(shards, 48)
    folder, part = shards.folder / "rows-48", shards.folder / f".rows-48.{shards.fingerprint[:16]}.part"
    complete = _content(folder)
    shutil.rmtree(folder)
    packed, stop_after = [], 3

    def stopping(lengths, seq_len, seed):
        if len(packed) == stop_after:
            raise KeyboardInterrupt
        packed.append(seed)
        return pack_documents(lengths, seq_len, seed)

    monkeypatch.setattr(packed_shards, "pack_documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack_shards(shards, 48)
    assert not folder.exists()
    (part / ".00003.npy.1").write_bytes(b"half")
    stop_after = None
    again = pack_shards(shards, 48)
    assert packed == list(range(len(shards.shards)))
    assert {name: content for name, content in _content(folder).items() if not name.startswith(".")} == complete
    assert again.fingerprint == expected.fingerprint and not part.exists()
    pack_shards(read_token_shards(shards.folder, tokenizer), 48)
    assert packed == list(range(len(shards.shards)))


def test_runs_that_pack_at_the_same_time_do_not_disturb_each_other(shards, monkeypatch):
    """While one is at a file, another finishes all of them and lets the folder appear."""
    original, others = packed_shards.pack_documents, []

    def disturbed(lengths, seq_len, seed):
        if seed == 2 and not others:
            others.append(None)
            others[0] = pack_shards(shards, 48)
        return original(lengths, seq_len, seed)

    monkeypatch.setattr(packed_shards, "pack_documents", disturbed)
    assert pack_shards(shards, 48).fingerprint == others[0].fingerprint
    assert not [path.name for path in shards.folder.iterdir() if path.name.startswith(".rows")]


@pytest.mark.parametrize("error", [FileExistsError("there"), OSError(errno.ENOTEMPTY, "not empty"), FileNotFoundError("gone")])
def test_a_folder_that_another_run_lets_appear_first_is_read(error, shards, monkeypatch):
    def second(part, folder):
        publish(part, folder)
        raise error

    publish = packed_shards.publish
    monkeypatch.setattr(packed_shards, "publish", second)
    assert pack_shards(shards, 48).rows.sum() > 0


def test_what_cannot_be_written_is_said(shards, monkeypatch):
    def failing(lengths, seq_len, seed):
        raise FileNotFoundError("the disk is gone")

    monkeypatch.setattr(packed_shards, "pack_documents", failing)
    with pytest.raises(FileNotFoundError, match="the disk is gone"):
        pack_shards(shards, 48)


def test_several_processes_pack_the_same(shards):
    expected = pack_shards(shards, 48)
    complete = _content(shards.folder / "rows-48")
    shutil.rmtree(shards.folder / "rows-48")
    assert pack_shards(shards, 48, processes=2).fingerprint == expected.fingerprint
    assert _content(shards.folder / "rows-48") == complete


def test_a_copy_sent_to_another_process_reads_the_same(shards):
    packed = pack_shards(shards, 48)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(packed)).packing(2).documents, packed.packing(2).documents)


def test_damage_is_noticed(shards):
    packed = pack_shards(shards, 48)
    folder = shards.folder / "rows-48"
    content = bytearray((folder / "00001.npy").read_bytes())
    content[-1] ^= 1
    (folder / "00001.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows-48/00001.npy has changed since it was written"):
        packed.packing(1)
    (folder / "00002.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"rows-48/00002.npy is missing; delete the folder"):
        packed.packing(2)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"tokens": "other"}))
    with pytest.raises(ValueError, match="rows-48 holds the rows of other tokens"):
        pack_shards(shards, 48)
    with pytest.raises(ValueError, match="seq_len must be positive, got 0"):
        pack_shards(shards, 0)
