"""Blocks of splash attention's kernels on four TPU generations, by the TPU compiler's schedules, without a TPU.

    python run.py --config=configs/benchmarks/attention.py --workdir=workdirs/attention

Compiles splash attention's kernels, forward and backward in two kernels and in one, for each of the blocks below, heads of 64 and
128, with and without a window, and estimates the time of packed sequences of 4,096 and 32,768; three minutes of CPU a chip, needs
libtpu. Expect what the library takes to be 1.2 to 3.1 times as fast as blocks of 1,024 for everything, but where 32 heads at
32,768 have no room for partial sums (`least_before_over_chosen` 1.02, `most_chosen_over_best` 1.27). The recorded run is
docs/benchmarks/attention.md. The argument names a single chip.
"""

from ml_collections import ConfigDict

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


def get_config(argument: str = "") -> ConfigDict:
    """All chips, or the one that `argument` names."""
    if argument and argument not in CHIPS:
        raise ValueError(f"unknown chip {argument!r}; one of {', '.join(CHIPS)}")
    return ConfigDict(
        {
            "experiment": "benchmarks.attention",
            "chips": (argument,) if argument else CHIPS,
            "shapes": ((16, 8, 64, 0), (32, 8, 64, 0), (16, 4, 128, 0), (16, 4, 128, 256)),
            "seqs": (4096, 32_768),
            "causal": (
                (1024, 512, 512, "hhh"),
                (512, 1024, 512, "hhh"),
                (1024, 2048, 512, "hhh"),
                (1024, 1024, 512, "hss"),
            ),
            "windowed": (
                (512, 512, 512, "hhh"),
                (512, 256, 256, "hhh"),
                (1024, 128, 128, "hhh"),
            ),
        }
    )
