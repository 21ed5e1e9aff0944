"""Supervised fine-tuning: a trained model learns to say what assistants say in conversations, and nothing else of them."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from data_pipelines import LoaderConfig, TokenizerConfig
from data_pipelines.conversations import Examples, PackedConversations, conversation_batches, conversation_evaluation_batches
from experiments.conversations import ConversationSources, PreparedConversations, prepare_conversations, source_figures
from experiments.export import ExportConfig, export_and_check
from experiments.prepared_data import prepare_tokenizer
from experiments.results import write_results
from experiments.stages import TOKENIZER, Stage, load_stage, mesh_for, write_model_config
from lfm_jax.configuration import ConfigError, mistakes_in, to_mapping
from lfm_jax.models import ComputeConfig
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    check_mesh,
    evaluate_loss,
    host_part,
    make_eval_step,
    make_optimizer,
    make_schedule,
    next_token_objective,
    read_metrics,
    train,
)
from lfm_jax.training.goodput import Ledger, process_age, summary, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of supervised fine-tuning.

    init_from: a workdir or a Hugging Face folder, whose model is trained on. data: the conversations.
    loader: how rows and batches are made of them; its weights are those of the sources.
    evaluation_batches: of each source's held-out conversations, on the way; None: all. At the end it is always all.
    export: how the model is written at the end; None: it is not.
    """

    init_from: str
    data: ConversationSources
    loader: LoaderConfig
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
        make_schedule(self.optimizer.schedule, self.optimizer.learning_rate, self.train.steps)  # refuses what does not fit


def main(config: Config, workdir: epath.Path) -> None:
    """Encodes the conversations, trains, measures what is held out of each source, exports, and writes every figure."""
    with Ledger(workdir, writes=jax.process_index() == 0, age=process_age()) as ledger:
        figures = _run(config, workdir, ledger)
    print(summary(ledger.seconds()))
    write_results(workdir, {**figures, "goodput": table(ledger.seconds())}, config)


def _run(config: Config, workdir: epath.Path, ledger: Ledger) -> dict[str, Any]:
    with ledger.kind("preparation"):
        for batch_size, _ in config.loader.shapes():
            mesh = mesh_for(config.mesh, batch_size, config.train.accumulation)
        before = load_stage(config.init_from, config.compute, mesh)
        with mistakes_in("mesh"):
            check_mesh(before.functions, mesh)
        tokenizer = prepare_tokenizer(workdir, None, TokenizerConfig(), str(before.tokenizer_path))
        text = prepare_conversations(config.data, workdir, tokenizer, workdir / TOKENIZER)
        write_model_config(workdir, before.config)
        index, count = host_part(mesh)
        with mistakes_in("loader"):
            batches = conversation_batches(text.train, config.loader, tokenizer, process_index=index, process_count=count)
            measure = _measure(config, text, before, mesh)
            packed = [PackedConversations(examples, config.loader.seq_len) for examples in text.train]
        if config.train.steps > len(batches):
            raise ConfigError(
                f"train.steps is {config.train.steps}, but loader.epochs={config.loader.epochs} of the conversations make "
                f"{len(batches)} batches; raise loader.epochs (None: without end), or set --config.train.steps={len(batches)}."
            )
    with ledger.kind("evaluation"):
        at_first = measure(before.params, before.buffers, None)
    trained = train(
        config.train,
        functions=before.functions,
        optimizer=make_optimizer(config.optimizer, config.train.steps),
        objective=next_token_objective(config.loss),
        batches=batches,
        mesh=mesh,
        workdir=workdir,
        run_config=to_mapping(config),
        evaluate=lambda params, buffers: measure(params, buffers, config.evaluation_batches),
        initial=(before.params, before.buffers),
        flops_per_token=training_flops_per_token(before.config, config.loader.seq_len),
        ledger=ledger,
    )
    stage = before._replace(
        params=trained.state.params, buffers=trained.state.buffers, tokenizer_path=workdir / TOKENIZER, step=config.train.steps
    )
    with ledger.kind("evaluation"):
        figures = measure(stage.params, stage.buffers, None)
    figures |= {f"{name}_before": value for name, value in at_first.items()}
    figures |= _figures_of_training(config, workdir, text.train, packed)
    if config.export is not None:
        figures |= export_and_check(config.export, stage, workdir)
    return figures | {"resumed_at_step": trained.started_at}


def _measure(
    config: Config, text: PreparedConversations, stage: Stage, mesh: Mesh
) -> Callable[[Tree, Tree, int | None], dict[str, float]]:
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
