"""Packing: every position of every document once, in few rows."""

import itertools
import json
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import Document, TokenizerConfig, pack_documents, train_tokenizer


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


def test_memory_grows_with_the_length_of_a_row_and_not_with_its_square():
    tracemalloc.start()
    try:
        pack_documents(np.array([5]), 1 << 15, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256 << 15  # a list for each length and more; a bit for each pair of lengths would be 70 MB


def test_a_row_must_have_positions():
    with pytest.raises(ValueError, match="seq_len must be positive, got 0"):
        pack_documents(np.array([1]), 0, 0)
