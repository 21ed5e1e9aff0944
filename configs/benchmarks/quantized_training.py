"""Loss curves of training with int8 and fp8 matmuls beside plain ones, on real text.

    python run.py --config=configs/benchmarks/quantized_training.py --workdir=workdirs/quantized_training

The model, text and steps of configs/benchmarks/optimizers.py, with AdamW at its best learning rate there, for two seeds. On a CPU
the eight-bit products are computed as an accelerator would, only slower. Five minutes of two cores; the argument is the size.
"""

from ml_collections import ConfigDict

from configs.benchmarks.optimizers import get_config as optimizers

_RATE = 16e-3


def get_config(argument: str = "1") -> ConfigDict:
    """The comparison at a size."""
    config = optimizers(argument)
    adamw = config.arms[0]
    config.arms = tuple(
        {"name": matmul, "rates": (_RATE,), "optimizer": adamw["optimizer"], "compute": {"matmul": matmul}}
        for matmul in ("plain", "int8", "fp8")
    )
    config.seeds = 2
    return config
