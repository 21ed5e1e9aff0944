"""What the stages that train a model on have in common: model and tokenizer, and the run from one measurement to the next."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from data_pipelines import DatasetIterator, Tokenizer, TokenizerConfig
from experiments.export import check_export, export_and_check
from experiments.prepared_data import prepare_tokenizer
from experiments.stages import (
    TOKENIZER,
    Stage,
    adapted,
    load_stage,
    merged,
    mesh_for,
    write_low_rank,
    write_model_config,
)
from lfm_jax.configuration import ConfigError, mistakes_in, to_mapping
from lfm_jax.models.functional import Tree
from lfm_jax.training import Objective, check_mesh, make_optimizer, train
from lfm_jax.training.goodput import Ledger

Measure = Callable[[Tree, Tree, int | None], dict[str, float]]  # of parameters, buffers and the most batches


class Beginning(NamedTuple):
    """The mesh, the model that is trained on, and the workdir's own copy of its tokenizer."""

    mesh: Mesh
    stage: Stage
    tokenizer: Tokenizer


def begin(config: Any, workdir: epath.Path) -> Beginning:
    """Loads `config.init_from`; the workdir has its architecture and its tokenizer then.

    Args:
      config: with init_from, low_rank, compute, mesh, loader, optimizer, train and export.
    Raises:
      ConfigError: the model cannot be read, or the mesh does not fit it, the devices or the batches; or low_rank does not fit
        the model, the optimizer or what is in the workdir.
    """
    check_low_rank(config)
    check_export(config.export)
    for batch_size, seq_len in config.loader.shapes():
        mesh = mesh_for(config.mesh, batch_size, config.train.accumulation, seq_len)
    stage = load_stage(config.init_from, config.compute, mesh)
    with mistakes_in("mesh"):
        check_mesh(stage.functions, mesh)
    tokenizer = prepare_tokenizer(workdir, None, TokenizerConfig(), str(stage.tokenizer_path))
    stage = with_low_rank(config, workdir, stage, mesh)
    return Beginning(mesh, stage._replace(tokenizer_path=workdir / TOKENIZER), tokenizer)


def check_low_rank(config: Any) -> None:
    """Raises ConfigError if adapters cannot be trained by the optimizer. config: with low_rank and optimizer."""
    if config.low_rank is not None and config.optimizer.matrices == "muon":
        raise ConfigError(
            "--config.low_rank: muon is for the update of a whole matrix, and knows none for two factors of one; take "
            "optimizer.matrices='adamw'"
        )


def with_low_rank(config: Any, workdir: epath.Path, stage: Stage, mesh: Mesh) -> Stage:
    """The stage with the adapters that it is to be trained by, if there are any; the workdir says what its checkpoints are of.

    Args:
      config: with low_rank and train.
    Raises:
      ConfigError: low_rank does not fit the model, or what is in the workdir.
    """
    write_low_rank(workdir, config.low_rank)
    write_model_config(workdir, stage.config)
    if config.low_rank is None:
        return stage
    with mistakes_in("low_rank"):
        return adapted(stage, config.low_rank, mesh, config.train.seed)


def fine_tune(
    config: Any,
    workdir: epath.Path,
    ledger: Ledger,
    beginning: Beginning,
    *,
    batches: DatasetIterator,
    objective: Objective,
    measure: Measure,
    flops: Callable[[int], float],
) -> dict[str, Any]:
    """Trains to `config.train.steps` and exports; measures all that is held out before and after, and some of it on the way.

    Args:
      config: with loader, optimizer, train, evaluation_batches and export.
      flops: of each training step, for what counts as a token in the objective.
    Returns:
      What `measure` says at the end, and under NAME_before what it said at first; resumed_at_step; trained_parameters, how many
      there are; the figures of the export.
    Raises:
      ConfigError: there are fewer batches than steps; or the best checkpoints are to go by a figure that is not measured.
    """
    steps, mesh, before = config.train.steps, beginning.mesh, beginning.stage
    if steps > len(batches):
        raise ConfigError(
            f"train.steps is {steps}, but loader.epochs={config.loader.epochs} of the data make {len(batches)} batches; raise "
            f"loader.epochs (None: without end), or set --config.train.steps={len(batches)}."
        )
    with ledger.kind("evaluation"):
        at_first = measure(before.params, before.buffers, None)
    config.train.check_best(at_first)
    trained = train(
        config.train,
        functions=before.functions,
        optimizer=make_optimizer(config.optimizer, steps),
        objective=objective,
        batches=batches,
        mesh=mesh,
        workdir=workdir,
        run_config=to_mapping(config),
        evaluate=lambda params, buffers: measure(params, buffers, config.evaluation_batches),
        initial=(before.params, before.buffers),
        flops_per_token=flops,
        ledger=ledger,
    )
    stage = before._replace(params=trained.state.params, buffers=trained.state.buffers, step=steps)
    with ledger.kind("evaluation"):
        figures = measure(stage.params, stage.buffers, None)
    figures |= {f"{name}_before": value for name, value in at_first.items()}
    if config.export is not None:
        figures |= export_and_check(config.export, merged(stage, mesh), workdir)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(before.functions.abstract_params))
    return figures | {"resumed_at_step": trained.started_at, "trained_parameters": count}
