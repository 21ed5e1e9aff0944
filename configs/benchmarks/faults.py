"""200 faults of 19 kinds in one run of two processes: nothing may be lost, and somebody must say who it was.

    python run.py --config=configs/benchmarks/faults.py --workdir=workdirs/faults

Two processes train a tiny model; one fault after the other strikes them (killed, frozen, stuck, raising, slow, told to stop, a
full disk, torn, lost and flipped writes, a flipped bit in one device's memory, a corrupted shard, ...), and after each the same
command is given again. Some batches are not numbers, and their updates are left out. At the end weights, optimizer, place in the
data and every logged figure must be those of a run that nothing happened to, to the bit: `identical`. A seed and a commit give
the same faults again. Writes what became of each to faults.jsonl, and a table: seconds from the fault to the end of the last
process, whether it was told, and exit codes. 200 faults take over an hour on two cores; with other work on them, a step may take
longer than it is allowed, so give it more (`--config.stay=14`). Interrupted, it goes on.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "benchmarks.faults"})
