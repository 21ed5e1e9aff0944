"""Packing: every position of every document once, in few rows."""

import itertools
import json
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import Document, PackedRows, TokenizerConfig, pack_documents, train_tokenizer

SPECIAL = SimpleNamespace(bos_id=1, eos_id=2, pad_id=0)


class Shards(list):
    """Documents in memory."""

    @property
    def lengths(self):
        return np.array([len(ids) for ids in self])


def _shards(lengths):
    """Documents of these lengths whose ids tell which document it is and where."""
    return Shards([np.arange(length) + 1000 * document + 10 for document, length in enumerate(lengths)])


def _pieces(packing):
    """(row, document, start, end) of every piece."""
    rows = np.repeat(np.arange(len(packing)), np.diff(packing.offsets))
    ends = packing.starts + packing.lengths
    return list(zip(rows.tolist(), packing.documents.tolist(), packing.starts.tolist(), ends.tolist(), strict=True))


def _slow_rooms(lengths, seq_len):
    """What the rows have left over, by the words of the definition."""
    left, rooms = sorted((length for length in lengths if length), reverse=True), []
    while left:
        room = seq_len
        while fitting := [length for length in left if length <= room]:
            pairs = [pair for pair in itertools.combinations(left, 2) if sum(pair) == room]
            for taken in (fitting[0],) if fitting[0] == room or not pairs else pairs[0]:
                left.remove(taken)
                room -= taken
        rooms.append(room)
    return sorted(rooms)


def _best_fit_rows(lengths, seq_len):
    """How many rows best fit takes, the longest pieces first."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= length), default=seq_len)
        if room in rooms:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 17), st.integers(0, 3))
def test_every_position_is_in_one_row(lengths, seq_len, seed):
    packing = pack_documents(np.array(lengths, np.int64), seq_len, seed)
    rows = [0] * len(packing)
    positions = []
    for row, document, start, end in _pieces(packing):
        assert 0 < end - start <= seq_len
        assert start % seq_len == 0  # whole pieces of a row, then the rest
        rows[row] += end - start
        positions += [(document, position) for position in range(start, end)]
    assert all(0 < size <= seq_len for size in rows)
    assert sorted(positions) == [(document, p) for document, length in enumerate(lengths) for p in range(length + 1)]
    full = sum((length + 1) // seq_len for length in lengths)
    expected = [0] * full + _slow_rooms([(length + 1) % seq_len for length in lengths], seq_len)
    assert sorted(seq_len - size for size in rows) == sorted(expected)


@pytest.mark.parametrize("least, most", [(1, 256), (60, 256), (80, 160)])
def test_rows_are_no_more_than_best_fit_takes(least, most):
    lengths = np.random.default_rng(0).integers(least, most, 2000)
    assert len(pack_documents(lengths, 512, 0)) <= _best_fit_rows(lengths + 1, 512)


def test_the_seed_decides():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, again, other = (pack_documents(lengths, 64, seed) for seed in (0, 0, 1))
    assert _pieces(first) == _pieces(again)
    assert first.fingerprint == again.fingerprint
    assert other.fingerprint != first.fingerprint
    assert {frozenset(p[1:] for p in _pieces(first) if p[0] == row) for row in range(len(first))} != {
        frozenset(p[1:] for p in _pieces(other) if p[0] == row) for row in range(len(other))
    }
    assert pack_documents(lengths + 1, 64, 0).fingerprint != first.fingerprint


def test_any_part_of_the_rows_is_a_fair_sample():
    """Packing puts the longest pieces into the first rows; then the rows are shuffled."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int) + 1
    packing = pack_documents(lengths, 512, 0)
    pieces = np.diff(packing.offsets)
    halves = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    assert abs(halves[0].mean() - halves[1].mean()) < 0.05 * pieces.mean()


@pytest.mark.parametrize("seq_len", [256, 512, 4096])
def test_little_is_padding_for_lengths_like_those_of_the_web(seq_len):
    lengths = np.random.default_rng(0).lognormal(6, 1.3, 50_000).astype(int) + 1
    packing = pack_documents(lengths, seq_len, 0)
    assert packing.pad_share < 0.005
    assert packing.pad_share == pytest.approx(1 - (lengths.sum() + len(lengths)) / (len(packing) * seq_len), abs=1e-12)


@pytest.mark.parametrize("seq_len", [1024, 4096])
def test_little_is_padding_for_real_documents(seq_len, published_data, tmp_path):
    """7,473 problems of grade-school mathematics; most have 100 to 300 tokens, so that in rows of 256 they would leave 9 %."""
    lines = (published_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    texts = [record["question"] + "\n" + record["answer"] for record in map(json.loads, lines)]
    documents = (Document(text, "") for text in texts[:1000])
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=2000), documents, tmp_path / "tokenizer")
    lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
    assert pack_documents(lengths, seq_len, 0).pad_share < 0.005


def test_a_row_must_have_positions():
    with pytest.raises(ValueError, match="seq_len must be positive, got 0"):
        pack_documents(np.array([1]), 0, 0)


def test_rows_by_hand():
    """A document of one row and one position more, one that fits beside that rest, and one of no ids."""
    shards = Shards([np.array([11, 12, 13, 14, 15]), np.array([21]), np.array([], int)])
    rows = PackedRows(shards, pack_documents(shards.lengths, 5, 0), SPECIAL)
    assert len(rows) == 2
    full, mixed = sorted((rows[0], rows[1]), key=lambda row: row["segment_ids"].max())
    assert {name: array.tolist() for name, array in full.items()} == {
        "tokens": [1, 11, 12, 13, 14], "targets": [11, 12, 13, 14, 15], "segment_ids": [1] * 5, "positions": [0, 1, 2, 3, 4],
        "loss_mask": [1] * 5,
    }  # fmt: skip
    # Which piece comes first is left to chance.
    pieces = [
        {name: mixed[name][mixed["segment_ids"] == segment].tolist() for name in ("tokens", "targets", "positions")}
        for segment in (1, 2, 3)
    ]
    assert sorted(pieces, key=lambda piece: piece["tokens"]) == [
        {"tokens": [1], "targets": [2], "positions": [0]},
        {"tokens": [1, 21], "targets": [21, 2], "positions": [0, 1]},
        {"tokens": [15], "targets": [2], "positions": [0]},
    ]
    assert {name: array[-1].item() for name, array in mixed.items()} == {
        "tokens": 0, "targets": 0, "segment_ids": 0, "positions": 0, "loss_mask": 0,
    }  # fmt: skip
    assert {name: array.dtype.name for name, array in full.items()} == {
        "tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "float32",
    }  # fmt: skip


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 12))
def test_exactly_one_bos_everywhere(lengths, seq_len):
    """Documents put together again from the rows' pieces: one BOS in front, every id and the end a target once."""
    shards = _shards(lengths)
    packing = pack_documents(shards.lengths, seq_len, 0)
    rows = PackedRows(shards, packing, SPECIAL)
    inputs, targets = ({} for _ in range(2))
    for row, document, start, _ in _pieces(packing):
        batch, piece = rows[row], [p[1:3] for p in _pieces(packing) if p[0] == row].index((document, start)) + 1
        here = batch["segment_ids"] == piece
        inputs[document, start] = batch["tokens"][here].tolist()
        targets[document, start] = batch["targets"][here].tolist()
        assert batch["positions"][here].tolist() == list(range(here.sum()))
        assert (batch["loss_mask"] == (batch["segment_ids"] > 0)).all()
    for document, ids in enumerate(shards):
        parts = sorted(key for key in inputs if key[0] == document)
        assert sum((inputs[part] for part in parts), []) == [1, *ids]
        assert sum((targets[part] for part in parts), []) == [*ids, 2]
