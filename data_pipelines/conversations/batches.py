"""Batches of conversations: packed, shuffled, mixed and resumed as texts are, with the mask of what is trained."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.conversations.examples import Examples
from data_pipelines.loading.loader import (
    DatasetIterator,
    EvaluationBatches,
    LoaderConfig,
    evaluation_batches_of,
    training_batches_of,
)
from data_pipelines.loading.packing import Packing, pack_documents
from data_pipelines.loading.rows import Batch, Place
from data_pipelines.tokenization.tokenizer import Tokenizer


class PackedConversations:
    """Examples in rows of a fixed length. Can be pickled.

    An example is never in two rows: what a row has no place for is cut off at its end, and of what is left without anything that
    is trained nothing is used.

    seq_len: positions of a row. rows: [1] int64, their number, as of one file. pad_share: the share of positions that no example
    has. truncated: examples that were cut; cut_tokens: ids that they have lost; dropped: those of them that had nothing left to
    train on, and are not used. fingerprint: of all of it.
    """

    def __init__(self, examples: Examples, seq_len: int):
        """Raises ValueError if seq_len is not positive, or so small that nothing that is trained is left."""
        self._examples, self.seq_len = examples, seq_len
        positions = examples.lengths - 1  # the last id is no input
        self._used = np.array([n for n in range(len(examples)) if examples[n][1][1 : seq_len + 1].any()], np.int64)
        if not len(self._used):
            raise ValueError(f"no example has an answer in its first {seq_len} tokens; raise seq_len")
        kept = np.minimum(positions[self._used], seq_len)
        self.truncated = int(np.sum(positions > seq_len))
        self.cut_tokens = int(np.sum(np.maximum(positions - seq_len, 0)))
        self.dropped = len(examples) - len(self._used)
        self._packing = pack_documents(kept - 1, seq_len, seed=0)
        self.rows = np.array([len(self._packing)], np.int64)
        self.pad_share = self._packing.pad_share
        self.fingerprint = hashlib.sha256(f"{examples.fingerprint} {self._packing.fingerprint}".encode()).hexdigest()

    def packing(self, shard: int) -> Packing:
        """Which of the used examples are in which row. shard: 0, for there is no other."""
        return self._packing

    def examples_of(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The examples of a row: ids and which are trained, as far as they have a place; at most seq_len + 1 each."""
        here = self._packing.documents[self._packing.offsets[row] : self._packing.offsets[row + 1]]
        examples = [self._examples[int(self._used[document])] for document in here]
        return [(ids[: self.seq_len + 1], trained[: self.seq_len + 1]) for ids, trained in examples]


class _RowMaker:
    """Makes the rows of packed conversations. Can be pickled."""

    def __init__(self, packed: PackedConversations, pad_id: int):
        self._packed, self._pad_id = packed, pad_id

    def make(self, places: Sequence[Place | None]) -> list[Batch]:
        """The same arrays as of texts, see `data_pipelines.loading.rows.RowMaker`; loss_mask is 1 where a target is trained."""
        return [self._row([] if place is None else self._packed.examples_of(place.row)) for place in places]

    def _row(self, examples: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        row = {name: np.zeros(self._packed.seq_len, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        row["loss_mask"] = np.zeros(self._packed.seq_len, np.float32)
        row["tokens"][:] = row["targets"][:] = self._pad_id
        first = 0
        for segment, (ids, trained) in enumerate(examples, 1):
            here = slice(first, first := first + len(ids) - 1)
            row["tokens"][here], row["targets"][here], row["loss_mask"][here] = ids[:-1], ids[1:], trained[1:]
            row["segment_ids"][here], row["positions"][here] = segment, np.arange(len(ids) - 1)
        return row


def conversation_batches(
    sources: Sequence[Examples],
    config: LoaderConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> DatasetIterator:
    """This host's rows of each batch, as `training_batches` gives them of texts: what is said there holds here.

    Args:
      sources: conversations of each source; `config.weights` are their shares of the rows.
      process_index, process_count: which host this is, of how many; None: as jax says.
    Raises:
      ValueError: another tokenizer made the ids, a batch cannot be shared evenly by the hosts, weights do not fit the sources, or
        an order or a change is asked for that conversations do not have.
    """
    if config.order != "shuffled" or config.fill_in_the_middle:
        raise ValueError(
            f"conversations come shuffled and as they are, not with order {config.order!r} and fill_in_the_middle "
            f"{config.fill_in_the_middle}; leave both as they are by default"
        )
    packed = {seq_len: [_packed(each, seq_len, tokenizer) for each in sources] for _, seq_len in config.shapes()}
    makers = {seq_len: [_RowMaker(each, tokenizer.pad_id) for each in several] for seq_len, several in packed.items()}
    return training_batches_of(packed, makers, config, process_index=process_index, process_count=process_count)


def conversation_evaluation_batches(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> EvaluationBatches:
    """Batches with every example once, as `evaluation_batches` gives them of texts. Arguments and errors as above."""
    packed = _packed(examples, seq_len, tokenizer)
    maker = _RowMaker(packed, tokenizer.pad_id)
    return evaluation_batches_of(packed, maker, seq_len, batch_size, process_index=process_index, process_count=process_count)


def _packed(examples: Examples, seq_len: int, tokenizer: Tokenizer) -> PackedConversations:
    if examples.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"the conversations were encoded by the tokenizer {examples.tokenizer[:12]}, not by {tokenizer.fingerprint[:12]}; "
            "encode them again"
        )
    return PackedConversations(examples, seq_len)
