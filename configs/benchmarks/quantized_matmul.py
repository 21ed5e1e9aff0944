"""Whether int8 and fp8 matmuls pay in training on TPUs, by the compiler's estimates for feed-forwards; needs libtpu and no TPU.

    python run.py --config=configs/benchmarks/quantized_matmul.py --workdir=workdirs/quantized_matmul

Forward and backward pass of the dense feed-forwards of LFM2-350M and -1.2B over 8,192 tokens on v5e, v6e and tpu7x: which numbers
the compiled program multiplies, and the cycles over those of bfloat16. Expect that it multiplies eight bits and loses nearly
everywhere (docs/benchmarks/quantized_matmul.md). Ten minutes of two cores.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    chips, presets = ("v5e", "v6e", "tpu7x"), ("lfm2_350m", "lfm2_1_2b")
    return ConfigDict({"experiment": "benchmarks.quantized_matmul", "chips": chips, "presets": presets})
