"""Runs side by side: curves, settings that differ, the first step at which they part, final figures.

    python run.py --config=configs/compare.py --workdir=workdirs/comparison --config.runs=workdirs/a,workdirs/b

Takes seconds, also of runs that are going on; the others are compared with the first. Writes loss.png, held_out.png,
gradient_norm.png and tokens_per_second.png, by step and by tokens; in results.json and report.html, tables. Prints the
first step at which two runs part and the settings that differ. Runs that logged the same to the last bit, times and rates aside,
are said to be bit-equal.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "compare"})
