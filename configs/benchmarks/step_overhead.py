"""The host's time for a training step above that of a plain jitted function over the same arrays.

    python run.py --config=configs/benchmarks/step_overhead.py --workdir=workdirs/step_overhead

Times the call of the training step on a batch that is already placed, and in turns with it a plain `jax.jit` of the same
computation on a flat list of arrays, so that what the device does is the same on both sides; for the arrays of nano (172) and of
lfm2_350m (448), all of them tiny.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}")
    return ConfigDict({"experiment": "benchmarks.step_overhead", "presets": ("nano", "lfm2_350m"), "repetitions": 1000})
