"""Preference optimisation: a model learns, of two answers to a prompt, to make the one likelier than the other."""

import dataclasses
import hashlib
import io
import itertools
import json
import statistics
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines import LoaderConfig, Quarantine, Tokenizer
from data_pipelines.conversations import (
    ConversationsConfig,
    PairRows,
    encode_preferences,
    preference_batches,
    preference_evaluation_batches,
    read_preferences,
)
from data_pipelines.loading.rows import Place
from experiments.accounting import run_accounted
from experiments.conversations import ConversationSources, find_template, keep_template
from experiments.export import ExportConfig
from experiments.fine_tuning import Measure, begin, fine_tune
from experiments.stages import TOKENIZER, Stage, check_evaluation_batches, flops_by_step
from lfm_jax.configuration import mistakes_in, to_mapping
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankConfig
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    OptimizerConfig,
    PreferenceConfig,
    TrainConfig,
    as_fed,
    host_part,
    make_eval_step,
    make_log_probs_step,
    make_schedule,
    place_batch,
    preference_objective,
    read_metrics,
)
from lfm_jax.training.fingerprint import fingerprints
from lfm_jax.training.goodput import Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of preference optimisation.

    init_from: a workdir or a Hugging Face folder, whose model is trained on, and is the reference. data: the pairs, in lines as
    `read_preferences` has them. loader: how batches are made of them; its batch_size counts pairs, and each of a pair's two
    answers has seq_len positions.
    preference: the loss. reference: "precomputed": the log-probabilities of all answers under the model that training begins
      with are computed once, before it; "none": there are none, for losses that are reference-free.
    block: tokens whose logits exist at one time, on each device.
    low_rank: adapters that are trained instead of the model; None: the model is.
    evaluation_batches: of each source's held-out pairs, on the way; None: all. At the end it is always all.
    export: how the model is written at the end; None: it is not.
    """

    init_from: str
    data: ConversationSources
    loader: LoaderConfig
    preference: PreferenceConfig = PreferenceConfig()
    reference: Literal["precomputed", "none"] = "precomputed"
    block: int = 2048
    low_rank: LowRankConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation_batches: int | None = None
    export: ExportConfig | None = None

    def __post_init__(self):
        if self.loader.weights and len(self.loader.weights) != len(self.data.sources):
            raise ValueError(f"loader.weights has {len(self.loader.weights)} shares for {len(self.data.sources)} data.sources")
        if self.reference == "none" and not self.preference.reference_free:
            raise ValueError("reference is 'none', but this loss has one; set preference.reference_free, or precompute it")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")
        check_evaluation_batches(self.evaluation_batches)
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


class Pairs(NamedTuple):
    """Of each source the pairs of both splits, in the order of `ConversationSources.sources`; refused: of both together."""

    train: list[PairRows]
    held_out: list[PairRows]
    refused: list[int]


def main(config: Config, workdir: epath.Path) -> None:
    """Encodes the pairs, computes the reference, trains, measures what is held out, exports, and writes every figure."""
    run_accounted(config, workdir, lambda ledger: _run(config, workdir, ledger))


def _run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    with ledger.kind("preparation"):
        beginning = begin(config, workdir)
        mesh, before, tokenizer = beginning
        pairs = _prepare(config, workdir, tokenizer)
        if config.reference == "precomputed":
            pairs = _with_references(config, pairs, before, mesh, workdir)
        index, count = host_part(mesh)
        with mistakes_in("loader"):
            batches = preference_batches(pairs.train, config.loader, process_index=index, process_count=count)
        measure = _measure(config, pairs.held_out, before, mesh)
    figures = fine_tune(
        config, workdir, ledger, beginning, batches=batches, measure=measure,
        objective=preference_objective(config.preference, block=config.block),
        flops=flops_by_step(before.config, config.loader),
    )  # fmt: skip
    return figures | _figures_of_training(config, workdir, pairs)


def _prepare(config: Config, workdir: epath.Path, tokenizer: Tokenizer) -> Pairs:
    """Reads and encodes all sources; what cannot be used is listed in preferences_quarantine_NAME_SPLIT.jsonl in the workdir."""
    data = config.data
    with mistakes_in("data.chat_format"):
        template = find_template(data.chat_format, workdir / TOKENIZER)
    keep_template(data.chat_format, workdir / TOKENIZER)
    pairs = Pairs([], [], [])
    with tempfile.TemporaryDirectory() as elsewhere, mistakes_in("data.sources"):
        folder = workdir if jax.process_index() == 0 else epath.Path(elsewhere)  # one process tells
        for name, source in zip(data.names, data.sources, strict=True):
            where, refused = ConversationsConfig(source=source, held_out_share=data.held_out_share), 0
            for split, found in (("train", pairs.train), ("held_out", pairs.held_out)):
                path = folder / f"preferences_quarantine_{name}_{split}.jsonl"
                with Quarantine(path) as quarantine:
                    examples = encode_preferences(read_preferences(where, split, quarantine), tokenizer, template, quarantine)
                    quarantine.check(data.bad_records_limit)
                if not quarantine.counts.bad:
                    path.unlink()
                refused += examples.refused
                found.append(PairRows(examples, config.loader.seq_len, tokenizer))
            pairs.refused.append(refused)
    return pairs


def _with_references(config: Config, pairs: Pairs, before: Stage, mesh: Mesh, workdir: epath.Path) -> Pairs:
    model = {"params": fingerprints(before.params), "buffers": fingerprints(before.buffers)}
    step = make_log_probs_step(before.functions, mesh, block=config.block)

    def of_source(rows: PairRows, name: str) -> PairRows:
        about = json.dumps([model, to_mapping(before.config), to_mapping(config.compute), rows.fingerprint], sort_keys=True)
        fingerprint = hashlib.sha256(about.encode()).hexdigest()
        path = workdir / f"reference_{name}.npz"
        log_probs = _read_reference(path, fingerprint)
        if log_probs is None:
            log_probs = _reference(rows, config.loader.batch_size, lambda batch: step(before.params, before.buffers, batch), mesh)
            _write_reference(path, fingerprint, log_probs)
        return rows.with_reference(log_probs, fingerprint)

    train, held_out = (
        [of_source(rows, f"{name}_{split}") for name, rows in zip(config.data.names, sources, strict=True)]
        for split, sources in (("train", pairs.train), ("held_out", pairs.held_out))
    )
    return pairs._replace(train=train, held_out=held_out)


def _reference(rows: PairRows, batch_size: int, log_probs_of: Callable, mesh: Mesh) -> np.ndarray:
    """[trained targets] float32, see `PairRows.with_reference`; every host gets those of all pairs."""
    index, count = host_part(mesh)
    mine = batch_size // count
    found = []
    for first in range(0, len(rows.counts), batch_size):
        numbers = range(first, first + batch_size)
        places = [Place(0, 0, number) if number < len(rows.counts) else None for number in numbers]
        made = rows.make(places)
        here = made[index * mine : (index + 1) * mine]
        batch = {name: np.stack([row[name] for row in here]) for name in here[0]}
        of_batch = jax.device_get(log_probs_of(place_batch(batch, mesh)))
        for row, *both in zip(made, *(as_fed(each, mesh) for each in of_batch), strict=True):
            for prefix, log_probs in zip(("", "rejected_"), both, strict=True):
                found.append(log_probs[row[f"{prefix}loss_mask"] > 0])
    return np.concatenate(found)


def _read_reference(path: epath.Path, fingerprint: str) -> np.ndarray | None:
    """What is there, or None on every host if one of them cannot read it: it must be computed by all."""
    log_probs = None
    if path.exists():
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                log_probs = file["log_probs"] if str(file["fingerprint"]) == fingerprint else None
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            pass
        if log_probs is None:
            print(f"{path.name} is damaged, or of another model, other pairs or settings: the reference is computed anew")
    return log_probs if np.all(multihost_utils.process_allgather(np.array(log_probs is not None))) else None


def _write_reference(path: epath.Path, fingerprint: str, log_probs: np.ndarray) -> None:
    if jax.process_index() == 0:
        content = io.BytesIO()
        np.savez(content, fingerprint=np.array(fingerprint), log_probs=log_probs)
        part = path.parent / f".{path.name}.part"
        part.write_bytes(content.getvalue())
        part.replace(path)


def _measure(config: Config, held_out: Sequence[PairRows], stage: Stage, mesh: Mesh) -> Measure:
    """(params, buffers, most batches) -> loss and metrics of `preference_losses` of held-out pairs: of all sources alike, and of
    each."""
    index, count = host_part(mesh)
    step = make_eval_step(stage.functions, preference_objective(config.preference, block=config.block), mesh)
    parts = [
        preference_evaluation_batches(rows, config.loader.batch_size, process_index=index, process_count=count)
        for rows in held_out
    ]

    def measure(params: Tree, buffers: Tree, most: int | None) -> dict[str, float]:
        sums = lambda batch: jax.device_get(step(params, buffers, place_batch(batch, mesh)))
        each = [_means(map(sums, itertools.islice(batches, most))) for batches in parts]
        figures = {name: statistics.mean(figures[name] for figures in each) for name in each[0]}
        if len(each) > 1:
            for source, of_source in zip(config.data.names, each, strict=True):
                figures |= {f"{name}_of_{source}": value for name, value in of_source.items()}
        return figures

    return measure


def _means(found: Iterable[Any]) -> dict[str, float]:
    """Over the pairs of all batches, in float64."""
    totals: dict[str, float] = {}
    pairs = 0.0
    for sums in found:
        pairs += float(sums.weight)
        for name, value in {"loss": sums.loss, **sums.metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return {name: total / pairs for name, total in totals.items()}


def _figures_of_training(config: Config, workdir: epath.Path, pairs: Pairs) -> dict[str, Any]:
    """What was trained on, what of it was cut, and how fast."""
    rates = [record["train/tokens_per_second"] for record in read_metrics(workdir) if "train/tokens_per_second" in record]
    sources = [
        {
            "source": name, "pairs": len(rows.counts), "held_out_pairs": len(held_out.counts), "refused": refused,
            "tokens": rows.tokens, "chosen_tokens": int(rows.counts[:, 0].sum()),
            "rejected_tokens": int(rows.counts[:, 1].sum()), "answers_cut": rows.truncated, "tokens_cut": rows.cut_tokens,
            "pairs_dropped": rows.dropped,
        }
        for name, rows, held_out, refused in zip(config.data.names, *pairs, strict=True)
    ]  # fmt: skip
    totals = {name: sum(source[name] for source in sources) for name in sources[0] if name != "source"}
    rate = statistics.median(rates) if rates else None
    return {"tokens_per_second": rate, "steps": config.train.steps, **totals, "sources": sources}
