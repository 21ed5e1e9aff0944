"""Reads a run's files back and says which are not as they were written: every checkpoint, bit by bit, the tokens, the export.

    python run.py --config=configs/scrub.py --workdir=workdirs/scrub --config.runs=workdirs/quickstart

`runs` names workdirs, several with commas. It changes one thing in them: a checkpoint that was found whole is marked, and the run
will not remove the newest such one, whatever it is told to keep. It needs no accelerator and little memory, and may be run beside
the training. Ends with code 1 if something is damaged. Seconds to minutes: it reads all there is.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "scrub"})
