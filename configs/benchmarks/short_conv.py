"""The short-convolution kernel against its memory floor and against XLA, on four TPU generations, without a TPU.

    python run.py --config=configs/benchmarks/short_conv.py --workdir=workdirs/short_conv

Compiles the Pallas kernels, XLA's version and the whole block (in_proj, gate, convolution, gate, out_proj) for v5e, v5p, v6e and
tpu7x, and compares bytes and cycles; 13 minutes on 2 cores, needs libtpu. Expect bytes within 1.1 % of the least possible
(`most_bytes_over_least` 1.011), compute hidden behind memory but for width 7 on tpu7x (`most_compute_over_memory` 1.88, packed),
and no block more than 0.5 % slower with the kernel (`least_xla_over_kernel_block` 0.995). The recorded run is
docs/benchmarks/short_conv.md. The argument names a single chip.
"""

from ml_collections import ConfigDict

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


def get_config(argument: str = "") -> ConfigDict:
    """All chips, or the one that `argument` names."""
    if argument and argument not in CHIPS:
        raise ValueError(f"unknown chip {argument!r}; one of {', '.join(CHIPS)}")
    return ConfigDict(
        {
            "experiment": "benchmarks.short_conv",
            "chips": (argument,) if argument else CHIPS,
            "presets": ("lfm2_350m", "lfm2_700m", "lfm2_1_2b", "lfm3_1_7b"),
            "seq": 4096,
            "batches": (2, 8),
            "long_seq": 131_072,
            "document_length": 512,
        }
    )
