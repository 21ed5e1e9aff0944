"""What the scaling laws say of 350M, 1.2B and 2.6B parameters up to 28T tokens, with intervals, and where they know nothing.

    python run.py --config=configs/scaling_study.py --workdir=workdirs/scaling_study --config.data=FOLDER

Writes the report with its picture: the fits, compute-optimal budgets, the predicted loss, the next trillion tokens, what training
and inference cost in all (on servers, and on the users' devices) and from which demand the small model pays, several answers in
place of size, and the risks that the loss does not show. FOLDER, or else the folder that the environment variable LFM_JAX_DATA
names, is that of `configs/scaling_fit.py`; without one the recorded resamples are used. One's own sweep is read from
`experiments/scaling_study/recorded`. Expect 2.355 (2.319 to 2.395) for the loss of lfm2_350m on 28T tokens by Chinchilla's
points, which end at 341 tokens a parameter where this has 79,000 (docs/scaling_study.md). 20 seconds of one core.
"""

import os

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}; other recorded runs are --config.recorded=FOLDER")
    return ConfigDict({"experiment": "scaling_study", "data": os.environ.get("LFM_JAX_DATA"), "resamples": 400})
