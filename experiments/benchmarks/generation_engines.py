"""One engine in a process of its own: it loads a model, says so, and answers each line of JSON with a line of JSON.

    python -m experiments.benchmarks.generation_engines ENGINE MODEL PLATFORM DTYPE

ENGINE is `ours`, `ours_by_cores` (each core of a CPU a device of its own, among which matrices are split) or `transformers`, with
MODEL a Hugging Face folder, or `llama_cpp`, with a GGUF file; PLATFORM is `cpu` or `gpu`; DTYPE that of weights and numbers.
A line asks for {"prompts": [[ids], ...], "new_tokens": n}: all prompts, equally long, are continued greedily by exactly n tokens.
The answer is {"seconds", "tokens": [[ids], ...], "peak_bytes"}: of memory, the process's on a CPU, and on a GPU what the engine's
allocator had handed out at most.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import NamedTuple


class _Engine(NamedTuple):
    """generate: so many tokens behind each prompt; peak_bytes: of memory so far."""

    generate: Callable[[list[list[int]], int], list[list[int]]]
    peak_bytes: Callable[[], int]


def _host_peak_bytes() -> int:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(peak)


def _ours(folder: str, platform: str, dtype: str, devices: int = 1) -> _Engine:
    import jax

    from experiments.stages import model_functions
    from lfm_jax.generation import Engine, EngineConfig, Request, SamplingConfig
    from lfm_jax.interop import import_folder
    from lfm_jax.models import ComputeConfig
    from lfm_jax.sharding import MeshConfig, make_mesh, parameter_sharding

    model = import_folder(folder)
    functions = model_functions(model.config, ComputeConfig(dtype=dtype))
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=devices), jax.devices(platform)[:devices])
    place = lambda array, axes: jax.device_put(array, parameter_sharding(mesh, axes, array.shape))
    params = jax.tree.map(place, model.params, functions.param_axes)
    settings = EngineConfig(context=1024, steps=64, prefill_rows=64)
    engine = Engine(functions, model.config, params, model.buffers, settings, mesh=mesh)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        greedy = SamplingConfig(max_new_tokens=new_tokens, temperature=0)
        requests = [Request(prompt=tuple(ids), sampling=greedy) for ids in prompts]
        with jax.default_matmul_precision("highest"):  # float32, as the others compute in
            return [answer.tokens for answer in engine.run(requests)]

    device = jax.devices(platform)[0]
    return _Engine(generate, _host_peak_bytes if platform == "cpu" else lambda: device.memory_stats()["peak_bytes_in_use"])


def _ours_by_cores(folder: str, platform: str, dtype: str) -> _Engine:
    import jax

    cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)
    return _ours(folder, platform, dtype, cores)


def _transformers(folder: str, platform: str, dtype: str) -> _Engine:
    from experiments.export.huggingface import quiet_transformers

    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM

    device = {"cpu": "cpu", "gpu": "cuda"}[platform]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    return _Engine(generate, _host_peak_bytes if platform == "cpu" else torch.cuda.max_memory_allocated)


def _llama_cpp(file: str, platform: str, dtype: str) -> _Engine:
    del platform, dtype  # the package's llama.cpp is for CPUs, and the file's weights are float32
    import xllamacpp

    most = 64
    params = xllamacpp.CommonParams()
    params.model.path, params.n_gpu_layers, params.n_parallel, params.n_ctx = file, 0, most, most * 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.n_threads_http = most + 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], new_tokens: int) -> list[int]:
        settings = {"n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        body = json.dumps({"prompt": prompt, **settings}).encode()
        asked = urllib.request.Request(server.listening_address + "/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as response:
            return json.loads(response.read())["tokens"]

    pool = concurrent.futures.ThreadPoolExecutor(most)
    generate = lambda prompts, new_tokens: list(pool.map(lambda prompt: complete(prompt, new_tokens), prompts))
    return _Engine(generate, _host_peak_bytes)


ENGINES = {"ours": _ours, "ours_by_cores": _ours_by_cores, "transformers": _transformers, "llama_cpp": _llama_cpp}


def main(name: str, model: str, platform: str, dtype: str) -> None:
    """Answers until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    engine = ENGINES[name](model, platform, dtype)
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens = engine.generate(asked["prompts"], asked["new_tokens"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": engine.peak_bytes()}), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
