"""How well a trained model predicts a text: nll_per_token, bits_per_byte, tokens.

    python run.py --config=configs/evaluate.py --workdir=workdirs/evaluation --config.init_from=workdirs/quickstart

`init_from` is the workdir of a run or any Hugging Face folder of an LFM2, LFM2-MoE or LFM3 model; the model's own tokenizer is
used. As it stands the text is the held-out part of Python's standard library, so that the command above gives nearly the
quickstart's own `bits_per_byte` (its rows are shorter); a text of yours, all of it:

    python run.py --config=configs/evaluate.py --workdir=workdirs/evaluation_of_mine --config.init_from=workdirs/quickstart \
        --config.data.source=FOLDER --config.data.held_out_share=1

Seconds for the quickstart's model on a laptop.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "evaluate", "data": {"source": "stdlib"}, "seq_len": 512, "batch_size": 16})
