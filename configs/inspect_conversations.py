"""Rows of conversations as training sees them, with what is trained in green, and what is cut or refused.

    python run.py --config=configs/inspect_conversations.py --workdir=workdirs/inspection --config.init_from=workdirs/quickstart \
        --config.data.sources=FILE.jsonl,FOLDER

`data` and `loader` are those of configs/sft.py. Prints rows, and writes them to rows.html. Seconds.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "inspect_conversations", "loader": {"seq_len": 512, "batch_size": 16}})
