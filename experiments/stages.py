"""A stage is a folder with a trained model: the workdir of a run, or a Hugging Face folder. The next stage starts from it."""

import bisect
import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from data_pipelines import LoaderConfig, Tokenizer, load_tokenizer
from experiments.results import write_json
from lfm_jax.configuration import ConfigError, from_mapping, mistakes_in, to_mapping
from lfm_jax.interop import import_folder, is_model_folder, read_config
from lfm_jax.models import ComputeConfig, Decoder, FunctionalModel, ModelConfig, functional
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankConfig, LowRankModel, adapt
from lfm_jax.sharding import MeshConfig, dealt_order, make_mesh, parameter_sharding, shard_count
from lfm_jax.training import CheckpointError, Checkpoints, abstract_state, check_rows, host_part
from lfm_jax.training.state import Purpose, parameter_shardings, random_key

CHECKPOINTS = "checkpoints"
MODEL = "model.json"
LOW_RANK = "low_rank.json"  # is there where the checkpoints have a model and adapters beside it
TOKENIZER = "tokenizer"


class Stage(NamedTuple):
    """A model ready to run.

    tokenizer_path: file or folder that the tokenizer was read from. step: of the checkpoint, None for a Hugging Face folder.
    """

    config: ModelConfig
    functions: FunctionalModel
    params: Tree
    buffers: Tree
    tokenizer: Tokenizer
    tokenizer_path: epath.Path
    step: int | None


def mesh_for(config: MeshConfig, batch_size: int | None = None, accumulation: int = 1, seq_len: int | None = None) -> Mesh:
    """The mesh over all devices, over which batches of so many rows, taken in so many micro-batches, divide, and sequences.

    Raises:
      ConfigError: it does not fit the devices or the hosts, or the batches do not fit it.
    """
    with mistakes_in("mesh"):
        mesh = make_mesh(config)
        if batch_size is not None:
            check_rows(batch_size, accumulation, mesh)
            host_part(mesh)  # raises where hosts share a part of the rows
        if seq_len is not None:
            dealt_order(seq_len, shard_count("seq", mesh))  # raises where it does not divide
    return mesh


def check_evaluation_batches(count: int | None) -> None:
    """Raises ValueError if there are none, so that there is nothing to measure. count: None: all there are."""
    if count is not None and count < 1:
        raise ValueError(f"evaluation_batches must be at least 1, or None, got {count}")


def flops_by_step(config: ModelConfig, loader: LoaderConfig) -> Callable[[int], float]:
    """Of a step, from 1 on, the model FLOPs of training on a token: rows of another stage are of another length."""
    starts = [stage.from_step for stage in loader.stages]
    flops = [training_flops_per_token(config, seq_len) for _, seq_len in loader.shapes()]
    return lambda step: flops[bisect.bisect_right(starts, step - 1)]


def model_functions(config: ModelConfig, compute: ComputeConfig) -> FunctionalModel:
    """The decoder of a configuration as pure functions."""
    return functional(lambda rngs: Decoder(config, compute, rngs=rngs))


def fit_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration that knows how many of its rows are ids of the tokenizer.

    Raises:
      ConfigError: the tokenizer has more ids than the model has rows.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is {config.vocab_size}; give the model as many "
            f"rows (--config.model.vocab_size={tokenizer.vocab_size}) or take a smaller tokenizer."
        )
    return dataclasses.replace(config, tokenizer_vocab_size=tokenizer.vocab_size)


def write_model_config(workdir: epath.Path, config: ModelConfig) -> None:
    """Says in the workdir which architecture its checkpoints are of."""
    write_json(workdir / MODEL, to_mapping(config))


def checkpoint_functions(workdir: epath.Path, config: ModelConfig, compute: ComputeConfig) -> FunctionalModel:
    """What the checkpoints of a workdir are of: its model, with adapters beside it where it has them."""
    functions, low_rank = model_functions(config, compute), _read_low_rank(workdir)
    return functions if low_rank is None else adapt(functions, low_rank)


def write_low_rank(workdir: epath.Path, config: LowRankConfig | None) -> None:
    """Says in the workdir whether its checkpoints have a model or adapters beside it, and how these are added.

    Raises:
      ConfigError: the checkpoints that are there already are not like that.
    """
    there = _read_low_rank(workdir)
    if there != config and Checkpoints(workdir / CHECKPOINTS).steps():
        raise ConfigError(
            f"--config.low_rank: the checkpoints in {workdir} were made with {there}, not with {config}; take the settings they "
            "were made with, or another workdir"
        )
    if config is None:
        (workdir / LOW_RANK).unlink(missing_ok=True)
    else:
        write_json(workdir / LOW_RANK, to_mapping(config))


def adapted(stage: Stage, config: LowRankConfig, mesh: Mesh, seed: int) -> Stage:
    """The stage with new adapters as its parameters, which change nothing yet, and with its model among the buffers.

    Raises:
      ValueError: the model has nothing to adapt (see `adapt`).
    """
    functions = adapt(stage.functions, config)
    draw = jax.jit(functions.adapters, out_shardings=parameter_shardings(functions, mesh))
    buffers = {"frozen": stage.params, "buffers": stage.buffers}
    return stage._replace(functions=functions, params=draw(random_key(seed, Purpose.INIT)), buffers=buffers)


def merged(stage: Stage, mesh: Mesh) -> Stage:
    """The stage with its adapters in its model's matrices, in float32; one without adapters as it is."""
    functions = stage.functions
    if not isinstance(functions, LowRankModel):
        return stage
    merge = jax.jit(functions.merged, out_shardings=parameter_shardings(functions.base, mesh))
    params = merge(stage.params, stage.buffers["frozen"])
    return stage._replace(functions=functions.base, params=params, buffers=stage.buffers["buffers"])


def load_stage(path: str, compute: ComputeConfig, mesh: Mesh) -> Stage:
    """The model in a workdir (of its newest checkpoint that verifies) or in a Hugging Face folder, sharded over the mesh.

    Adapters are merged into it.

    Raises:
      ConfigError: `path` is no such folder, or what is in it is damaged or incomplete.
    """
    folder = epath.Path(path)
    with mistakes_in("init_from"):
        if (folder / MODEL).exists():
            return _load_workdir(folder, compute, mesh)
        if is_model_folder(folder):
            return _load_huggingface(folder, compute, mesh)
    raise ConfigError(
        f"{path}: no model is there. Expected the workdir of a run ({MODEL} and {CHECKPOINTS}/) or a Hugging Face "
        "folder (config.json with a model_type, and safetensors)."
    )


def _load_huggingface(folder: epath.Path, compute: ComputeConfig, mesh: Mesh) -> Stage:
    config = read_config(folder)
    functions = model_functions(config, compute)

    def place(path: tuple, array: np.ndarray) -> jax.Array:
        axes = functions.buffer_axes if path[-1] == "expert_bias" else functions.param_axes
        for key in path:
            axes = axes[key]
        return jax.device_put(array, parameter_sharding(mesh, axes, array.shape))

    model = import_folder(folder, place=place)
    tokenizer = load_tokenizer(folder)
    return Stage(fit_vocabulary(config, tokenizer), functions, model.params, model.buffers, tokenizer, folder, None)


def _load_workdir(folder: epath.Path, compute: ComputeConfig, mesh: Mesh) -> Stage:
    try:
        config = from_mapping(ModelConfig, json.loads((folder / MODEL).read_text()))
    except ValueError as error:
        raise ConfigError(f"{folder / MODEL}: {error}") from error
    functions = checkpoint_functions(folder, config, compute)
    if isinstance(functions, LowRankModel):
        print(f"{folder} has adapters of rank {functions.low_rank.rank} beside its model: they are merged into it")
    without_moments = abstract_state(functions, optax.identity(), mesh)
    try:
        restored = Checkpoints(folder / CHECKPOINTS).restore(without_moments, partial=True)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if restored is None:
        raise ConfigError(f"{folder}: the run has no checkpoint yet; the command that started it resumes it.")
    state, tokenizer = restored.state, load_tokenizer(folder / TOKENIZER)
    stage = Stage(config, functions, state.params, state.buffers, tokenizer, folder / TOKENIZER, restored.step)
    return merged(stage, mesh)


def _read_low_rank(folder: epath.Path) -> LowRankConfig | None:
    path = folder / LOW_RANK
    try:
        return from_mapping(LowRankConfig, json.loads(path.read_text())) if path.exists() else None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
