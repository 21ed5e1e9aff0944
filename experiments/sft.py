"""Supervised fine-tuning: a trained model learns to say what assistants say in conversations, and nothing else of them."""

import dataclasses
import itertools
import statistics
from typing import Any

from etils import epath
from jax.sharding import Mesh

from data_pipelines import LoaderConfig
from data_pipelines.conversations import Examples, PackedConversations, conversation_batches, conversation_evaluation_batches
from experiments.accounting import run_accounted
from experiments.conversations import (
    ConversationSources,
    PreparedConversations,
    keep_template,
    prepare_conversations,
    source_figures,
)
from experiments.export import ExportConfig
from experiments.fine_tuning import Measure, begin, fine_tune
from experiments.stages import Stage, check_evaluation_batches, flops_by_step
from lfm_jax.configuration import mistakes_in
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankConfig
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    evaluate_loss,
    host_part,
    make_eval_step,
    make_schedule,
    next_token_objective,
    read_metrics,
)
from lfm_jax.training.goodput import Ledger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of supervised fine-tuning.

    init_from: a workdir or a Hugging Face folder, whose model is trained on. data: the conversations.
    loader: how rows and batches are made of them; its weights are those of the sources.
    low_rank: adapters that are trained instead of the model; None: the model is.
    evaluation_batches: of each source's held-out conversations, on the way; None: all. At the end it is always all.
    export: how the model is written at the end; None: it is not.
    """

    init_from: str
    data: ConversationSources
    loader: LoaderConfig
    low_rank: LowRankConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation_batches: int | None = None
    export: ExportConfig | None = None

    def __post_init__(self):
        if self.loader.weights and len(self.loader.weights) != len(self.data.sources):
            raise ValueError(f"loader.weights has {len(self.loader.weights)} shares for {len(self.data.sources)} data.sources")
        check_evaluation_batches(self.evaluation_batches)
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


def main(config: Config, workdir: epath.Path) -> None:
    """Encodes the conversations, trains, measures what is held out of each source, exports, and writes every figure."""
    run_accounted(config, workdir, lambda ledger: _run(config, workdir, ledger))


def _run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    with ledger.kind("preparation"):
        beginning = begin(config, workdir)
        mesh, before, tokenizer = beginning
        text = prepare_conversations(config.data, workdir, tokenizer, before.tokenizer_path)
        keep_template(config.data.chat_format, before.tokenizer_path)
        index, count = host_part(mesh)
        with mistakes_in("loader"):
            batches = conversation_batches(text.train, config.loader, tokenizer, process_index=index, process_count=count)
            measure = _measure(config, text, before, mesh)
            packed = [PackedConversations(examples, config.loader.seq_len) for examples in text.train]
    figures = fine_tune(
        config, workdir, ledger, beginning, batches=batches, objective=next_token_objective(config.loss), measure=measure,
        flops=flops_by_step(before.config, config.loader),
    )  # fmt: skip
    return figures | _figures_of_training(config, workdir, text.train, packed)


def _measure(config: Config, text: PreparedConversations, stage: Stage, mesh: Mesh) -> Measure:
    """(params, buffers, most batches) -> nll_per_token of what assistants say, in nats: of all sources alike, and of each."""
    index, count = host_part(mesh)
    step = make_eval_step(stage.functions, next_token_objective(LossConfig()), mesh)
    parts = {
        name: conversation_evaluation_batches(
            examples, stage.tokenizer, seq_len=config.loader.seq_len, batch_size=config.loader.batch_size,
            process_index=index, process_count=count,
        )
        for name, examples in zip(config.data.names, text.held_out, strict=True)
    }  # fmt: skip

    def measure(params: Tree, buffers: Tree, most: int | None) -> dict[str, float]:
        losses = {
            name: evaluate_loss(step, params, buffers, itertools.islice(batches, most), mesh).nll_per_token
            for name, batches in parts.items()
        }
        every = {"nll_per_token": statistics.mean(losses.values())}
        return every | ({f"nll_per_token_of_{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {})

    return measure


def _figures_of_training(
    config: Config, workdir: epath.Path, sources: list[Examples], packed: list[PackedConversations]
) -> dict[str, Any]:
    """What was trained on, what of it was cut, and how fast."""
    rates = [record["train/tokens_per_second"] for record in read_metrics(workdir) if "train/tokens_per_second" in record]
    return {
        "tokens_per_second": statistics.median(rates) if rates else None,
        "steps": config.train.steps,
        **source_figures(config.data.names, sources, packed),
    }
