"""Tokens a second of our training step against transformers', with the same weights, batch and optimizer, in one run.

    python run.py --config=configs/benchmarks/train_step.py --workdir=workdirs/train_step

Forward, backward, clipping and AdamW in float32 on a CPU: ours, transformers' Lfm2ForCausalLM as it is, and the same through
torch.compile, in turns. Five minutes on two cores. Expect ours at 1.2 times transformers or more.
The argument names the preset, nano if there is none; needs the extra `export`.
"""

from ml_collections import ConfigDict

from lfm_jax.models import preset


def get_config(argument: str = "nano") -> ConfigDict:
    """The shapes of a preset."""
    preset(argument or "nano")  # raises where there is none
    return ConfigDict(
        {"experiment": "benchmarks.train_step", "preset": argument or "nano", "rows": 8, "seq": 256, "steps": 5, "rounds": 6}
    )
