"""From Python's own sources to batches, through every step on the way."""

import collections
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import (
    DocumentsConfig,
    LoaderConfig,
    TokenizerConfig,
    evaluation_batches,
    load_tokenizer,
    ngram_bits_per_byte,
    pack_documents,
    read_documents,
    read_token_shards,
    train_tokenizer,
    training_batches,
    write_token_shards,
)

PACKAGES = ("json", "logging", "email", "asyncio", "unittest", "tomllib")
ONE_HOST = {"process_index": 0, "process_count": 1}
LIBRARY = DocumentsConfig(source="stdlib")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Tokenizer and tokens of a few packages of the standard library."""
    library, workdir = tmp_path_factory.mktemp("lib"), tmp_path_factory.mktemp("workdir")
    for package in PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, library / package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name: str(library))
        tokenizer = train_tokenizer(TokenizerConfig(vocab_size=2000), read_documents(LIBRARY, "train"), workdir / "tokenizer")
        for split in ("train", "held_out"):
            write_token_shards(read_documents(LIBRARY, split), tokenizer, workdir / split, shard_tokens=100_000)
        texts = {split: [document.text for document in read_documents(LIBRARY, split)] for split in ("train", "held_out")}
    return workdir, texts


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_token_is_a_target_once_per_epoch(split, workdir):
    """Counted in the text itself, encoded again, against what arrives in the batches of two epochs and of an evaluation."""
    folder, texts = workdir
    tokenizer = load_tokenizer(folder / "tokenizer")
    shards = read_token_shards(folder / split, tokenizer)
    expected = np.zeros(tokenizer.vocab_size, np.int64)
    for ids in tokenizer.encode_batch(texts[split]):
        np.add.at(expected, [*ids, tokenizer.eos_id], 1)
    config = LoaderConfig(seq_len=128, batch_size=8, epochs=2)
    for epochs, batches in (
        (2, training_batches([shards], config, tokenizer, **ONE_HOST)),
        (1, evaluation_batches(shards, tokenizer, seq_len=128, batch_size=8, **ONE_HOST)),
    ):
        targets, inputs = np.zeros_like(expected), collections.Counter()
        for batch in batches:
            np.add.at(targets, batch["targets"].ravel(), batch["loss_mask"].ravel().astype(np.int64))
            inputs["documents"] += int((batch["tokens"] == tokenizer.bos_id).sum())
        np.testing.assert_array_equal(targets, epochs * expected)
        assert inputs["documents"] == epochs * len(texts[split])
    assert shards.text_bytes == sum(len(text.encode()) for text in texts[split])


def test_the_text_can_be_read_off_the_batches(workdir):
    folder, texts = workdir
    tokenizer = load_tokenizer(folder / "tokenizer")
    shards = read_token_shards(folder / "held_out", tokenizer)
    longest = int(shards.lengths.max()) + 1
    found = []
    for batch in evaluation_batches(shards, tokenizer, seq_len=longest, batch_size=2, **ONE_HOST):
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                assert tokens[here][0] == tokenizer.bos_id and targets[here][-1] == tokenizer.eos_id
                found.append(tokenizer.decode(targets[here][:-1]))
    assert sorted(found) == sorted(texts["held_out"])


@pytest.mark.parametrize("seq_len", [256, 512])
def test_little_of_the_librarys_rows_is_padding(seq_len, workdir):
    shards = read_token_shards(workdir[0] / "train")
    packing = pack_documents(shards.lengths, seq_len, 0)
    assert packing.pad_share < 0.005


def test_a_bigram_model_knows_more_than_a_unigram_model(workdir):
    folder, _ = workdir
    tokenizer = load_tokenizer(folder / "tokenizer")
    train, held_out = (read_token_shards(folder / split, tokenizer) for split in ("train", "held_out"))
    bits = ngram_bits_per_byte(train, held_out, tokenizer)
    assert 1 < bits["bigram_bits_per_byte"] < bits["unigram_bits_per_byte"] < 5
