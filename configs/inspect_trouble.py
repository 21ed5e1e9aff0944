"""The texts of a run's troubled steps, with the loss of every row and document, so that the odd one stands out.

    python run.py --config=configs/inspect_trouble.py --workdir=workdirs/trouble --config.run=workdirs/quickstart

A training run keeps the batch of every step whose loss or gradient norm was no finite number or a spike (`train.trouble`). `run`
is its workdir. The loss is that of its newest good checkpoint from before the step, on one device. Writes a table of the steps
(what was done, loss and what was usual, the row with the highest loss), samples.html with the rows in full, documents in colors,
struck out where the loss leaves them out, and results.json. Seconds, and for each batch as long as an evaluation of it.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "inspect_trouble"})
