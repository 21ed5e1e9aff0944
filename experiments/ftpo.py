"""Final-token preference optimisation: a model learns, where it began to loop, to say something else that may stand there."""

import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_pipelines import LoaderConfig, Tokenizer
from data_pipelines.conversations.reading import split_fraction
from data_pipelines.loading.loader import evaluation_batches_of, training_batches_of
from data_pipelines.loading.rows import Batch, Place
from data_pipelines.sources.text_files import find_text_files
from experiments.accounting import run_accounted
from experiments.export import ExportConfig
from experiments.fine_tuning import Measure, begin, fine_tune
from experiments.json_lines import read_lines
from experiments.stages import Stage, check_evaluation_batches
from lfm_jax.configuration import ConfigError, mistakes_in, to_mapping
from lfm_jax.generation import MOST_TOP_LOG_PROBS
from lfm_jax.models import ComputeConfig
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankConfig
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    FinalTokenConfig,
    OptimizerConfig,
    TrainConfig,
    as_fed,
    final_token_objective,
    host_part,
    make_eval_step,
    make_final_token_logits_step,
    make_schedule,
    place_batch,
    read_metrics,
)
from lfm_jax.training.fingerprint import fingerprints
from lfm_jax.training.goodput import Ledger

# Room for chosen tokens: a power of two, which divides over devices as sequences do.
_CHOICES = 1 << (MOST_TOP_LOG_PROBS - 1).bit_length()
_MOST_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of final-token preference optimisation.

    init_from: a workdir or a Hugging Face folder, whose model is trained on, and is the reference.
    pairs: a file, folder or pattern of what configs/preference_data.py:loops writes. held_out_share: of the prompts, whose pairs
      are measured and not trained on.
    flatten: how far a token that is rejected more often than the median one is brought down to that, by leaving out pairs: of c
      pairs c (median / c)^flatten stay; 0: all, 1: as many as of the median one. 0.3 is that of thoxa-antidoom.
    loader: how batches are made of them; its batch_size counts pairs. loss: at each place.
    chosen_win: what the original stops at. Here the run goes on to its last step, and tells at which one it came to that.
    low_rank: adapters that are trained instead of the model, as the original does; None: the model is.
    evaluation_batches: of held-out pairs, on the way; None: all. At the end it is always all.
    export: how the model is written at the end; None: it is not.
    """

    init_from: str
    pairs: str
    held_out_share: float = 0.05
    flatten: float = 0.3
    loader: LoaderConfig
    loss: FinalTokenConfig = FinalTokenConfig()
    chosen_win: float = 0.4
    low_rank: LowRankConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation_batches: int | None = None
    export: ExportConfig | None = None

    def __post_init__(self):
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must be above 0 and below 1, got {self.held_out_share}")
        for name in ("flatten", "chosen_win"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        loader = self.loader
        if loader.order != "shuffled" or loader.fill_in_the_middle or loader.weights or len(loader.shapes()) > 1:
            raise ValueError(
                "pairs are of one source and come shuffled and as they are: leave loader.order, weights, stages and "
                "fill_in_the_middle as they are by default"
            )
        check_evaluation_batches(self.evaluation_batches)
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


class Pair(NamedTuple):
    """prefix: the ids before the place, [length] int32. rejected, chosen: ids that are not, and that are, to stand there."""

    prefix: np.ndarray
    rejected: int
    chosen: tuple[int, ...]


class FinalTokenRows:
    """Pairs in rows of one length. Can be pickled.

    rows: [1] int64, the number of pairs, as of one file. fingerprint: of all of it.
    """

    def __init__(self, pairs: Sequence[Pair], seq_len: int, pad_id: int):
        """pairs: each with a prefix of at most seq_len ids and no more than 32 chosen ones."""
        self.pairs, self._seq_len, self._pad_id = pairs, seq_len, pad_id
        self.rows = np.array([len(pairs)], np.int64)
        content = json.dumps([[pair.prefix.tolist(), pair.rejected, pair.chosen] for pair in pairs] + [seq_len])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self._reference: np.ndarray | None = None

    def with_reference(self, logits: np.ndarray, fingerprint: str) -> "FinalTokenRows":
        """The same, with a reference's logits at each place, [pairs, vocab] float32; fingerprint: of what they depend on."""
        rows = copy.copy(self)
        rows._reference = logits
        rows.fingerprint = hashlib.sha256(f"{self.fingerprint} {fingerprint}".encode()).hexdigest()
        return rows

    def make(self, places: Sequence[Place | None]) -> list[Batch]:
        """The rows of some places, in the form of `final_token_objective`; None is a row of padding, which has no position."""
        return [self._row(place) for place in places]

    def _row(self, place: Place | None) -> Batch:
        row = {name: np.zeros(self._seq_len, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        row["loss_mask"], row["chosen"] = np.zeros(self._seq_len, np.float32), np.full(_CHOICES, -1, np.int32)
        row["tokens"][:] = row["targets"][:] = self._pad_id
        if self._reference is not None:
            row["reference_logits"] = self._reference[0 if place is None else place.row]
        if place is None:
            return row
        prefix, rejected, chosen = self.pairs[place.row]
        length = len(prefix)
        row["tokens"][:length], row["targets"][: length - 1], row["targets"][length - 1] = prefix, prefix[1:], rejected
        row["segment_ids"][:length], row["positions"][:length], row["loss_mask"][length - 1] = 1, np.arange(length), 1
        row["chosen"][: len(chosen)] = chosen
        return row


class Prepared(NamedTuple):
    """The pairs of both splits, and figures about them."""

    train: FinalTokenRows
    held_out: FinalTokenRows
    figures: dict[str, Any]


def main(config: Config, workdir: epath.Path) -> None:
    """Reads the pairs, computes the reference, trains, measures what is held out, exports, and writes every figure."""
    run_accounted(config, workdir, lambda ledger: _run(config, workdir, ledger))


def _run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    with ledger.kind("preparation"):
        beginning = begin(config, workdir)
        mesh, before, tokenizer = beginning
        train, held_out, counts = prepare_pairs(config, tokenizer)
        train, held_out = (_with_reference(config, rows, before, mesh) for rows in (train, held_out))
        index, count = host_part(mesh)
        one, length = {config.loader.seq_len: [train]}, config.loader.seq_len
        with mistakes_in("loader"):
            batches = training_batches_of(one, one, config.loader, process_index=index, process_count=count)
        measure = _measure(config, held_out, before, mesh)
    logits = 6 * before.config.vocab_size * before.config.embed_dim  # of one token: a pair has no more, which is left out here
    flops = training_flops_per_token(before.config, length) - logits
    figures = fine_tune(
        config, workdir, ledger, beginning, batches=batches, objective=final_token_objective(config.loss), measure=measure,
        flops=lambda step: flops,
    )  # fmt: skip
    return figures | counts | _figures_of_training(config, workdir)


def prepare_pairs(config: Config, tokenizer: Tokenizer) -> Prepared:
    """The pairs to train on and those held out. A pair is as a whole or not at all: one that is longer than a row is left out.

    Raises:
      ConfigError: there are none of one split, or they are of another tokenizer, or no records of final tokens.
    """
    splits: dict[bool, list[Pair]] = {False: [], True: []}
    records = too_long = 0
    with mistakes_in("pairs"):
        for name, path in find_text_files(config.pairs):
            for line, record in enumerate(read_lines(path), 1):
                pair, asked = _read_pair(record, f"{name}:{line}", tokenizer)
                records, too_long = records + 1, too_long + (len(pair.prefix) > config.loader.seq_len)
                if len(pair.prefix) <= config.loader.seq_len:
                    splits[split_fraction(asked) < config.held_out_share].append(pair)
    train, held_out = flattened(splits[False], config.flatten, config.loader.seed), splits[True]
    if not train or not held_out:
        raise ConfigError(
            f"--config.pairs={config.pairs}: {len(train)} pairs to train on and {len(held_out)} held out, of {records} with "
            f"{too_long} longer than a row; change loader.seq_len or held_out_share, or give more pairs"
        )
    before, after = (collections.Counter(pair.rejected for pair in pairs) for pairs in (splits[False], train))
    figures = {
        "pairs": len(train), "held_out_pairs": len(held_out), "pairs_too_long": too_long,
        "pairs_left_out_as_frequent": len(splits[False]) - len(train), "distinct_rejected": len(after),
        "rejected": [
            {"token": token, "text": tokenizer.decode([token]), "pairs_before": count, "pairs": after[token]}
            for token, count in before.most_common(_MOST_SHOWN)
        ],
    }  # fmt: skip
    rows = (FinalTokenRows(pairs, config.loader.seq_len, tokenizer.pad_id) for pairs in (train, held_out))
    return Prepared(*rows, figures)


def _read_pair(record: dict[str, Any], where: str, tokenizer: Tokenizer) -> tuple[Pair, list[dict[str, Any]]]:
    """With what stands before the answer, in the form of `split_fraction`: what is held out of pairs of answers is so here."""
    wanted = ("prefix_ids", "rejected", "chosen", "messages", "tokenizer")
    missing = [name for name in wanted if name not in record]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; expected lines that configs/preference_data.py:loops wrote")
    if record["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(
            f"{where} has ids of the tokenizer {record['tokenizer'][:12]}, and the model has {tokenizer.fingerprint[:12]}; take "
            "pairs of a policy with the same one"
        )
    chosen = tuple(each["token"] for each in record["chosen"])
    pair = Pair(np.array(record["prefix_ids"], np.int32), record["rejected"]["token"], chosen)
    return pair, [*record["messages"], {"role": "assistant"}]


def flattened(pairs: Sequence[Pair], strength: float, seed: int) -> list[Pair]:
    """Without some of those whose rejected token is more frequent than the median one (see `Config.flatten`).

    Which ones of a token's is drawn by seed and token, whatever others there are; the order stays.
    """
    of_token: dict[int, list[int]] = collections.defaultdict(list)
    for number, pair in enumerate(pairs):
        of_token[pair.rejected].append(number)
    median = statistics.median(map(len, of_token.values())) if pairs else 0
    kept: list[int] = []
    for token, numbers in of_token.items():
        count = len(numbers) if len(numbers) <= median else max(1, round(len(numbers) * (median / len(numbers)) ** strength))
        drawn = np.random.default_rng([seed, token]).permutation(len(numbers))[:count]
        kept += [numbers[index] for index in drawn]
    return [pairs[number] for number in sorted(kept)]


def _with_reference(config: Config, rows: FinalTokenRows, before: Stage, mesh: Mesh) -> FinalTokenRows:
    """Computed anew at each start, and held by every host: 4 bytes a pair and id, 3 GB for 12,000 pairs of 65,536 ids.

    A batch brings its own to the device, 4 MB for 16 pairs; a second copy of the model would take more, and a forward pass each
    step.
    """
    index, count = host_part(mesh)
    size = config.loader.batch_size
    step = make_final_token_logits_step(before.functions, mesh)
    found = np.empty((len(rows.pairs), before.config.vocab_size), np.float32)
    for first in range(0, len(found), size):
        places = [Place(0, 0, number) if number < len(found) else None for number in range(first, first + size)]
        mine = rows.make(places)[index * size // count : (index + 1) * size // count]
        batch = {name: np.stack([row[name] for row in mine]) for name in mine[0]}
        with mistakes_in("mesh"):
            placed = place_batch(batch, mesh)
        logits = as_fed(jax.device_get(step(before.params, before.buffers, placed)), mesh)
        found[first : first + size] = logits[: len(found) - first]
    model = [fingerprints(before.params), fingerprints(before.buffers), to_mapping(before.config), to_mapping(config.compute)]
    return rows.with_reference(found, hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest())


def _measure(config: Config, held_out: FinalTokenRows, stage: Stage, mesh: Mesh) -> Measure:
    """(params, buffers, most batches) -> loss and metrics of `final_token_losses`, means over held-out pairs in float64."""
    index, count = host_part(mesh)
    step = make_eval_step(stage.functions, final_token_objective(config.loss), mesh)
    batches = evaluation_batches_of(
        held_out, held_out, config.loader.seq_len, config.loader.batch_size, process_index=index, process_count=count
    )

    def measure(params: Tree, buffers: Tree, most: int | None) -> dict[str, float]:
        totals: collections.Counter[str] = collections.Counter()
        for batch in itertools.islice(batches, most):
            sums = jax.device_get(step(params, buffers, place_batch(batch, mesh)))
            every = {"weight": sums.weight, "loss": sums.loss, **sums.metrics}
            totals.update({name: float(value) for name, value in every.items()})
        return {name: total / totals["weight"] for name, total in totals.items() if name != "weight"}

    return measure


def _figures_of_training(config: Config, workdir: epath.Path) -> dict[str, Any]:
    """How fast, and when it came to `chosen_win`: the first step whose batch did, of those that were logged."""
    records = read_metrics(workdir)
    rates = [record["train/tokens_per_second"] for record in records if "train/tokens_per_second" in record]
    won = (record["step"] for record in records if record.get("train/chosen_win", -1) >= config.chosen_win)
    rate = statistics.median(rates) if rates else None
    return {"tokens_per_second": rate, "steps": config.train.steps, "chosen_win_reached_at_step": next(won, None)}
