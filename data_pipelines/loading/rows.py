"""Rows of tokens, made as they are asked for."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.loading.fill_in_the_middle import SYMBOLS, move_middle
from data_pipelines.loading.packed_shards import PackedShards
from data_pipelines.tokenization.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Place(NamedTuple):
    """A row: how often its text has been gone through before, its file, and which of that file's rows it is."""

    epoch: int
    shard: int
    row: int


class RowMaker:
    """Makes the rows of packed shards. Can be pickled."""

    def __init__(self, packed: PackedShards, tokenizer: Tokenizer, seed: int):
        """tokenizer: whose special ids stand around documents; seed: of where middles are cut out.

        Raises:
          ValueError: middles are to be moved, and the tokenizer has no symbols for that.
        """
        self._packed, self._seed = packed, seed
        self._bos_id, self._eos_id, self._pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self._fim_ids = tuple(map(tokenizer.symbol_id, SYMBOLS)) if packed.fill_in_the_middle else None

    def make(self, places: Sequence[Place | None]) -> list[Batch]:
        """For each place tokens, targets, segment_ids, positions (int32) and loss_mask (float32), [seq_len] each.

        For None it is a row of padding. Rows of one file are read together.
        """
        by_shard = collections.defaultdict(set)
        for place in places:
            if place is not None:
                by_shard[place.shard].add(place.row)
        ids = {shard: self._read(shard, sorted(rows)) for shard, rows in by_shard.items()}
        return [self.padding() if place is None else self._row(place, ids[place.shard]) for place in places]

    def padding(self) -> Batch:
        """A row that counts for nothing."""
        return _row_of(self._packed.seq_len, self._pad_id)

    def _read(self, shard: int, rows: list[int]) -> dict[int, np.ndarray]:
        """By number, the ids of the documents that these rows have pieces of."""
        packing = self._packed.packing(shard)
        pieces = [packing.documents[packing.offsets[row] : packing.offsets[row + 1]] for row in rows]
        documents = np.unique(np.concatenate(pieces)).tolist()
        return dict(zip(documents, self._packed.shards.read_many(shard, documents), strict=True))

    def _row(self, place: Place, ids: dict[int, np.ndarray]) -> Batch:
        packing = self._packed.packing(place.shard)
        here = slice(int(packing.offsets[place.row]), int(packing.offsets[place.row + 1]))
        documents, starts = packing.documents[here].tolist(), packing.starts[here].tolist()
        lengths = packing.lengths[here].astype(np.int64)
        ends = np.cumsum(lengths)
        firsts, used = ends - lengths, int(ends[-1])
        moved = self._packed.moved_middles(place.shard) if self._fim_ids else None
        row = _row_of(self._packed.seq_len, self._pad_id)
        tokens, nexts = row["tokens"], np.empty(len(documents), np.int32)
        for piece, (document, start, at, end) in enumerate(zip(documents, starts, firsts.tolist(), ends.tolist(), strict=True)):
            text = ids[document]
            if moved is not None and moved[document]:
                text = move_middle(text, self._fim_ids, (self._seed, *place[:2], document))
            # Position p of a document holds its id p - 1; before the first there is bos, after the last comes eos.
            last = start + end - at - 1
            if start:
                tokens[at:end] = text[start - 1 : last]
            else:
                tokens[at] = self._bos_id
                tokens[at + 1 : end] = text[:last]
            nexts[piece] = text[last] if last < len(text) else self._eos_id
        row["targets"][: used - 1] = tokens[1:used]
        row["targets"][ends - 1] = nexts
        row["segment_ids"][:used] = np.repeat(np.arange(1, len(documents) + 1), lengths)
        row["positions"][:used] = np.arange(used) - np.repeat(firsts, lengths)
        row["loss_mask"][:used] = 1
        return row


def _row_of(seq_len: int, pad_id: int) -> Batch:
    return {
        "tokens": np.full(seq_len, pad_id, np.int32),
        "targets": np.full(seq_len, pad_id, np.int32),
        "segment_ids": np.zeros(seq_len, np.int32),
        "positions": np.zeros(seq_len, np.int32),
        "loss_mask": np.zeros(seq_len, np.float32),
    }
