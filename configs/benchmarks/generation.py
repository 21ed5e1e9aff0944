"""Tokens a second of our generation beside transformers' and llama.cpp's, on the same weights and prompts.

    python run.py --config=configs/benchmarks/generation.py --workdir=workdirs/generation

Needs the extras `export` and `test` (PyTorch, transformers, xllamacpp). Each engine has a process of its own, and they take
turns; prefill is the time of one token after the prompts, decode what 128 more take. `of_decode_floor` is how much of the time of
a decoding step the machine needs to read its bytes (weights once, caches) or do its FLOPs, whichever is longer (`decode_limit`);
`read_bytes_per_token`, and the rates `bandwidth_bytes_per_second` and `matmul_flops_per_second` as they were measured in between,
are what it is computed of. `same_tokens` are prompts of which the engine says the same 129 tokens as ours. Recorded in
docs/benchmarks/generation.md.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "benchmarks.generation"})
