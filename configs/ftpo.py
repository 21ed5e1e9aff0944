"""Final-token preference optimisation: where a model began to loop, it learns to say something else that may stand there.

    python run.py --config=configs/ftpo.py --workdir=workdirs/ftpo --config.init_from=workdirs/sft \
        --config.pairs=workdirs/loops/loops

The pairs are those of configs/preference_data.py:loops: a text up to where a doom loop's second repetition begins, the token that
begins it, and others that are likely there. Each of these is raised until it leads that token by `loss.margin` logits, while all
other logits are tethered to those of the model that training begins with (FTPO, of Liquid AI's antidoom, 2026, by which an early
LFM2.5-2.6B went from 10.2 % of loops to 1.4 %, as they report). Tokens that begin loops more often than the median one have
pairs left out (`flatten`). Antidoom trains adapters:

    python run.py --config=configs/ftpo.py --workdir=workdirs/ftpo --config.init_from=workdirs/sft \
        --config.pairs=workdirs/loops/loops --config.low_rank.rank=256 --config.optimizer.learning_rate=1.5e-5

Gives of the pairs of held-out prompts (5 %), before and after, the loss, `chosen_win`, the share of alternatives that the model
holds for likelier than the loop's token, the probabilities of that and of those, and how far the other logits have moved.
Antidoom stops at a `chosen_win` of 0.4, and for a reason: of a model of random weights whose answers to 80 other prompts looped
in 20 % none did after 10 steps, and 28 % after 60, with other tokens. The step that came to it is told
(`chosen_win_reached_at_step`): set `train.steps` to it, and measure the answers again. As it stands this is for small models on a
CPU.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict(
        {
            "experiment": "ftpo",
            "loader": {"seq_len": 1024, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-4, "schedule": {"kind": "cosine", "warmup_steps": 10}},
            "train": {"steps": 100, "log_every": 5, "evaluate_every": 50, "checkpoint_every": 50, "best_by": "loss"},
            "evaluation_batches": 16,
        }
    )
