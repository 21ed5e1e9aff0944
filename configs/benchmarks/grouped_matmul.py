"""Grouped matmuls of a mixture of experts against their floor, XLA's ragged dot and megablox, without a TPU.

    python run.py --config=configs/benchmarks/grouped_matmul.py --workdir=workdirs/grouped_matmul

Compiles product and gradients at the experts of lfm2_8b_a1b and lfm2_24b_a2b (8,192 tokens a chip) for v5p, v5e and v6e, and
the whole block with experts shared by 1, 4 and 8 chips of v5p, tokens gathered or sent to them; 3 minutes for each chip and
preset and 1 for each block on 2 cores, needs libtpu. Expect ragged_dot's gradient of the matrices at 0.02 of the floor, the
kernels from 0.7 to 0.9. The recorded run (v5p, lfm2_8b_a1b) is docs/benchmarks/grouped_matmul.md. The argument names a chip.
"""

from ml_collections import ConfigDict

CHIPS = ("v5p", "v5e", "v6e")


def get_config(argument: str = "") -> ConfigDict:
    """All chips, or the one that `argument` names."""
    if argument and argument not in CHIPS:
        raise ValueError(f"unknown chip {argument!r}; one of {', '.join(CHIPS)}")
    return ConfigDict(
        {
            "experiment": "benchmarks.grouped_matmul",
            "chips": (argument,) if argument else CHIPS,
            "presets": ("lfm2_8b_a1b", "lfm2_24b_a2b"),
            "tokens": 8192,
            "meshes": (("v5p:2x2x1", 1), ("v5p:2x2x1", 4), ("v5p:2x2x2", 8)),
        }
    )
