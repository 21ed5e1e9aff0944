"""Damaged and hostile files of every format that is read from outside: clear errors, no crash, no hang, no wrong weights.

    python run.py --config=configs/benchmarks/outside_files.py --workdir=workdirs/outside_files

Each format is read in a worker process: crafted files, and 2,000 copies of a sound one with a seeded damage. Expect 0 for
`silently_wrong`, `unclear_error`, `crash`, `hang` (over 10 s of processor time) and `growth` (over 2 GB); 15 minutes on 2 cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "benchmarks.outside_files", "mutants": 2000})
