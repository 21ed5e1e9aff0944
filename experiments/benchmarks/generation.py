"""Our engine's generation against transformers' and llama.cpp's: the same weights and prompts, in turns, in one run."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from experiments.benchmarks.device_rates import matmul_flops_per_second, read_bytes_per_second
from experiments.benchmarks.generation_engines import ENGINES
from experiments.benchmarks.processes import PLATFORMS, python_path
from experiments.results import write_results
from lfm_jax.configuration import ConfigError
from lfm_jax.models import ModelConfig, preset
from lfm_jax.models.accounting import decode_bytes_per_token, forward_flops_per_token, parameter_count

_PARTS = ("prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """presets: architectures, with random weights; engines: of `generation_engines`; batches: prompts at a time.

    prompt, new_tokens: lengths. rounds: turns of each engine, of which the first is not timed.
    platform: where they compute; llama.cpp, whose weights are float32, does on a CPU alone. dtype: of weights and numbers.
    """

    presets: tuple[str, ...] = ("nano", "micro")
    engines: tuple[str, ...] = tuple(ENGINES)
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    new_tokens: int = 128
    rounds: int = 4
    platform: Literal["cpu", "gpu"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in self.presets:
            preset(name)  # raises where there is none
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown:
            raise ValueError(f"engines has {unknown[0]!r}; known are {', '.join(ENGINES)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, since the first is not timed; got {self.rounds}")
        if "ours_by_cores" in self.engines and self.platform != "cpu":
            raise ValueError("ours_by_cores is of the cores of a CPU; leave it out of engines")
        if "llama_cpp" in self.engines and (self.platform, self.dtype) != ("cpu", "float32"):
            wanted = f"{self.dtype} on a {self.platform}"
            raise ValueError(f"llama_cpp computes in float32 on a CPU, not in {wanted}; leave it out of engines")


class _Engine:
    """A process of `generation_engines`."""

    def __init__(self, name: str, model: epath.Path, platform: str, dtype: str):
        command = [sys.executable, "-m", "experiments.benchmarks.generation_engines", name, str(model), platform, dtype]
        environment = os.environ | {"JAX_PLATFORMS": PLATFORMS[platform], "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"{' '.join(self._process.args[2:])} ended with {self._process.returncode}; what it said is above")
        return json.loads(line)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """See `generation_engines`."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        with self._process:  # closes the pipes, without which it ends, and waits
            pass


def _models(config: ModelConfig, engines: tuple[str, ...], folder: epath.Path) -> dict[str, epath.Path]:
    """Random weights as each engine reads them; llama.cpp's with a tokenizer for all their rows, without which it has no file."""
    import jax

    from experiments.stages import model_functions
    from lfm_jax.interop import export_folder
    from lfm_jax.interop.gguf_file import export_gguf
    from lfm_jax.models import ComputeConfig

    functions = model_functions(config, ComputeConfig())
    params, buffers = jax.jit(functions.init)(jax.random.key(0))
    tokenizer, hf, gguf = folder / "tokenizer", folder / "hf", folder / "model.gguf"
    export_folder(config, params, buffers, hf)
    if "llama_cpp" in engines:
        from data_pipelines import DocumentsConfig, TokenizerConfig, read_documents, train_tokenizer

        if not tokenizer.exists():
            text = read_documents(DocumentsConfig(source="stdlib"), "train")
            train_tokenizer(TokenizerConfig(vocab_size=config.vocab_size), text, tokenizer)
        export_gguf(config, params, buffers, gguf, tokenizer=tokenizer, type="F32")
    return {"llama_cpp": gguf, **dict.fromkeys(("ours", "ours_by_cores", "transformers"), hf)}


@contextlib.contextmanager
def _running(config: Config, models: dict[str, epath.Path]) -> Iterator[dict[str, _Engine]]:
    with contextlib.ExitStack() as stack:
        running = {}
        for name in config.engines:
            running[name] = _Engine(name, models[name], config.platform, config.dtype)
            stack.callback(running[name].close)
        yield running


def _rates(config: Config, size: int) -> tuple[float, float]:
    """Bytes a second at which so many bytes of weights are read again and again, and FLOPs a second of a large product."""
    rows = 2048 if config.platform == "cpu" else 8192
    return read_bytes_per_second(size, config.dtype), matmul_flops_per_second(rows, config.dtype)


def _rows(config: Config, name: str, model: ModelConfig, running: dict[str, _Engine]) -> list[dict[str, Any]]:
    wide = {"float32": 4, "bfloat16": 2}[config.dtype]
    bandwidth, matmul = _rates(config, wide * parameter_count(model))
    rng, rows = np.random.default_rng(0), []
    for batch in config.batches:
        prompts = rng.integers(10, model.vocab_size, (batch, config.prompt)).tolist()
        taken: dict[str, list[tuple[float, float]]] = {engine: [] for engine in running}
        tokens, peaks = {}, {}
        for _ in range(config.rounds):
            for engine, process in running.items():
                first = process.generate(prompts, 1)
                whole = process.generate(prompts, config.new_tokens + 1)
                taken[engine].append((first["seconds"], whole["seconds"] - first["seconds"]))
                tokens[engine], peaks[engine] = whole["tokens"], whole["peak_bytes"]
        context = config.prompt + config.new_tokens / 2
        cache, whole = (decode_bytes_per_token(model, context, weight, wide) for weight in (0, wide))
        read = (batch - 1) * cache + whole
        # Seconds of a step, for each of the two that it cannot do without.
        least = {"bandwidth": read / bandwidth, "flops": batch * forward_flops_per_token(model, int(context)) / matmul}
        limit = max(least, key=least.get)
        for engine, seconds in taken.items():
            prefill, decode = (statistics.median(part) for part in zip(*seconds[1:], strict=True))
            rows.append({
                "preset": name, "batch": batch, "engine": engine,
                "prefill_tokens_per_second": batch * config.prompt / prefill,
                "decode_tokens_per_second": batch * config.new_tokens / decode,
                "of_decode_floor": least[limit] * config.new_tokens / decode, "decode_limit": limit,
                "read_bytes_per_token": read / batch, "bandwidth_bytes_per_second": bandwidth, "matmul_flops_per_second": matmul,
                "same_tokens": sum(a == b for a, b in zip(tokens[engine], tokens.get("ours", []), strict=False)),
                "peak_bytes": peaks[engine],
            })  # fmt: skip
        print(*(json.dumps(row) for row in rows[-len(taken) :]), sep="\n", flush=True)
    return rows


def main(config: Config, workdir: epath.Path) -> None:
    """Measures every preset at every batch, and writes the table.

    Raises:
      ConfigError: the platform is a GPU, and JAX sees none.
    """
    import jax

    # On a GPU the engines, which take turns, and this process live side by side: none may take its memory in advance.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_platforms", PLATFORMS[config.platform])
    try:
        jax.devices(config.platform)
    except RuntimeError as error:
        raise ConfigError(f"platform='gpu' needs a GPU that JAX sees, with the extra `gpu`; it says: {error}") from error
    rows = []
    for name in config.presets:
        model = preset(name)
        with _running(config, _models(model, config.engines, workdir / name)) as running:
            rows += _rows(config, name, model, running)
    write_results(workdir, {**_ratios(rows), "generation": rows}, config)


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our rates over each other engine's."""
    ours = [row for row in rows if row["engine"].startswith("ours")]
    theirs = [row for row in rows if not row["engine"].startswith("ours")]
    about = lambda row: f"{row['preset']}_batch_{row['batch']}"
    rate = lambda row, part: row[f"{part}_tokens_per_second"]
    return {
        f"{about(one)}_{part}_{one['engine']}_over_{other['engine']}": rate(one, part) / rate(other, part)
        for one in ours
        for other in theirs
        if about(one) == about(other)
        for part in _PARTS
    }
