"""Tokens a second of our training step against transformers', with the same weights, batch and optimizer, in one run.

    python run.py --config=configs/benchmarks/train_step.py --workdir=workdirs/train_step
    python run.py --config=configs/benchmarks/train_step.py:gpu --workdir=workdirs/train_step_gpu

Forward, backward, clipping and AdamW: ours, transformers' Lfm2ForCausalLM as it is, and the same through torch.compile. In
float32 on a CPU it takes a minute on two cores, which must be idle; the argument names the preset, nano if there is none.
Recorded: ours at 1.09 of transformers' rate, and at 1.08 with `--config.accumulation=4` (docs/benchmarks/train_step.md).
With `:gpu`, for one NVIDIA GPU of 80 GB, lfm2_350m and lfm2_1_2b in bfloat16 with float32 parameters, against the GPU's own
product of matrices; it starts nothing after eight minutes. On an H200 lfm2_1_2b has 1.43 of transformers' rate and 62 % of that
product's. Needs the extras `export` and `gpu`.
"""

from ml_collections import ConfigDict

from lfm_jax.models import preset

_GPU = {
    "platform": "gpu", "presets": ("lfm2_350m", "lfm2_1_2b"), "rows": 4, "seq": 4096, "accumulation": 2,
    "compute": {"dtype": "bfloat16", "attention": "cudnn", "remat": "none"}, "steps": 10, "rounds": 4, "matmul": 8192,
    "engines": (
        "ours", "transformers", "transformers_compiled", "transformers_compiled_bfloat16", "ours_whole_rows",
    ),
    "limit_seconds": 480.0,
}  # fmt: skip


def get_config(argument: str = "nano") -> ConfigDict:
    """The shapes of a preset on a CPU, or "gpu"."""
    if argument == "gpu":
        return ConfigDict({"experiment": "benchmarks.train_step", **_GPU})
    preset(argument or "nano")  # raises where there is none
    return ConfigDict(
        {
            "experiment": "benchmarks.train_step", "presets": (argument or "nano",), "rows": 8, "seq": 256, "accumulation": 1,
            "steps": 5, "rounds": 6,
        }
    )  # fmt: skip
