"""Doom loops made and unmade: pre-training, SFT, preferences and RL of a small hybrid, each measured, over several seeds.

    python run.py --config=configs/doom_loop.py --workdir=workdirs/doom_loop

A model of 0.28M parameters (one short convolution, two attention layers) is pre-trained on rough searches of the numbers game,
which repeat themselves; fine-tuned on clean ones; asked for preference data, five answers drawn and one greedy, loops rejected
first; trained on the pairs with length-normalised DPO; and by reinforcement learning with a penalty for repeated n-grams, on
answers at low temperatures and greedy ones. After each step 256 held-out problems with one solution are answered, greedily and at
temperatures 0.1 and 0.6. Each stage is the one of its own config, in a workdir of its own (seed_0/sft, ...), with the settings
below; what has ended is not run again. Ablations leave one thing out, or put another loss in its place, with the first seed.

Gives doom_loop.md, the shares of doom loops beside accuracy and length, with intervals, over all seeds; doom_loop.png, beside the
shape that was published (15.7 %, about the same, about 4 %, 0.36 %); and in results.json which falls count: only those without a
loss of accuracy at any temperature. Expect greedy doom loops of about 95, 69, 57 and 36 % after pre-training, SFT, DPO and RL, at
temperature 0.1 of 83, 11, 7 and 0.4 %, and greedy accuracy of 5, 10, 17 and 29 %; seeds differ by up to 40 points after DPO
(docs/doom_loop.md). A seed takes about 17 minutes of one core, the ablations 27, and all 45 minutes of two. The chain of a
model that has hardly begun to learn, in minutes: `--config=configs/doom_loop.py:quick`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.dpo import get_config as dpo
from configs.ftpo import get_config as ftpo
from configs.measure_answers import get_config as measure_answers
from configs.preference_data import get_config as preference_data
from configs.rl import get_config as rl
from configs.sft import get_config as sft

_TASK, _HARD = "numbers_game", 2
# A question has up to 18 tokens, a solution 51 on average and 170 at most; a rough search has no end.
_NEW_TOKENS, _CONTEXT = 160, 192
_LATER = "(the step before)"  # filled in by the experiment
# The more there is to see the earlier, for whoever stops the run.
_ABLATIONS = ("no_greedy_rollout", "final_token", "no_dpo", "no_penalty", "temperature_1", "plain_dpo", "no_dpo_temperature_1")
MODEL = {
    "vocab_size": 320, "embed_dim": 96, "layer_types": ("conv", "full_attention", "full_attention"), "num_heads": 3,
    "num_kv_heads": 1, "head_dim": 32, "mlp_dim": 192, "context_length": 512,
}  # fmt: skip
_ENGINE = {"context": _CONTEXT, "slots": 256, "prefill_chunk": 32, "prefill_rows": 64}


def get_config(argument: str = "") -> ConfigDict:
    """argument: none, or "quick": one seed, and a model that has hardly begun to learn, to see the whole chain run."""
    if argument not in ("", "quick"):
        raise ValueError(f"{argument!r}: this config takes no argument but 'quick'")
    config = ConfigDict({"experiment": "doom_loop", **_whole()})
    if argument:
        config.update(_quick())
    return config


def settings_of(config: ConfigDict, changes: dict[str, Any]) -> dict[str, Any]:
    """Of a stage, with changes."""
    settings = config.to_dict()
    del settings["experiment"]
    return _merged(settings, changes)


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = _merged(settings[name], value) if inner else value
    return settings


def _schedule(kind: str, warmup: int) -> dict[str, Any]:
    return {"kind": kind, "warmup_steps": warmup}


def _train(steps: int, **others: Any) -> dict[str, Any]:
    return {"steps": steps, "log_every": 10, "evaluate_every": steps, "checkpoint_every": max(steps // 4, 1), **others}


def _whole() -> dict[str, Any]:
    answers = {"max_new_tokens": _NEW_TOKENS, "engine": _ENGINE}
    return {
        "ablations": _ABLATIONS, "texts": 40_000,
        "text": {"data": {"source": _LATER, "held_out_share": 0.01}, "tokenizer": {"vocab_size": 310, "train_bytes": 1 << 20}},
        "conversations": {"tasks": (_TASK,), "conversations": 16_000},
        "pretrain": {
            "tokens_from": (_LATER,), "model": MODEL, "loader": {"seq_len": 256, "batch_size": 16},
            "optimizer": {"learning_rate": 16e-3, "matrices": "muon", "schedule": {**_schedule("wsd", 20), "decay_share": 0.4}},
            "train": _train(600), "export": None,
        },
        "sft": settings_of(sft(), {
            "init_from": _LATER, "data": {"sources": (_LATER,)}, "loader": {"seq_len": 256, "batch_size": 16},
            "optimizer": {"learning_rate": 2e-3}, "train": _train(300), "evaluation_batches": 4,
        }),
        "preferences": settings_of(preference_data(), {
            "init_from": _LATER, "tasks": (_TASK,), "difficulties": (_HARD,), "prompts": 3072, **answers,
        }),
        "dpo": settings_of(dpo(), {
            "init_from": _LATER, "data": {"sources": (_LATER,)}, "loader": {"seq_len": _CONTEXT, "batch_size": 16},
            "preference": {"sft_weight": 1.0}, "optimizer": {"learning_rate": 3e-4}, "train": _train(180),
            "evaluation_batches": 4,
        }),
        "loops": settings_of(preference_data("loops"), {"init_from": _LATER, "rollouts": _LATER, "engine": _ENGINE}),
        "ftpo": settings_of(ftpo(), {
            "init_from": _LATER, "pairs": _LATER, "loader": {"seq_len": _CONTEXT}, "train": _train(60), "evaluation_batches": 4,
        }),
        "rl": settings_of(rl("dapo"), {
            "init_from": _LATER, "environments": {"names": (_TASK,), "difficulties": (_HARD,)},
            "rollouts": {
                "prompts": 16, "temperatures": ((0.6, 4), (0.3, 3), (0.0, 1)), "max_new_tokens": _NEW_TOKENS, "seq_len": _CONTEXT,
            },
            "rewards": {"ngram": 20, "ngram_penalty": -0.5, "loop_penalty": -0.5},
            "engine": {**_ENGINE, "context": None, "prefix_bytes": 0}, "evaluation": {"problems": 64, "temperatures": (0.0,)},
            "train": _train(100, accumulation=1),
        }),
        "measure": settings_of(measure_answers(), {
            "init_from": _LATER, "tasks": (_TASK,), "difficulties": (_HARD,), "problems": 256, **answers,
        }),
    }  # fmt: skip


def _quick() -> dict[str, Any]:
    return {
        "seeds": 1, "ablations": ("no_greedy_rollout",), "texts": 10_000, "processes": 1,
        "conversations": {"conversations": 2000},
        "pretrain": {"train": _train(150)}, "sft": {"train": _train(30)},
        # What it says is hardly ever right: any two answers that differ make a pair.
        "preferences": {"prompts": 64, "pairs": {"acceptable": 0.0, "min_margin": 0.0, "min_agreement": 0.0}},
        "dpo": {"train": _train(20)}, "rl": {"train": _train(10), "optimizer": {"schedule": {"warmup_steps": 1}}},
        "measure": {"problems": 32},
    }  # fmt: skip
