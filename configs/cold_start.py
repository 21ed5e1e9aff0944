"""From a cold environment back to one that can be practised: examples of just its problems, fine-tuning on them, and RL again.

    python run.py --config=configs/cold_start.py --workdir=workdirs/cold_start --config.run=workdirs/rl

`run` is the workdir of configs/rl.py whose `cold.json` names environments in which no answer was ever right, with pass@k of a
probe: "rare", RL may find it with more samples, or "absent", there is nothing to make likelier (DeepSeek-R1, 2025, begins with
thousands of such examples for that reason). Examples are the generator's worked solutions, or with `--config.source=rollouts`
what the policy itself got right. Then sft/ and rl/ follow in the workdir, each resumed where it stopped; rl/ draws other problems
than the examples, as far as a task has so many. Gives the accuracy of the run, after fine-tuning and after RL, and whether the
environment is still cold.

The whole loop from nothing, 25 minutes of two shared cores:

    python run.py --config=configs/cold_start.py:from_nothing --workdir=workdirs/cold_start

pre-trains a model of 0.3M parameters on Python's standard library (pretrain/), and asks it the numbers game of docs/doom_loop.md,
which it has never seen (first_rl/). Expect `absent`, and of 512 held-out problems with one solution, where none was right, 29 %
right greedily, 46 % at temperature 0.1 and 68 % at 0.6 after fine-tuning; after RL 41, 57 and 67 % (docs/log.md, 2026-11-28).
"""

from typing import Any

from ml_collections import ConfigDict

from configs.doom_loop import MODEL, settings_of
from configs.pretrain import get_config as pretrain
from configs.rl import get_config as rl

_TEXT_VOCAB = 512


def get_config(argument: str = "") -> ConfigDict:
    """argument: none, or "from_nothing": with a run that goes cold before it."""
    if argument not in ("", "from_nothing"):
        raise ValueError(f"{argument!r}: this config takes no argument but 'from_nothing'")
    config = ConfigDict(
        {
            "experiment": "cold_start",
            "loader": {"seq_len": 512, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 20}},
            "train": {"steps": 300, "log_every": 10, "evaluate_every": 100, "checkpoint_every": 100},
        }
    )
    if argument:
        config.update(_from_nothing())
    return config


def _from_nothing() -> dict[str, Any]:
    muon = {"learning_rate": 16e-3, "matrices": "muon"}
    rows = {"seq_len": 256, "batch_size": 16}
    return {
        "first": {
            "pretrain": settings_of(pretrain(), {
                "model": {**MODEL, "vocab_size": _TEXT_VOCAB}, "tokenizer": {"vocab_size": _TEXT_VOCAB}, "loader": rows,
                "optimizer": {**muon, "schedule": {"warmup_steps": 20}},
                "train": {"steps": 300, "evaluate_every": 300, "checkpoint_every": 100},
            }),
            "rl": settings_of(rl(), {
                "init_from": "(pretrain)",  # filled in by the experiment
                "environments": {"names": ("numbers_game",), "difficulties": (2,)}, "curriculum": {"cold_after": 3},
                "rollouts": {
                    "prompts": 32, "temperatures": ((0.6, 4), (0.3, 2), (0.1, 1), (0.0, 1)),
                    "max_new_tokens": 160, "seq_len": 256,
                },
                # A search writes the same few lines in many ways: with n of 10 what is right is penalized as well.
                "rewards": {"ngram": 20},
                "evaluation": {"problems": 512, "temperatures": (0.0, 0.1, 0.6)},
                "train": {"steps": 8, "accumulation": 1, "evaluate_every": 50, "checkpoint_every": 25},
            }),
        },
        "conversations": 16_384, "loader": rows, "optimizer": muon,
        "train": {"steps": 600, "evaluate_every": 600, "checkpoint_every": 200}, "rl_steps": 100,
    }  # fmt: skip
