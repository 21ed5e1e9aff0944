"""Flipped bits, truncations, zeroed blocks and deletions in every file of a checkpoint: what `restore` and scrub make of them.

    python run.py --config=configs/benchmarks/checkpoint_damage.py --workdir=workdirs/checkpoint_damage

Writes two steps of a state of several dtypes, sharded over eight simulated devices, and damages the newer in some 1,600 ways,
one at a time. Expected: each is noticed, told of by the step's name, and the older step used, exact to the bit; or it is in bytes
that nothing reads, and the newer step is exact. Four minutes on two cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "benchmarks.checkpoint_damage"})
