"""Runs a GGUF file on a phone, again and again until it is warm, and brings the figures back.

    python run.py --config=configs/phone_benchmark.py --workdir=workdirs/phone --config.gguf=FILE --config.llama_bench=FILE

Needs `adb`, a phone in developer mode, and `llama-bench` of llama.cpp built for it (its docs/android.md says how; with shared
libraries beside it, they are pushed too). `--config.dry_run=True` shows the commands and runs none. Phones slow down as they get
warm, so that one figure misleads: expect `decode_tokens_per_second_last` below `_first`. Twenty runs take some minutes.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "phone_benchmark"})
