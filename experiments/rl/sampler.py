"""The policy that answers: the trainer's own parameters on its mesh, or, of several hosts, a copy on the devices of each."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.answering import Answerer
from experiments.rl.settings import RolloutsConfig
from experiments.stages import Stage, load_stage, merged
from lfm_jax.generation import EngineConfig
from lfm_jax.models import ComputeConfig
from lfm_jax.models.functional import Tree
from lfm_jax.models.low_rank import LowRankModel
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import host_part
from lfm_jax.training.state import parameter_shardings, replicated


class Sampler:
    """An `Answerer` whose parameters follow those of training; adapters are merged into its model.

    Args:
      settings: of the engine; its context is that of the rows. stage, mesh: of the trainer.
    """

    def __init__(
        self, rollouts: RolloutsConfig, settings: EngineConfig, stage: Stage, init_from: str, compute: ComputeConfig, mesh: Mesh
    ):
        self._merge = self._whole = None
        if isinstance(stage.functions, LowRankModel):
            shardings = parameter_shardings(stage.functions.base, mesh)
            self._merge = jax.jit(stage.functions.merged, out_shardings=shardings)
            stage = merged(stage, mesh)
        if jax.process_count() > 1:
            self._whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
            mesh = make_mesh(MeshConfig(), jax.local_devices())
            stage = load_stage(init_from, compute, mesh)._replace(tokenizer_path=stage.tokenizer_path)
        self.answerer = Answerer(stage, rollouts.chat_format, settings, mesh)

    def load(self, params: Tree, buffers: Tree) -> None:
        """Answers by these from now on: a copy. With several hosts all of them call it."""
        if self._merge is not None:
            params, buffers = self._merge(params, buffers["frozen"]), buffers["buffers"]
        if self._whole is not None:
            here = jax.tree.map(lambda leaf: leaf.addressable_data(0), self._whole((params, buffers)))
            params, buffers = here
        self.answerer.engine.load(params, buffers)


def everywhere(value: Any, mesh: Mesh) -> list[Any]:
    """What each host has, in the order of their parts of a batch, on all of them. value: plain values of JSON."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps([host_part(mesh)[0], value]).encode(), np.uint8)
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(mine)))))
    lines = multihost_utils.process_allgather(np.pad(mine, (0, size - len(mine))))
    found = dict(json.loads(bytes(line).rstrip(b"\0")) for line in lines)
    return [found[part] for part in sorted(found)]


