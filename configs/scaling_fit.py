"""Scaling laws against what was published of them: Chinchilla's and Gadre et al.'s fits repeated, other laws' values computed.

    python run.py --config=configs/scaling_fit.py --workdir=workdirs/scaling_fit --config.data=FOLDER
    python run.py --config=configs/scaling_fit.py --workdir=workdirs/my_laws --config.points=sweep.jsonl

FOLDER, or else the folder that the environment variable LFM_JAX_DATA names, has `chinchilla/svg_extracted_data.csv` of
epoch-research/analyzing-chinchilla and `overtraining`, the models and evaluations of mlfoundations/scaling. results.json has each
figure as ours, published and difference. The second command fits the laws to points of one's own: a line of params, tokens and
loss each, with unique_tokens where tokens were repeated, samples where answers were drawn, teacher_loss where there was a
teacher, or weight_bits where the loss is what rounding added; lines that say so in held_out are foreseen, not fitted (.jsonl or
.csv). The Huber minimum of Chinchilla's points is at E 1.81722, A 477.83, B 2143.4, alpha 0.34731, beta 0.36717
(docs/scaling_laws.md). With 4,000 resamples a minute of one core.
"""

import os

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}; points of one's own are --config.points=FILE")
    return ConfigDict({"experiment": "scaling_fit", "data": os.environ.get("LFM_JAX_DATA"), "resamples": 4000})
