"""Batches of packed rows: for training, shuffled and endless and able to go on from any step; for evaluation, once through."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol

import grain
import jax
import numpy as np
from absl import flags

from data_pipelines.loading.mixture import Mixture, Share, Stage, StageConfig
from data_pipelines.loading.order import RowOrder
from data_pipelines.loading.packed_shards import PackedShards, pack_shards
from data_pipelines.loading.rows import Batch, Place, RowMaker
from data_pipelines.tokenization.token_shards import TokenShards
from data_pipelines.tokenization.tokenizer import Tokenizer
from lfm_jax.configuration import ConfigError

# Batches that are made ahead of the one in use.
_AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows and batches are made of token shards.

    seq_len: positions of a row. batch_size: rows of a batch, over all hosts.
    epochs: how often the text is gone through; of several sources, none more often. None: without end.
    weights: shares of rows that the sources have, whatever they add up to; none: by how many rows they have.
    stages: from which step on something of this changes.
    order: "shuffled", or "difficulty": the files by the difficulty of their texts, the easy ones first, in each epoch.
    window_files: files of token shards whose rows are shuffled together, so that only so many are read at a time; None: all,
      and by "difficulty" one: all rows together would come in no order.
    fill_in_the_middle: share of the documents that fit into a row whose middle is told last.
    seed: of the order and of where middles are cut out; the order is another one in each epoch.
    workers: processes that make batches ahead; 0: a thread does.
    """

    seq_len: int
    batch_size: int
    epochs: int | None = None
    weights: tuple[float, ...] = ()
    stages: tuple[StageConfig, ...] = ()
    order: Literal["shuffled", "difficulty"] = "shuffled"
    window_files: int | None = None
    fill_in_the_middle: float = 0.0
    seed: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "epochs", "window_files"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"workers and seed must not be negative, got {self.workers} and {self.seed}")
        if not 0 <= self.fill_in_the_middle <= 1:
            raise ValueError(f"fill_in_the_middle must be between 0 and 1, got {self.fill_in_the_middle}")
        starts = [stage.from_step for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages must begin one after the other, got from_step {', '.join(map(str, starts))}")
        for weights in (self.weights, *(stage.weights or () for stage in self.stages)):
            if weights and (min(weights) < 0 or sum(weights) <= 0):
                raise ValueError(f"weights must not be negative, and not all 0, got {weights}")

    def shapes(self) -> list[tuple[int, int]]:
        """(rows, positions) of the batches of each stage."""
        shapes = [(self.batch_size, self.seq_len)]
        for stage in self.stages:
            shapes.append((stage.batch_size or shapes[-1][0], stage.seq_len or shapes[-1][1]))
        return shapes

    def positions(self, steps: int) -> int:
        """Positions of the first `steps` batches."""
        starts = [0, *(stage.from_step for stage in self.stages)]
        ends = [*starts[1:], steps]
        return sum(
            max(0, min(end, steps) - start) * rows * seq_len
            for start, end, (rows, seq_len) in zip(starts, ends, self.shapes(), strict=True)
        )


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

    def shares(self, step: int) -> list[Share]:
        """What each source gives to a step."""
        ...

    def close(self) -> None:
        """Ends the thread or the processes that make batches ahead."""
        ...


class Packed(Protocol):
    """Rows of a source, of one length. rows: [files] int64, of each file. fingerprint: of all that they are made of."""

    rows: np.ndarray
    fingerprint: str


class Maker(Protocol):
    """What makes them."""

    def make(self, places: Sequence[Place | None]) -> list[Batch]:
        """The rows of some places, see `RowMaker`."""
        ...


def training_batches(
    sources: Sequence[TokenShards],
    config: LoaderConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> DatasetIterator:
    """This host's rows of each batch: arrays of [batch_size / process_count, seq_len], see `RowMaker`.

    The whole batch at a step depends on the sources, the configuration and the step alone; host h of H has rows h B / H to
    (h + 1) B / H of it. Every target of a source comes once in each time that it is gone through; a batch may reach from one time
    into the next, and what the last one of all lacks is filled up with rows of padding. Rows of another length begin anew.

    Args:
      process_index, process_count: which host this is, of how many; None: as jax says.
    Raises:
      ValueError: a batch cannot be shared evenly by the hosts, weights do not fit the sources, or shards that do not know how
        difficult they are should come in that order.
    """
    packed = {
        seq_len: [pack_shards(shards, seq_len, fill_in_the_middle=config.fill_in_the_middle) for shards in sources]
        for _, seq_len in config.shapes()
    }
    makers = {n: [RowMaker(each, tokenizer, config.seed) for each in several] for n, several in packed.items()}
    return training_batches_of(packed, makers, config, process_index=process_index, process_count=process_count)


def training_batches_of(
    packed: Mapping[int, Sequence[Packed]],
    makers: Mapping[int, Sequence[Maker]],
    config: LoaderConfig,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> DatasetIterator:
    """`training_batches` of rows of any kind. packed, makers: by the length of the rows, of each source; they can be pickled."""
    return _TrainingBatches(_HostBatches(packed, makers, config, process_index, process_count), config.workers)


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
    packed = pack_shards(shards, seq_len)
    maker = RowMaker(packed, tokenizer, seed=0)
    return evaluation_batches_of(packed, maker, seq_len, batch_size, process_index=process_index, process_count=process_count)


def evaluation_batches_of(
    packed: Packed,
    maker: Maker,
    seq_len: int,
    batch_size: int,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "EvaluationBatches":
    """`evaluation_batches` of rows of any kind."""
    config = LoaderConfig(seq_len=seq_len, batch_size=batch_size, epochs=1)
    return EvaluationBatches(_HostBatches({seq_len: [packed]}, {seq_len: [maker]}, config, process_index, process_count))


def len_of(packed: Packed) -> int:
    """The number of rows."""
    return int(packed.rows.sum())


def _host(index: int | None, count: int | None) -> tuple[int, int]:
    return jax.process_index() if index is None else index, jax.process_count() if count is None else count


def _stages(config: LoaderConfig, rows: Sequence[int], hosts: int) -> list[Stage]:
    """The stages with everything filled in."""
    weights: Sequence[float] = config.weights or rows
    stages = []
    changes = [StageConfig(from_step=1), *config.stages]
    for change, (batch_size, seq_len) in zip(changes, config.shapes(), strict=True):
        if batch_size % hosts:
            raise ValueError(f"batch_size {batch_size} is no multiple of the {hosts} hosts; choose one that is")
        weights = change.weights or weights
        if len(weights) != len(rows):
            raise ValueError(
                f"weights {tuple(weights)} are for {len(weights)} sources, and there are {len(rows)}; give one for each"
            )
        exact = [Fraction(str(weight)) for weight in weights]
        shares = tuple(weight / sum(exact) for weight in exact)
        stages.append(Stage(change.from_step if stages else 0, seq_len, batch_size, shares))
    return stages


class EvaluationBatches:
    """Can be gone through any number of times, also in part."""

    def __init__(self, batches: "_HostBatches"):
        """batches: of this host."""
        self._batches = batches

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self._batches[step] for step in range(len(self)))


class _HostBatches:
    """This host's rows of the batch of any step, computed from the step. Can be pickled."""

    def __init__(
        self,
        packed: Mapping[int, Sequence[Packed]],
        makers: Mapping[int, Sequence[Maker]],
        config: LoaderConfig,
        process_index: int | None,
        process_count: int | None,
    ):
        self._packed, self._makers, self._config = packed, makers, config
        self._process_index, self._process_count = _host(process_index, process_count)
        self._stages = _stages(config, [len_of(each) for each in packed[config.seq_len]], self._process_count)
        limits = None
        if config.epochs is not None:
            limits = {n: [config.epochs * len_of(each) for each in several] for n, several in packed.items()}
        self._mixture = Mixture(self._stages, limits)
        self._orders = {n: [_order(each, config) for each in several] for n, several in packed.items()}

    def __len__(self) -> int:
        return self._mixture.steps()

    def __getitem__(self, step: int) -> Batch:
        stage = self._stages[self._mixture.stage(step)]
        wanted = [
            (source, number)
            for source, share in enumerate(self._mixture.shares(step))
            for number in range(share.first, share.first + share.count)
        ]
        if len(self._packed[stage.seq_len]) > 1:  # or each host would have sources of its own
            wanted = [wanted[at] for at in np.random.default_rng([self._config.seed, step]).permutation(len(wanted))]
        size = stage.batch_size // self._process_count
        mine = wanted[self._process_index * size : (self._process_index + 1) * size]
        rows: list[Batch | None] = [None] * size
        for source, (maker, order) in enumerate(zip(self._makers[stage.seq_len], self._orders[stage.seq_len], strict=True)):
            at = [position for position, (of, _) in enumerate(mine) if of == source]
            places = [self._place(order, mine[position][1]) for position in at]
            for position, row in zip(at, maker.make(places), strict=True):
                rows[position] = row
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _place(self, order: RowOrder, number: int) -> Place | None:
        over = self._config.epochs is not None and number >= self._config.epochs * len(order)
        return None if over else order[number]

    def shares(self, step: int) -> list[Share]:
        """What each source gives to a step."""
        return self._mixture.shares(step)

    def about(self, step: int) -> dict[str, Any]:
        """What the batches up to a step depend on, in a form to compare."""
        config, begun = self._config, self._stages[: self._mixture.stage(step) + 1]
        return {
            "batch_size": [stage.batch_size for stage in begun],
            "from_step": [stage.from_step for stage in begun],
            "weights": [[str(weight) for weight in stage.weights] for stage in begun],
            "seed": config.seed,
            "order": [config.order, self._orders[config.seq_len][0].window],
            "rows": [[packed.fingerprint for packed in self._packed[stage.seq_len]] for stage in begun],
        }


def _order(packed: PackedShards, config: LoaderConfig) -> RowOrder:
    difficulty = None
    if config.order == "difficulty":
        found = [shard.difficulty for shard in packed.shards.shards]
        if None in found:
            raise ValueError(
                "order is 'difficulty', but these texts have none; prepare them with configs/prepare_data.py, or take 'shuffled'"
            )
        difficulty = np.array(found)
    return RowOrder(packed.rows, seed=config.seed, window=config.window_files, difficulty=difficulty)


class _TrainingBatches:
    """The state is the step and what the batches depend on: where a step begins is known without having gone there."""

    def __init__(self, batches: _HostBatches, workers: int):
        self._batches, self._workers = batches, workers
        self._steps = len(batches)
        self._step = 0
        self._ahead: grain.DatasetIterator | None = None

    def __iter__(self) -> "_TrainingBatches":
        return self

    def __len__(self) -> int:
        return self._steps

    def __next__(self) -> Batch:
        if self._step >= self._steps:
            self.close()
            raise StopIteration
        if self._ahead is None:
            self._ahead = iter(self._from(self._step))
        batch = next(self._ahead)
        self._step += 1
        return batch

    def _from(self, step: int) -> grain.IterDataset:
        remaining = grain.MapDataset.source(self._batches)[step:]
        if not self._workers:
            return remaining.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
        if not flags.FLAGS.is_parsed():  # grain reads flags of its own, which without a command line have their defaults
            flags.FLAGS.mark_as_parsed()
        in_workers = remaining.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        return in_workers.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_AHEAD))

    def shares(self, step: int) -> list[Share]:
        return self._batches.shares(step)

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, **self._batches.about(self._step)}

    def set_state(self, state: dict[str, Any]) -> None:
        now = self._batches.about(state["step"])
        changed = [f"{name} was {state.get(name)!r}, is {now[name]!r}" for name in now if state.get(name) != now[name]]
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
