"""Our training step against transformers' on the same weights and batch: tokens a second, side by side in one run."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from experiments.export.huggingface import quiet_transformers
from experiments.results import write_results
from lfm_jax.models import preset
from lfm_jax.models.accounting import training_flops_per_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """preset: the architecture; rows, seq: of the batch. Both sides compute in float32, on a CPU.

    accumulation: micro-batches that our step takes the rows in; on a CPU, fewer activations are more often in its caches.
    steps: of one side before the other has its turn; rounds: turns, of which the first is not timed.
    compiled: also time transformers through torch.compile.
    """

    preset: str
    rows: int
    seq: int
    accumulation: int
    steps: int
    rounds: int
    compiled: bool = True
    learning_rate: float = 1e-3

    def __post_init__(self):
        preset(self.preset)  # raises where there is none
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, since the first is not timed; got {self.rounds}")


def _ours(config: Config, batch: dict[str, np.ndarray], folder: epath.Path) -> Callable[[], float]:
    """A step that returns its loss. Writes the weights it begins with as a Hugging Face folder."""
    import jax

    from lfm_jax.interop import export_folder
    from lfm_jax.models import ComputeConfig, Decoder, functional
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

    model = preset(config.preset)
    functions = functional(lambda rngs: Decoder(model, ComputeConfig(dtype="float32"), rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=config.learning_rate), 1_000_000)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = init_state(functions, optimizer, mesh, 0)
    export_folder(model, state.params, state.buffers, folder)
    objective = next_token_objective(LossConfig())
    step = make_train_step(functions, optimizer, objective, mesh, seed=0, accumulation=config.accumulation)
    placed = place_batch(batch, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        return float(metrics["loss"])

    return run


def _theirs(config: Config, batch: dict[str, np.ndarray], folder: epath.Path, compiled: bool) -> Callable[[], float]:
    """The same step of transformers and PyTorch."""
    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    from lfm_jax.training import OptimizerConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = OptimizerConfig(learning_rate=config.learning_rate)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(settings.b1, settings.b2), eps=settings.eps, fused=True,
    )  # fmt: skip
    forward = torch.compile(model) if compiled else model
    tokens, targets = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets"))

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = forward(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return run


def _matmul_flops_per_second(repetitions: int = 10) -> float:
    """The fastest of some float32 products of 2,048 x 2,048 matrices: what the arithmetic can do at best here."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a: a @ a)
    matrix = jnp.ones((2048, 2048))
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(seconds)


def _batch(config: Config) -> dict[str, np.ndarray]:
    """Rows of one document of random tokens each."""
    vocab = preset(config.preset).vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (config.rows, config.seq + 1), dtype=np.int32)
    shape = config.rows, config.seq
    return {
        "tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(config.seq, dtype=np.int32), (config.rows, 1)), "loss_mask": np.ones(shape, np.float32),
    }  # fmt: skip


def main(config: Config, workdir: epath.Path) -> None:
    """Lets the sides take turns, holds their losses against each other, and writes the rates."""
    from rich.progress import track

    batch, folder = _batch(config), workdir / "weights"
    steps: dict[str, Callable[[], float]] = {"ours": _ours(config, batch, folder)}
    steps["transformers"] = _theirs(config, batch, folder, compiled=False)
    if config.compiled:
        steps["transformers_compiled"] = _theirs(config, batch, folder, compiled=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(config.rounds), description="timing"):
        for name, step in steps.items():
            begin = time.perf_counter()
            losses[name] += [step() for _ in range(config.steps)]
            if turn:
                seconds[name].append((time.perf_counter() - begin) / config.steps)
    write_results(workdir, _figures(config, seconds, losses), config)


def _figures(config: Config, seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, Any]:
    tokens = config.rows * config.seq
    flops = tokens * training_flops_per_token(preset(config.preset), config.seq)
    peak = _matmul_flops_per_second()
    figures: dict[str, Any] = {"floor_seconds": flops / peak, "matmul_flops_per_second": peak}
    for name, spent in seconds.items():
        figures[f"{name}_seconds"] = float(np.median(spent))
        figures[f"{name}_tokens_per_second"] = tokens / float(np.median(spent))
        figures[f"{name}_flops_utilization"] = flops / float(np.median(spent)) / peak
    for name in seconds:
        if name != "ours":
            figures[f"ours_over_{name}"] = float(np.median(np.divide(seconds[name], seconds["ours"])))
            figures[f"{name}_loss_difference"] = float(np.abs(np.subtract(losses[name], losses["ours"])).max())
    return figures
