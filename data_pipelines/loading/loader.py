"""Batches of packed rows: for training, shuffled and endless and able to go on from any step; for evaluation, once through."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
from absl import flags

from data_pipelines.loading.packing import Batch, PackedRows, pack_documents
from data_pipelines.tokenization.token_shards import TokenShards
from data_pipelines.tokenization.tokenizer import Tokenizer
from lfm_jax.configuration import ConfigError

# Batches that are made ahead of the one in use.
_AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows and batches are made of token shards.

    seq_len: positions of a row. batch_size: rows of a batch, over all hosts. epochs: how often the text is gone through; None:
    without end. seed: of the packing and of the order, which is another one in each epoch.
    workers: processes that make batches ahead; 0: a thread does.
    """

    seq_len: int
    batch_size: int
    epochs: int | None = None
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"workers and seed must not be negative, got {self.workers} and {self.seed}")


class DatasetIterator(Protocol):
    """Batches, and where in them one is: after `set_state` of what `get_state` gave, the same batches follow again."""

    def __iter__(self) -> "DatasetIterator": ...

    def __next__(self) -> Batch: ...

    def __len__(self) -> int:
        """How many there are in all, from the first on."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Small, and made of what JSON can hold."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, maybe on another number of hosts.

        Raises:
          ConfigError: the state is of other batches.
        """
        ...

    def close(self) -> None:
        """Ends the thread or the processes that make batches ahead."""
        ...


def training_batches(
    shards: TokenShards,
    config: LoaderConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> DatasetIterator:
    """This host's rows of each batch: arrays of [batch_size / process_count, seq_len], see `PackedRows`.

    The whole batch at a step depends on the shards, the configuration and the step alone; host h of H has rows h B / H to
    (h + 1) B / H of it. Every target of the text comes once in each epoch; a batch may reach into the next epoch, and the last
    one of all is filled up with rows of padding.

    Args:
      process_index, process_count: which host this is, of how many; None: as jax says.
    Raises:
      ValueError: `batch_size` is no multiple of the number of hosts.
    """
    packing = pack_documents(shards.lengths, config.seq_len, config.seed)
    rows = PackedRows(shards, packing, tokenizer)
    order = grain.MapDataset.source(rows).seed(config.seed).shuffle().repeat(config.epochs)
    batches = _host_batches(order, rows, config.batch_size, process_index, process_count)
    about = {"batch_size": config.batch_size, "seed": config.seed, "text": shards.fingerprint, "rows": packing.fingerprint}
    return _TrainingBatches(batches, about, config.workers)


def evaluation_batches(
    shards: TokenShards,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "EvaluationBatches":
    """Batches with every target of the text once, the same each time they are gone through.

    The order of the rows is shuffled once and for all, so that the first batches are a fair sample of the text. The last batch is
    filled up with rows of padding. Arguments and errors as for `training_batches`.
    """
    rows = PackedRows(shards, pack_documents(shards.lengths, seq_len, seed=0), tokenizer)
    return EvaluationBatches(_host_batches(grain.MapDataset.source(rows), rows, batch_size, process_index, process_count))


class EvaluationBatches:
    """Can be gone through any number of times, also in part."""

    def __init__(self, batches: grain.MapDataset):
        """batches: of this host."""
        self._batches = batches

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[step] for step in range(len(self)))


class _HostRows:
    """This host's rows, batch after batch, of a sequence of rows that is filled up to whole batches."""

    def __init__(self, order: grain.MapDataset, padding: Batch, batch_size: int, process_index: int, process_count: int):
        self._order, self._padding = order, padding
        self._batch_size, self._host_rows = batch_size, batch_size // process_count
        self._first = process_index * self._host_rows

    def __len__(self) -> int:
        batches = -(-len(self._order) // self._batch_size)
        return min(batches, sys.maxsize // self._batch_size) * self._host_rows  # without end: as long as a sequence can be

    def __getitem__(self, index: int) -> Batch:
        step, row = divmod(index, self._host_rows)
        row += step * self._batch_size + self._first
        return self._order[row] if row < len(self._order) else self._padding


def _host_batches(
    order: grain.MapDataset, rows: PackedRows, batch_size: int, process_index: int | None, process_count: int | None
) -> grain.MapDataset:
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is no multiple of the {process_count} hosts; choose one that is")
    host_rows = _HostRows(order, rows.empty_row(), batch_size, process_index, process_count)
    return grain.MapDataset.source(host_rows).batch(batch_size // process_count)


class _TrainingBatches:
    """The state is the step and what the batches depend on: where a step begins is known without having gone there."""

    def __init__(self, batches: grain.MapDataset, about: dict[str, Any], workers: int):
        self._batches, self._about, self._workers = batches, about, workers
        self._step = 0
        self._ahead: grain.DatasetIterator | None = None

    def __iter__(self) -> "_TrainingBatches":
        return self

    def __len__(self) -> int:
        return len(self._batches)

    def __next__(self) -> Batch:
        if self._step >= len(self._batches):
            self.close()
            raise StopIteration
        if self._ahead is None:
            self._ahead = iter(self._from(self._step))
        batch = next(self._ahead)
        self._step += 1
        return batch

    def _from(self, step: int) -> grain.IterDataset:
        remaining = self._batches[step:]
        if not self._workers:
            return remaining.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which without a command line have their defaults
            flags.FLAGS.mark_as_parsed()
        in_workers = remaining.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        return in_workers.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_AHEAD))

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, **self._about}

    def set_state(self, state: dict[str, Any]) -> None:
        then = {name: state.get(name) for name in self._about}
        changed = [f"{name} was {then[name]!r}, is {self._about[name]!r}" for name in then if then[name] != self._about[name]]
        if changed:
            raise ConfigError(
                f"the state is of other batches: {'; '.join(changed)}; go on with the same text and settings, or start anew"
            )
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
