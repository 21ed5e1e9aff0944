"""Writes a trained model as a Hugging Face folder, and has transformers read it where it is installed.

    python run.py --config=configs/export.py --workdir=workdirs/exported --config.init_from=workdirs/quickstart

The folder is export/hf in the workdir; expect `hf_greedy_agrees` and an `hf_logit_difference` below 2e-4. Seconds for small
models; `--config.export.check_tokens=0` leaves the comparison out where PyTorch would not hold the model.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "export", "export": {"dtype": "float32"}})
