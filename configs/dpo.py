"""Preference optimisation: a model learns, of two answers to a prompt, to make the one likelier than the other.

    python run.py --config=configs/dpo.py --workdir=workdirs/dpo --config.init_from=workdirs/sft --config.data.sources=FILE.jsonl

A line of a file is a pair as TRL has them, {"prompt": [messages], "chosen": [messages], "rejected": [messages], "tools": [...]};
prompt and answers may be text. `loader.batch_size` counts pairs, and each answer has `loader.seq_len` positions with its prompt.

The argument names the loss: dpo_norm (the default: each answer's log-ratio over its own length, with Tulu 3's beta of 5), dpo,
simpo, ipo, hinge, robust, exo, apo_zero, apo_down, nca, bco, sppo or lfm2. Its settings are in `preference`:

    python run.py --config=configs/dpo.py:simpo --workdir=workdirs/simpo --config.init_from=workdirs/sft \
        --config.data.sources=FILE.jsonl --config.preference.beta=4

The reference is the model that training begins with; its log-probabilities are computed once and lie in the workdir. Gives of
what is held out (5 %), before and after, the loss, the accuracy, the rewards and their margin, log-probabilities and lengths of
chosen and rejected answers, and an estimate of the divergence from the reference. The step's `loss` begins with log 2 for dpo and
dpo_norm. As it stands this is for small models on a CPU; on a pod slice give the mesh of configs/pretrain.py, a learning rate of
1e-6 or less, and `--config.loader.batch_size=128`.
"""

import dataclasses

from ml_collections import ConfigDict

from lfm_jax.training import preference_member


def get_config(argument: str = "") -> ConfigDict:
    """argument: the loss, a name of `preference_member`; none: dpo_norm."""
    preference = preference_member(argument or "dpo_norm")
    return ConfigDict(
        {
            "experiment": "dpo",
            "loader": {"seq_len": 512, "batch_size": 16},
            "preference": dataclasses.asdict(preference),
            "reference": "none" if preference.reference_free else "precomputed",
            "optimizer": {"learning_rate": 1e-4, "schedule": {"kind": "cosine", "warmup_steps": 10}},
            "train": {"steps": 100, "log_every": 10, "evaluate_every": 50, "checkpoint_every": 50, "best_by": "loss"},
            "evaluation_batches": 16,
        }
    )
