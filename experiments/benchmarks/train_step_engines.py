"""One side of the benchmark of training steps, in a process of its own. It answers lines of JSON with lines of JSON.

    python -m experiments.benchmarks.train_step_engines

The first line is the job: {"engine", "config": of `train_step.Config`, "preset", "folder": of the weights}; the answer comes once
everything but the compiled step is there. Each further line is a number of steps, which are done without waiting for one another;
the answer is {"seconds", "losses", "peak_bytes"}. {"refused"} says that the device is not there, {"failed"} what went wrong.

Engines: all have float32 parameters and moments, clipping and AdamW, and the same weights and micro-batches.

  ours: the step as training has it, with the documents of packed rows told by their segment ids (on a GPU cuDNN's attention
    reads a mask for them). ours_whole_rows: knowing, as transformers does here, that each row is one document.
  transformers: `Lfm2ForCausalLM` with PyTorch's own attention (on a GPU one of its fused kernels, or an error), and its fused
    AdamW. In bfloat16: autocast over float32 parameters, which leaves the residual stream in float32.
  transformers_compiled: the same through `torch.compile` as it is by default, with the loss inside.
  transformers_compiled_bfloat16: compiled, without autocast: bfloat16 parameters, a copy of the float32 ones that the optimizer
    updates. Its residual stream is in bfloat16, as ours is.
  matmul: no step, but {"flops_per_second"} of the fastest of many products of large random matrices.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from experiments.benchmarks.device_rates import matmul_flops_per_second
from experiments.benchmarks.train_step import Config
from lfm_jax.configuration import from_mapping
from lfm_jax.host_memory import keep_freed_memory
from lfm_jax.models import preset

if TYPE_CHECKING:
    from jax.sharding import Mesh


class _Side(NamedTuple):
    """step: does one, and returns its loss on the device; wait: until all are done; peak_bytes: of memory so far."""

    step: Callable[[], Any]
    wait: Callable[[], None]
    peak_bytes: Callable[[], int]


def _host_peak_bytes() -> int:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(peak)


def _batch(config: Config, name: str) -> dict[str, np.ndarray]:
    """Rows of one document of random tokens each."""
    tokens = np.random.default_rng(0).integers(0, preset(name).vocab_size, (config.rows, config.seq + 1), dtype=np.int32)
    shape = config.rows, config.seq
    return {
        "tokens": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy(), "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(config.seq, dtype=np.int32), (config.rows, 1)), "loss_mask": np.ones(shape, np.float32),
    }  # fmt: skip


def _our_step(config: Config, name: str, mesh: "Mesh", segments: bool) -> tuple[Any, Any, Any, Any]:
    """The model's functions, the optimizer, the jitted step, and the batch in its place."""
    from lfm_jax.models import Decoder, functional
    from lfm_jax.training import (
        LossConfig,
        OptimizerConfig,
        make_optimizer,
        make_train_step,
        next_token_objective,
        place_batch,
    )

    functions = functional(lambda rngs: Decoder(preset(name), config.compute, rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=config.learning_rate), 1_000_000)
    objective = next_token_objective(LossConfig(block=config.loss_block))
    step = make_train_step(functions, optimizer, objective, mesh, seed=0, accumulation=config.accumulation)
    batch = place_batch(_batch(config, name), mesh)
    return functions, optimizer, step, batch if segments else {**batch, "segment_ids": None}


def _ours(config: Config, name: str, folder: epath.Path, *, segments: bool) -> _Side:
    """Writes the weights it begins with as a Hugging Face folder where there is none."""
    import jax

    from lfm_jax.interop import export_folder
    from lfm_jax.sharding import MeshConfig, make_mesh
    from lfm_jax.training import init_state

    device = jax.devices(config.platform)[0]
    mesh = make_mesh(MeshConfig(), [device])
    functions, optimizer, step, batch = _our_step(config, name, mesh, segments)
    state = init_state(functions, optimizer, mesh, 0)
    if not folder.exists():
        export_folder(preset(name), state.params, state.buffers, folder)

    def run() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    peak = _host_peak_bytes if config.platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"]
    return _Side(run, lambda: jax.block_until_ready(state), peak)


def _theirs(config: Config, name: str, folder: epath.Path, *, compiled: bool, cast: bool = False) -> _Side:
    """cast: the parameters themselves are bfloat16, beside float32 ones for the optimizer; else autocast, where not float32."""
    from experiments.export.huggingface import quiet_transformers

    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    device = "cpu" if config.platform == "cpu" else "cuda"
    if device == "cuda":
        torch.backends.cuda.enable_math_sdp(False)  # an error rather than the attention that is not fused
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    parameters = list(model.parameters())
    masters = [parameter.detach().clone() for parameter in parameters] if cast else parameters
    if cast:
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer, clip_norm = _adamw(masters, config.learning_rate)
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.compute.dtype == "bfloat16" and not cast)

    # None for each kind of layer: under torch.compile transformers makes masks with PyTorch 2.13, and flash attention takes none.
    no_masks = dict.fromkeys(model.config.layer_types)

    def mean_loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, attention_mask=no_masks, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    forward = torch.compile(mean_loss) if compiled else mean_loss
    batch = _batch(config, name)
    whole = [torch.from_numpy(batch[name]).long().to(device) for name in ("tokens", "targets")]
    parts = [[rows[part :: config.accumulation] for rows in whole] for part in range(config.accumulation)]

    def gather() -> None:
        """Adds the gradient of a micro-batch to the float32 ones."""
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for tokens, targets in parts:
            with autocast:
                loss = forward(tokens, targets) / config.accumulation
            loss.backward()
            total += loss.detach()
            if cast:
                gather()
        torch.nn.utils.clip_grad_norm_(masters, clip_norm)
        optimizer.step()
        if cast:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        return total

    if device == "cpu":
        return _Side(run, lambda: None, _host_peak_bytes)
    return _Side(run, torch.cuda.synchronize, torch.cuda.max_memory_allocated)


def _adamw(parameters: list, learning_rate: float) -> tuple[Any, float]:
    """PyTorch's fused AdamW with the settings of ours, and the norm that gradients are clipped to."""
    import torch

    from lfm_jax.training import OptimizerConfig

    settings = OptimizerConfig(learning_rate=learning_rate)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = settings.b1, settings.b2
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True), settings.clip_norm


_SIDES: dict[str, tuple[Callable[..., _Side], dict[str, bool]]] = {
    "ours": (_ours, {"segments": True}),
    "ours_whole_rows": (_ours, {"segments": False}),
    "transformers": (_theirs, {"compiled": False}),
    "transformers_compiled": (_theirs, {"compiled": True}),
    "transformers_compiled_bfloat16": (_theirs, {"compiled": True, "cast": True}),
}


def _timed(side: _Side, steps: int) -> dict[str, Any]:
    begin = time.perf_counter()
    losses = [side.step() for _ in range(steps)]
    side.wait()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "losses": [float(loss) for loss in losses], "peak_bytes": side.peak_bytes()}


def _no_device(platform: str) -> str | None:
    """What jax says where it has no device of the platform; None where it has one."""
    import jax

    try:
        jax.devices(platform)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


def _answer_lines(answer: Callable[[Any], None]) -> None:
    try:
        job = json.loads(sys.stdin.readline())
        config = from_mapping(Config, job["config"])
        if config.kept_memory == "all" or (config.kept_memory == "ours" and job["engine"].startswith("ours")):
            keep_freed_memory()
        if job["engine"] == "matmul":
            missing = _no_device(config.platform)
            if missing:
                answer({"refused": missing})
            else:
                answer({"flops_per_second": matmul_flops_per_second(config.matmul, config.compute.dtype)})
            return
        make, settings = _SIDES[job["engine"]]
        side = make(config, job["preset"], epath.Path(job["folder"]), **settings)
        answer({})
        for line in sys.stdin:
            answer(_timed(side, json.loads(line)))
    except Exception as error:  # an engine that runs out of memory is a result, and the others go on
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):
            answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})


def main() -> None:
    """Answers until its input ends, or a job fails."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is not an answer
        _answer_lines(lambda content: print(json.dumps(content), file=out, flush=True))


if __name__ == "__main__":
    main()
