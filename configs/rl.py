"""Reinforcement learning with verifiable rewards: a model answers, programs judge, and better answers become likelier.

    python run.py --config=configs/rl.py --workdir=workdirs/rl --config.init_from=workdirs/sft \
        --config.environments.names=arithmetic,word_problems

Environments are the tasks of configs/task_data.py, gsm8k:FILE, reasoning_gym:NAME, the shop (several turns, with tools), and
trl:MODULE:CLASS:ROWS, classes that were written for TRL's `environment_factory`. The argument names the loss: dapo (the default),
grpo, dr_grpo, gspo or cispo. A batch is of 32 prompts with eight answers each, six drawn at temperature 1, one at 0.3 and one
greedy: loops hardly appear at temperature 1, and what never happens cannot be unlearnt. Answers that repeat n-grams or end in a
loop are worth less. One step behind, with truncated importance sampling:

    python run.py --config=configs/rl.py:dr_grpo --workdir=workdirs/rl_behind --config.init_from=workdirs/sft \
        --config.environments.names=arithmetic --config.environments.adaptive=True --config.rollouts.lag=1 \
        --config.policy.importance_cap=2

With --config.replay_routing=True the tokens of a mixture of experts are learnt from by the experts that they were drawn by; with
--config.low_rank.rank=16 adapters are trained instead of the model.

Gives in `metrics.jsonl` the loss; the gap between sampler and trainer, the entropy, what is clipped and, of a mixture of experts,
the share of routing that is equal in both, of each environment as well; rewards by part, lengths, loops and groups without
variance, of each environment and temperature; in rollouts/ all answers with what they were worth; and of held-out problems,
before, on the way and after, accuracy and loops, with a picture. What nobody ever solves is told in `cold.json`: see
configs/cold_start.py. As it stands this is for small models on a CPU, seconds to minutes a step; on a pod slice give the mesh of
configs/pretrain.py, a learning rate of 1e-6, and more prompts.
"""

import dataclasses

from ml_collections import ConfigDict

from lfm_jax.training import policy_gradient_member


def get_config(argument: str = "") -> ConfigDict:
    """argument: the loss, a name of `policy_gradient_member`; none: dapo."""
    member = argument or "dapo"
    tokens = 256
    policy = policy_gradient_member(member, **({"max_tokens": tokens} if member == "dr_grpo" else {}))
    return ConfigDict(
        {
            "experiment": "rl",
            "rollouts": {"temperatures": ((1.0, 6), (0.3, 1), (0.0, 1)), "max_new_tokens": tokens, "seq_len": 2 * tokens},
            "rewards": {"other_parts": 0.1, "ngram_penalty": -0.5, "loop_penalty": -0.5},
            "advantages": {"scale": "none" if member == "dr_grpo" else "group"},
            "policy": dataclasses.asdict(policy),
            "optimizer": {"learning_rate": 1e-4, "schedule": {"kind": "wsd", "warmup_steps": 5}},
            # 256 rows of 512 tokens together took 29 GB with the quickstart's model.
            "train": {
                "steps": 200, "accumulation": 8, "log_every": 1, "evaluate_every": 20, "checkpoint_every": 20,
                "best_by": "-accuracy",
                "watch": {"data": 7200.0},
            },
        }
    )
