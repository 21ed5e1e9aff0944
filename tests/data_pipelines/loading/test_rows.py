"""Rows: every id of every document once as input and once as target, with the symbols around it."""

from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import pack_documents
from data_pipelines.loading.fill_in_the_middle import chosen_documents, grown_lengths
from data_pipelines.loading.rows import Place, RowMaker

FIM = {"<|fim_pre|>": 3, "<|fim_mid|>": 4, "<|fim_suf|>": 5}
SPECIAL = SimpleNamespace(bos_id=1, eos_id=2, pad_id=0, symbol_id=FIM.__getitem__)


class Packed:
    """Packed documents in memory, in one file."""

    def __init__(self, documents, seq_len, share=0.0):
        self.documents, self.seq_len, self.fill_in_the_middle = documents, seq_len, share
        self.shards = SimpleNamespace(read_many=lambda shard, wanted: [documents[document] for document in wanted])
        lengths = np.array([len(ids) for ids in documents])
        self._moved = chosen_documents(lengths, seq_len, share, 0)
        self._packing = pack_documents(grown_lengths(lengths, self._moved), seq_len, 0)

    def packing(self, shard):
        assert shard == 0
        return self._packing

    def moved_middles(self, shard):
        return self._moved


def _documents(lengths):
    """Documents of these lengths whose ids tell which document it is and where."""
    return [np.arange(length) + 1000 * document + 10 for document, length in enumerate(lengths)]


def _pieces(packing):
    """(row, document, start) of every piece."""
    rows = np.repeat(np.arange(len(packing)), np.diff(packing.offsets))
    return list(zip(rows.tolist(), packing.documents.tolist(), packing.starts.tolist(), strict=True))


def _rows(packed, epoch=0):
    count = len(packed.packing(0))
    return RowMaker(packed, SPECIAL, seed=0).make([Place(epoch, 0, row) for row in range(count)])


def test_rows_by_hand():
    """A document of one row and one position more, one that fits beside that rest, and one of no ids."""
    rows = _rows(Packed([np.array([11, 12, 13, 14, 15]), np.array([21]), np.array([], int)], 5))
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
    packed = Packed(_documents(lengths), seq_len)
    rows, pieces = _rows(packed), _pieces(packed.packing(0))
    inputs, targets = ({} for _ in range(2))
    for row, document, start in pieces:
        batch, piece = rows[row], [p[1:] for p in pieces if p[0] == row].index((document, start)) + 1
        here = batch["segment_ids"] == piece
        inputs[document, start] = batch["tokens"][here].tolist()
        targets[document, start] = batch["targets"][here].tolist()
        assert batch["positions"][here].tolist() == list(range(here.sum()))
        assert (batch["loss_mask"] == (batch["segment_ids"] > 0)).all()
    for document, ids in enumerate(packed.documents):
        parts = sorted(key for key in inputs if key[0] == document)
        assert sum((inputs[part] for part in parts), []) == [1, *ids]
        assert sum((targets[part] for part in parts), []) == [*ids, 2]


def test_places_come_in_the_order_they_are_asked_for():
    packed = Packed(_documents([9, 4, 7, 30]), 8)
    maker, rows = RowMaker(packed, SPECIAL, seed=0), _rows(packed)
    found = maker.make([Place(0, 0, 3), None, Place(5, 0, 0), Place(0, 0, 3)])
    assert [row["loss_mask"].sum() == 0 for row in found] == [False, True, False, False]
    for row, expected in zip(found, (rows[3], maker.padding(), rows[0], rows[3]), strict=True):
        for name in expected:
            np.testing.assert_array_equal(row[name], expected[name])


def test_middles_are_moved_anew_in_each_epoch_and_nothing_is_lost():
    packed = Packed(_documents([6, 9, 3, 40, 12, 5, 7, 8]), 16, share=1.0)
    seen = []
    for epoch in range(3):
        rows, told = _rows(packed, epoch), {}
        for row, document, start in _pieces(packed.packing(0)):
            piece = [p[1:] for p in _pieces(packed.packing(0)) if p[0] == row].index((document, start)) + 1
            told.setdefault(document, {})[start] = rows[row]["tokens"][rows[row]["segment_ids"] == piece].tolist()
        for document, parts in told.items():
            ids = packed.documents[document].tolist()
            text = sum((parts[start] for start in sorted(parts)), [])
            assert text[0] == 1
            if len(ids) + 4 > 16:
                assert text[1:] == ids
                continue
            suffix, middle = text.index(5), text.index(4)
            assert text[1] == 3
            assert text[2:suffix] + text[middle + 1 :] + text[suffix + 1 : middle] == ids
        seen.append(told)
    assert seen[0] != seen[1] != seen[2]


def test_a_tokenizer_without_the_symbols_is_refused():
    def missing(symbol):
        raise ValueError(f"the tokenizer has no {symbol}")

    special = SimpleNamespace(bos_id=1, eos_id=2, pad_id=0, symbol_id=missing)
    RowMaker(Packed(_documents([3]), 8), special, seed=0)
    with pytest.raises(ValueError, match="no <|fim_pre|>"):
        RowMaker(Packed(_documents([3]), 8, share=0.5), special, seed=0)
