"""What it costs to compare the copies that devices hold of the state, and how much of the state there are copies of at all."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from experiments.benchmarks.processes import run_module
from experiments.results import write_results
from lfm_jax.configuration import from_mapping, to_mapping
from lfm_jax.models import preset
from lfm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A preset and what it is meant to be trained on: the kind of slice, and its mesh."""

    preset: str
    topology: str
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """preset: whose state is checked; rows, seq: of the batch of a step. every: steps between two checks.

    meshes: over the first of the devices; those that need more than there are are left out. plans: of which the bytes with a copy
    are counted, from shapes alone; none: that needs no libtpu. repetitions: steps and checks that are timed, in turns.
    """

    preset: str
    rows: int
    seq: int
    every: int = 100
    meshes: tuple[MeshConfig, ...]
    plans: tuple[Plan, ...] = ()
    repetitions: int = 20

    def __post_init__(self):
        if self.repetitions < 2:
            raise ValueError(f"repetitions must be at least 2, since the first is not timed; got {self.repetitions}")


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json: times by mesh, and the share of each plan's state that is guarded."""
    import jax

    there = [mesh for mesh in config.meshes if _size(mesh) <= len(jax.devices())]
    rows = [_row(config, mesh) for mesh in there]
    guarded = run_module(__name__, {"plans": [to_mapping(plan) for plan in config.plans]}) if config.plans else []
    figures = {"rows": rows, "guarded": guarded, "meshes_left_out": len(config.meshes) - len(there)}
    if rows:
        figures |= {f"most_{kind}share_of_time": max(row[f"{kind}share_of_time"] for row in rows) for kind in ("", "whole_")}
    write_results(workdir, figures, config)


def _size(mesh: MeshConfig) -> int:
    return int(np.prod(dataclasses.astuple(mesh)))


def _row(config: Config, mesh_config: MeshConfig) -> dict[str, Any]:
    """Milliseconds of a step, of a check of its state, and of one of a state that every device holds all of."""
    import jax
    import jax.numpy as jnp

    from lfm_jax.models import ComputeConfig, Decoder, functional
    from lfm_jax.sharding import make_mesh
    from lfm_jax.training import LossConfig, OptimizerConfig, init_state, make_optimizer, make_train_step, next_token_objective
    from lfm_jax.training.replicas import check_replicas, copied_bytes
    from lfm_jax.training.state import replicated

    mesh = make_mesh(mesh_config, jax.devices()[: _size(mesh_config)])
    functions = functional(lambda rngs: Decoder(preset(config.preset), ComputeConfig(), rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(), 1_000_000)
    state, batch = init_state(functions, optimizer, mesh, 0), _batch(config, mesh)
    step = make_train_step(functions, optimizer, next_token_objective(LossConfig()), mesh, seed=0)
    # A copy of its own: what `device_put` gives may share memory with the state, which the steps take over.
    whole = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=replicated(mesh))(state)
    times = {"step": [], "check": [], "whole_check": []}
    for number in range(config.repetitions):
        (state, _), spent = _timed(step, state, batch)
        times["step"].append(spent)
        times["check"].append(_timed(check_replicas, state, mesh, number)[1])
        times["whole_check"].append(_timed(check_replicas, whole, mesh, number)[1])
    median = {name: float(np.median(spent[1:])) for name, spent in times.items()}
    copied, all_bytes = copied_bytes(state)
    share = lambda name: median[name] / (config.every * median["step"])
    return {
        "mesh": _text(mesh_config), "devices": _size(mesh_config), "arrays": len(jax.tree.leaves(state)),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in median.items()},
        "share_of_time": share("check"), "whole_share_of_time": share("whole_check"),
        "copied_bytes": copied, "state_bytes": all_bytes,
    }  # fmt: skip


def _batch(config: Config, mesh: Any) -> dict[str, Any]:
    from lfm_jax.training import place_batch

    tokens = np.random.default_rng(0).integers(0, preset(config.preset).vocab_size, (config.rows, config.seq + 1), dtype=np.int32)
    ones = np.ones((config.rows, config.seq), np.int32)
    batch = {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1, "loss_mask": ones.astype(np.float32),
    }  # fmt: skip
    return place_batch(batch, mesh)


def _timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """What the function returns, once it is there, and seconds."""
    import jax

    begin = time.perf_counter()
    found = jax.block_until_ready(function(*arguments))
    return found, time.perf_counter() - begin


def _text(mesh: MeshConfig) -> str:
    return " ".join(f"{name}={size}" for name, size in dataclasses.asdict(mesh).items() if size != 1) or "one device"


def _guarded(plan: Plan) -> dict[str, Any]:
    """From shapes: bytes of the state that more than one device holds, and all."""
    import jax

    from lfm_jax.models import Decoder, functional
    from lfm_jax.sharding import aot, make_mesh
    from lfm_jax.training import OptimizerConfig, abstract_state, make_optimizer
    from lfm_jax.training.replicas import copied_bytes

    mesh = make_mesh(plan.mesh, aot.tpu_devices(plan.topology))
    functions = functional(lambda rngs: Decoder(preset(plan.preset), rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(), 1_000_000)
    copied, all_bytes = copied_bytes(abstract_state(functions, optimizer, mesh))
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(functions.abstract_params))
    return {
        "preset": plan.preset, "topology": plan.topology, "mesh": _text(plan.mesh), "parameters": params,
        "copied_bytes": copied, "state_bytes": all_bytes, "guarded_share": copied / all_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    plans = json.loads(sys.stdin.read())["plans"]
    print(json.dumps([_guarded(from_mapping(Plan, plan)) for plan in plans]))
