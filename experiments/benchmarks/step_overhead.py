"""The host's time for a training step, against a plain jitted function that computes the same on a flat list of arrays."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from experiments.results import write_results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """presets: whose trees of arrays are used, every array at a tiny size; repetitions: pairs of steps that are timed.

    warmup: pairs before them.
    """

    presets: tuple[str, ...]
    repetitions: int = 1000
    warmup: int = 50

    def __post_init__(self):
        if self.repetitions < 1:
            raise ValueError(f"repetitions must be at least 1, got {self.repetitions}")


def _build(name: str) -> tuple[Callable, Callable, Any, Any, Callable]:
    """(ours, plain, state, batch, graph walk): two functions of state and batch, and what a step would add with `nnx` in it."""
    import jax
    from flax import nnx

    from lfm_jax.models import Decoder, functional, preset
    from lfm_jax.sharding import MeshConfig, make_mesh
    from lfm_jax.training import (
        LossConfig,
        OptimizerConfig,
        init_state,
        make_optimizer,
        make_train_step,
        next_token_objective,
        place_batch,
    )

    model = dataclasses.replace(
        preset(name), vocab_size=32, tokenizer_vocab_size=None, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8
    )
    functions = functional(lambda rngs: Decoder(model, rngs=rngs))
    mesh, optimizer = make_mesh(MeshConfig(), jax.devices()[:1]), make_optimizer(OptimizerConfig(), 1_000_000)
    state = init_state(functions, optimizer, mesh, 0)
    ours = make_train_step(functions, optimizer, next_token_objective(LossConfig()), mesh, seed=0)
    tree = jax.tree.structure(state)

    def on_leaves(leaves, batch):
        state, metrics = ours.__wrapped__(jax.tree.unflatten(tree, leaves), batch)
        return jax.tree.leaves(state), metrics

    ones = np.ones((1, 4), np.int32)
    batch = {"tokens": ones, "targets": ones, "segment_ids": ones, "positions": ones, "loss_mask": ones.astype(np.float32)}
    walk = lambda state: nnx.split(functions.bind(state.params, state.buffers), nnx.Param, ...)
    return ours, jax.jit(on_leaves, donate_argnums=0), state, place_batch(batch, mesh), walk


def _timed(step: Callable, state: Any, batch: Any) -> tuple[float, Any]:
    """Milliseconds until the call returns, and the state, which is waited for."""
    import jax

    begin = time.perf_counter()
    state, _ = step(state, batch)
    seconds = time.perf_counter() - begin
    return 1e3 * seconds, jax.block_until_ready(state)


def _quantiles(name: str, milliseconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(milliseconds, [0.1, 0.5, 0.9])
    return {f"{name}_ms": median, f"{name}_ms_10_percent": low, f"{name}_ms_90_percent": high}


def _row(config: Config, name: str) -> dict[str, Any]:
    import jax

    ours, plain, state, batch, walk = _build(name)
    leaves = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.copy(), state))
    times = {"step": [], "plain": [], "graph_walk": []}
    for pair in range(config.warmup + config.repetitions):
        # The two take turns at being first, so that neither always finds the caches warm.
        for which in ("step", "plain") if pair % 2 else ("plain", "step"):
            if which == "step":
                spent, state = _timed(ours, state, batch)
            else:
                spent, leaves = _timed(plain, leaves, batch)
            times[which].append(spent)
        begin = time.perf_counter()
        walk(state)
        times["graph_walk"].append(1e3 * (time.perf_counter() - begin))
    times = {which: np.asarray(values[config.warmup :]) for which, values in times.items()}
    row = {"preset": name, "arrays": len(leaves)}
    for which in ("step", "plain"):
        row |= _quantiles(which, times[which])
    return row | _quantiles("overhead", times["step"] - times["plain"]) | _quantiles("graph_walk", times["graph_walk"])


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json: a row for each preset, and the largest median of the overheads."""
    from rich.progress import track

    rows = [_row(config, name) for name in track(config.presets, description="timing")]
    figures = {"rows": rows, "most_overhead_ms": max(row["overhead_ms"] for row in rows)}
    for row in rows:
        figures |= {f"{row['preset']}_{figure}": row[figure] for figure in ("arrays", "step_ms", "plain_ms", "overhead_ms")}
    write_results(workdir, figures, config)
