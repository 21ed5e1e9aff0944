"""Tokens a second of our training step against transformers', with the same weights, batch and optimizer, in one run.

    python run.py --config=configs/benchmarks/train_step.py --workdir=workdirs/train_step

Forward, backward, clipping and AdamW in float32 on a CPU: ours, transformers' Lfm2ForCausalLM as it is, and the same through
torch.compile, in turns. A minute on two cores, which must be idle. Recorded: ours at 0.84 of transformers' rate, later at 0.95
with `--config.accumulation=4` (docs/benchmarks/train_step.md). The argument names the preset, nano if there is none; needs the
extra `export`.
"""

from ml_collections import ConfigDict

from lfm_jax.models import preset


def get_config(argument: str = "nano") -> ConfigDict:
    """The shapes of a preset."""
    preset(argument or "nano")  # raises where there is none
    return ConfigDict(
        {
            "experiment": "benchmarks.train_step", "preset": argument or "nano", "rows": 8, "seq": 256, "accumulation": 1,
            "steps": 5, "rounds": 6,
        }
    )  # fmt: skip
