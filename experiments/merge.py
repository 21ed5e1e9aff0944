"""Several models of one architecture, merged into a stage of its own that the next one starts from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from data_pipelines import TokenizerConfig
from experiments.prepared_data import prepare_tokenizer
from experiments.results import write_results
from experiments.stages import CHECKPOINTS, Stage, load_stage, mesh_for, write_model_config
from lfm_jax.configuration import ConfigError, to_mapping
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import Checkpoints, TrainState
from lfm_jax.training.merging import MergeConfig, check_models, merge
from lfm_jax.training.state import state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """init_from: the models, each the workdir of a run or a Hugging Face folder; all are held in memory at once, sharded.

    base: what they were trained from, likewise, for the methods that need it. merge: how.
    """

    init_from: tuple[str, ...]
    base: str | None = None
    merge: MergeConfig = MergeConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if not self.init_from:
            raise ValueError("give init_from, the models to merge: --config.init_from=WORKDIR,WORKDIR")
        check_models(self.merge, len(self.init_from), self.base is not None)


def main(config: Config, workdir: epath.Path) -> None:
    """Writes a checkpoint of step 0 with the tokenizer and the model's configuration, and how far the models lie apart.

    Raises:
      ConfigError: a model cannot be read, or they are of different architectures or tokenizers.
    """
    mesh = mesh_for(config.mesh)
    paths = [*config.init_from, *([config.base] if config.base is not None else [])]
    stages = [load_stage(path, config.compute, mesh) for path in paths]
    for path, stage in zip(paths[1:], stages[1:], strict=True):
        _refuse_other(paths[0], stages[0], path, stage)
    first, models = stages[0], stages[: len(config.init_from)]
    base = None if config.base is None else stages[-1].params
    state = _merged(config, models, base, mesh)
    tokenizer = prepare_tokenizer(workdir, None, TokenizerConfig(), str(first.tokenizer_path))
    if tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise ConfigError(f"{workdir} holds another tokenizer than {paths[0]}; give another --workdir.")
    write_model_config(workdir, first.config)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        checkpoints.discard(newer_than=-1)  # of the same command, given before
        checkpoints.save(state, data_state={}, config=to_mapping(config))
    rows = [
        {"model": path, "checkpoint_step": stage.step, **_distances(stage.params, state.params, base)}
        for path, stage in zip(config.init_from, models, strict=True)
    ]
    figures = {"models": rows, "norm": _norm(state.params)}
    if base is not None:
        figures |= {"base_norm": _norm(base), "norm_of_difference_from_base": _distance(state.params, base)}
    write_results(workdir, figures, config)


def _refuse_other(first_path: str, first: Stage, path: str, stage: Stage) -> None:
    """Only models of one architecture and one tokenizer have parameters that mean the same."""
    wanted, found = to_mapping(first.config), to_mapping(stage.config)
    names = [name for name in wanted if name != "tokenizer_vocab_size" and found[name] != wanted[name]]
    if names:
        differences = [f"{name} is {found[name]} in {path} and {wanted[name]} in {first_path}" for name in names]
        raise ConfigError(f"models of different architectures cannot be merged: {'; '.join(differences)}.")
    if stage.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise ConfigError(
            f"{path} and {first_path} have different tokenizers, so their embeddings are of different tokens; merge models that "
            "were trained with one."
        )


def _merged(config: Config, models: list[Stage], base: Tree | None, mesh: Mesh) -> TrainState:
    """The state of a run that has yet to begin; its optimizer has no arrays."""

    def build(params: list[Tree], buffers: list[Tree], base: Tree | None) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), *merge(config.merge, params, buffers, base), optax.EmptyState())

    shardings = state_shardings(models[0].functions, optax.identity(), mesh)
    return jax.jit(build, out_shardings=shardings)(
        [model.params for model in models], [model.buffers for model in models], base
    )


def _distances(params: Tree, merged: Tree, base: Tree | None) -> dict[str, Any]:
    """Norms of a model's parameters and of what they differ by from the merged ones and, where there is one, from the base."""
    of_base = {} if base is None else {"norm_of_difference_from_base": _distance(params, base)}
    return {"norm": _norm(params), "norm_of_difference_from_merged": _distance(params, merged), **of_base}


@jax.jit
def _norm(tree: Tree) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


@jax.jit
def _distance(tree: Tree, other: Tree) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda one, two: one.astype(jnp.float32) - two.astype(jnp.float32), tree, other))
