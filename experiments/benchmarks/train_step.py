"""Our training step against transformers' on the same weights and batch: tokens a second and memory, side by side in one run."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from experiments.benchmarks.processes import PLATFORMS, python_path
from experiments.results import write_results
from lfm_jax.configuration import ConfigError, to_mapping
from lfm_jax.models import ComputeConfig, preset
from lfm_jax.models.accounting import training_flops_per_token

ENGINES = ("ours", "transformers", "transformers_compiled", "transformers_compiled_bfloat16", "ours_whole_rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """presets: the architectures; rows, seq: of the batch; accumulation: micro-batches that either side takes the rows in.

    platform: on a CPU the engines live side by side and take turns; on a GPU each has it to itself, one after the other, so that
      none takes another's memory.
    compute: how ours computes, and with `dtype` how theirs does; parameters and optimizer are float32 on either side.
    loss_block: tokens whose logits ours has at one time; transformers has those of a whole micro-batch.
    engines: of `ENGINES`, "ours" first, since it writes the weights; see `train_step_engines`.
    kept_memory: on a CPU, whose freed memory stays with the process (`lfm_jax.host_memory`): "ours", as each side's users have
      it, since `run.py` sees to it; "all", or "none".
    steps: of one turn; rounds: turns, of which the first compiles and is not timed.
    matmul: rows and columns of the matrices whose product says what the device can do at best.
    limit_seconds: an engine that could only be started later is left out, and named; None: none is.
    """

    presets: tuple[str, ...] = ("nano",)
    rows: int
    seq: int
    accumulation: int = 1
    platform: Literal["cpu", "gpu"] = "cpu"
    compute: ComputeConfig = ComputeConfig(dtype="float32")
    loss_block: int = 2048
    engines: tuple[str, ...] = ("ours", "transformers", "transformers_compiled")
    kept_memory: Literal["none", "ours", "all"] = "ours"
    steps: int
    rounds: int
    matmul: int = 2048
    limit_seconds: float | None = None
    learning_rate: float = 1e-3

    def __post_init__(self):
        for name in self.presets:
            preset(name)  # raises where there is none
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown:
            raise ValueError(f"engines has {unknown[0]!r}; known are {', '.join(ENGINES)}")
        if self.engines[:1] != ("ours",):
            raise ValueError(f"engines must begin with 'ours', which writes the weights for the others; got {self.engines}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, since the first is not timed; got {self.rounds}")
        if self.rows % self.accumulation:
            raise ValueError(f"rows={self.rows} do not divide into accumulation={self.accumulation} micro-batches")
        dtype = self.compute.dtype
        if dtype == "auto" or (self.platform, dtype) == ("gpu", "float32"):
            raise ValueError(
                f"compute.dtype is {dtype!r} with platform={self.platform!r}: name the type that both sides compute in, which is "
                "bfloat16 on a GPU, where libraries differ in what they call float32"
            )
        if dtype == "float32" and "transformers_compiled_bfloat16" in self.engines:
            raise ValueError("transformers_compiled_bfloat16 has no float32 to compute in; leave it out of engines")


class _Failed(RuntimeError):
    """An engine could not do what it was asked; the text is the reason in one line."""


class _Engine:
    """A process of `train_step_engines`, alive within its `with`.

    Raises:
      ConfigError: its device is not there.
      _Failed: it did not come as far as its first step.
    """

    def __init__(self, engine: str, config: Config, preset: str, folder: epath.Path):
        command = [sys.executable, "-m", "experiments.benchmarks.train_step_engines"]
        platform = "cpu" if engine.startswith("transformers") else config.platform  # there jax must not touch the GPU's memory
        environment = os.environ | {"JAX_PLATFORMS": PLATFORMS[platform], "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        job = {"engine": engine, "config": to_mapping(config), "preset": preset, "folder": str(folder)}
        try:
            self.ready = self.ask(job)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError), self._process:  # closes the pipes, without which it ends, and waits
            pass

    def ask(self, question: Any) -> dict[str, Any]:
        """See `train_step_engines`."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the line that is missing says so
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise _Failed(f"the process ended with {self._process.wait()}; what it said is above")
        answer = json.loads(line)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        if "failed" in answer:
            raise _Failed(answer["failed"])
        return answer


def main(config: Config, workdir: epath.Path) -> None:
    """Times the engines, holds their losses against each other, and writes the rates.

    Raises:
      ConfigError: the platform is a GPU, and JAX or PyTorch sees none.
      RuntimeError: engines failed; the figures of the others are written.
    """
    import jax

    deadline = None if config.limit_seconds is None else time.monotonic() + config.limit_seconds
    peak = _matmul_flops_per_second(config, workdir)
    rows, failures = [], {}
    for name in config.presets:
        answers = _timed(config, name, workdir / "weights" / name, deadline, failures)
        rows += _rows(config, name, answers, peak)
    jax.config.update("jax_platforms", PLATFORMS[config.platform])  # for the device that the results name
    about = {
        "torch_version": importlib.metadata.version("torch"), "transformers_version": importlib.metadata.version("transformers"),
        "causal_conv1d": importlib.util.find_spec("causal_conv1d") is not None, "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip
    figures = {"matmul_flops_per_second": peak, **_ratios(rows), **about}
    write_results(workdir, {**figures, "engines": [_told(row) for row in rows], "failures": failures}, config)
    if failures:
        raise RuntimeError("without figures are " + "; ".join(f"{engine}: {reason}" for engine, reason in failures.items()))


def _matmul_flops_per_second(config: Config, workdir: epath.Path) -> float:
    missing = []
    if config.platform == "gpu":
        import torch

        if not torch.cuda.is_available():
            missing.append(f"PyTorch {torch.__version__} sees none.")
    try:
        with _Engine("matmul", config, config.presets[0], workdir) as engine:
            found = engine.ready
    except ConfigError as error:
        missing.append(f"JAX says: {error}.")
    if missing:
        raise ConfigError(
            f"platform='gpu' needs an NVIDIA GPU that JAX and PyTorch see. {' '.join(missing)} Run it on a machine that has one, "
            "with the extras `gpu` and `export` (PyTorch's build for CUDA), or leave out `:gpu` to compare on the CPU."
        )
    return found["flops_per_second"]


@contextlib.contextmanager
def _noting(failures: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except _Failed as error:
        failures[name] = str(error)


def _timed(
    config: Config, name: str, folder: epath.Path, deadline: float | None, failures: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The answers of each engine that did all its turns; what others failed of is added to `failures`."""
    from rich.progress import track

    answers: dict[str, list[dict[str, Any]]] = {engine: [] for engine in config.engines}
    label = {engine: f"{name} {engine}" for engine in config.engines}
    for group in [config.engines] if config.platform == "cpu" else [(engine,) for engine in config.engines]:
        if deadline is not None and time.monotonic() > deadline:
            failures |= {label[engine]: f"not started, limit_seconds={config.limit_seconds} were over" for engine in group}
            continue
        with contextlib.ExitStack() as stack:
            running = {}
            for engine in group:
                with _noting(failures, label[engine]):
                    running[engine] = stack.enter_context(_Engine(engine, config, name, folder))
            for _ in track(range(config.rounds), description=f"{name} {', '.join(group)}"):
                for engine, process in running.items():
                    if label[engine] not in failures:
                        with _noting(failures, label[engine]):
                            answers[engine].append(process.ask(config.steps))
        for engine in group:
            print(name, engine, json.dumps([answer["seconds"] for answer in answers[engine]]), flush=True)
    return {engine: turns for engine, turns in answers.items() if label[engine] not in failures}


def _rows(config: Config, name: str, answers: dict[str, list[dict[str, Any]]], peak: float) -> list[dict[str, Any]]:
    """The figures of each engine, and under `turns` the seconds of a step in each of its timed turns."""
    tokens, rows = config.rows * config.seq, []
    flops = tokens * training_flops_per_token(preset(name), config.seq)
    losses = {engine: np.concatenate([turn["losses"] for turn in turns]) for engine, turns in answers.items()}
    for engine, answered in answers.items():
        turns = [turn["seconds"] / config.steps for turn in answered[1:]]
        seconds = float(np.median(turns))
        rows.append({
            "preset": name, "engine": engine, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "floor_seconds": flops / peak, "flops_utilization": flops / seconds / peak,
            "peak_bytes": answered[-1]["peak_bytes"], "turns": turns,
            "losses": losses[engine].tolist(), **_differences(losses, engine),
        })  # fmt: skip
    return rows


def _differences(losses: dict[str, np.ndarray], engine: str) -> dict[str, float | None]:
    """From ours, of the loss before any update, which says whether it is the same model, and the largest of all."""
    if "ours" not in losses:
        return {"first_loss_difference": None, "loss_difference": None}
    apart = np.abs(losses[engine] - losses["ours"])
    return {"first_loss_difference": float(apart[0]), "loss_difference": float(apart.max())}


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "turns"}


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much faster ours are than each engine of transformers, the median of the turns."""
    ours = [row for row in rows if row["engine"].startswith("ours")]
    theirs = [row for row in rows if not row["engine"].startswith("ours")]
    return {
        f"{one['preset']}_{one['engine']}_over_{other['engine']}": float(np.median(np.divide(other["turns"], one["turns"])))
        for one in ours
        for other in theirs
        if one["preset"] == other["preset"]
    }
