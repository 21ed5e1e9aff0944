"""Tokens a second of our generation beside transformers' and llama.cpp's, on the same weights and prompts.

    python run.py --config=configs/benchmarks/generation.py --workdir=workdirs/generation
    python run.py --config=configs/benchmarks/generation.py:gpu --workdir=workdirs/generation_gpu

Needs the extras `export` and `test` (PyTorch, transformers, xllamacpp). Each engine has a process of its own, and they take
turns (`ours_by_cores` is ours with a device for each core); prefill is the time of one token after the prompts, decode what 128
more take. `of_decode_floor` is how much of the time of a decoding step the machine needs to read its bytes (weights once, caches)
or do its FLOPs, whichever is longer (`decode_limit`);
`read_bytes_per_token`, and the rates `bandwidth_bytes_per_second` and `matmul_flops_per_second` as they were measured in between,
are what it is computed of. `same_tokens` are prompts of which the engine says the same 129 tokens as ours. Recorded in
docs/benchmarks/generation.md.
"""

from ml_collections import ConfigDict

_GPU = {
    "platform": "gpu", "dtype": "bfloat16", "presets": ("lfm2_350m", "lfm2_1_2b"), "engines": ("ours", "transformers"),
    "rounds": 3,
}  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    """For a CPU, or a "gpu"."""
    if argument not in ("", "gpu"):
        raise ValueError(f"unknown argument {argument!r}; there is gpu, and none for a CPU")
    return ConfigDict({"experiment": "benchmarks.generation", **(_GPU if argument else {})})
