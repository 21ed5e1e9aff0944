"""What programs that a model wrote can do behind each wall: the escape suite, and what a start costs.

    python run.py --config=configs/benchmarks/isolation.py --workdir=workdirs/isolation

Some thirty programs try to reach the network, files, processes, memory and disk beyond their own, or not to end. Every one must
be held behind bubblewrap, and behind landlock with seccomp, by root and by an ordinary user (`not_held` is 0); root's run tries
both users. Then `print(1)` is timed behind each wall, in turns with a bare interpreter. A few minutes on two cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "benchmarks.isolation", "repetitions": 100})
