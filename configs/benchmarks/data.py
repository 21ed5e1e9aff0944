"""Tokens a second from shards to packed batches against a plain read and Hugging Face datasets; tokenization; start-up.

    pip install datasets
    python run.py --config=configs/benchmarks/data.py --workdir=workdirs/data_benchmark

On one core, in turns: this project's loader, the same files read from front to back, and `datasets` with torch's DataLoader (a
package that only this needs). Then with worker processes; fifty evaluations; a loop that fails; opening corpora of ten billion to
a trillion tokens of which only the indices exist; and tokenization against the tokenizer's own encoding. A few minutes on two
cores, which must be idle. Recorded: docs/benchmarks/data.md.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "benchmarks.data"})
