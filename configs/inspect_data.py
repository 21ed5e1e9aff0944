"""What training would see of tokenized text: shares of the sources, lengths, packing, and rows to read with their masks.

    python run.py --config=configs/inspect_data.py --workdir=workdirs/inspection --config.tokens_from=workdirs/quickstart

`tokens_from` names workdirs that hold tokenized text, those of configs/tokenize_data.py or of a training run; several, with
commas, are a mixture. `loader` is what a training run would have:

    python run.py --config=configs/inspect_data.py --workdir=workdirs/inspection --config.tokens_from=workdirs/web,workdirs/code \
        --config.loader.weights=0.7,0.3 --config.loader.seq_len=4096 --config.loader.batch_size=256

Writes tables (rows, padding, how often each source is gone through), lengths.png, mixture.png and samples.html. Seconds.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "inspect_data", "loader": {"seq_len": 512, "batch_size": 16}})
