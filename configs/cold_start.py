"""From a cold environment back to one that can be practised: examples of just its problems, fine-tuning on them, and RL again.

    python run.py --config=configs/cold_start.py --workdir=workdirs/cold_start --config.run=workdirs/rl

`run` is the workdir of configs/rl.py whose `cold.json` names environments in which no answer was ever right, with pass@k of a
probe: "rare", RL may find it with more samples, or "absent", there is nothing to make likelier (DeepSeek-R1, 2025, begins with
thousands of such examples for that reason). Examples are the generator's worked solutions, or with `--config.source=rollouts`
what the policy itself got right. Then sft/ and rl/ follow in the workdir, each resumed where it stopped; rl/ draws other problems
than the examples, as far as a task has so many. Gives the accuracy of the run, after fine-tuning and after RL, and whether the
environment is still cold. The whole loop from nothing, 22 minutes of two shared cores:

    python run.py --config=configs/quickstart.py --workdir=workdirs/quickstart
    python run.py --config=configs/rl.py --workdir=workdirs/rl --config.init_from=workdirs/quickstart \
        --config.environments.names=arithmetic --config.curriculum.cold_after=3 --config.train.steps=8 \
        --config.rollouts.prompts=16 --config.rollouts.max_new_tokens=96 --config.rollouts.seq_len=256
    python run.py --config=configs/cold_start.py --workdir=workdirs/cold_start --config.run=workdirs/rl \
        --config.conversations=8192 --config.loader.seq_len=256 --config.rl_steps=40

Expect `absent`, 0 % right, and after 300 steps of fine-tuning about 64 %; the environment is not cold any longer. 40 steps
of RL, then still on the examples' own problems, left 61 %, which is no change that 64 held-out problems could tell (docs/log.md,
2026-11-28).
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict(
        {
            "experiment": "cold_start",
            "loader": {"seq_len": 512, "batch_size": 16},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"kind": "cosine", "warmup_steps": 20}},
            "train": {"steps": 300, "log_every": 10, "evaluate_every": 100, "checkpoint_every": 100},
        }
    )
