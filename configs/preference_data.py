"""On-policy preference data: a model answers each prompt six times, a jury scores the answers, the best and the worst pair.

    python run.py --config=configs/preference_data.py --workdir=workdirs/preferences --config.init_from=workdirs/sft \
        --config.tasks=arithmetic,word_problems

Five answers are sampled and one is greedy: loops hardly appear at temperature 1, and users see the greedy one. A task's verifier
judges, and whoever else is named: chat models behind an API as MODEL@URL, and models of our own by likelihood:

    python run.py --config=configs/preference_data.py --workdir=workdirs/preferences --config.init_from=workdirs/sft \
        --config.conversations=FILE.jsonl --config.judges.endpoints=MODEL@http://127.0.0.1:8000/v1 \
        --config.judges.likelihoods=workdirs/quickstart

An answer in a doom loop is rejected first, whatever its score (`pairs.rule=score`: the lowest is); a pair is dropped whose best
answer was cut off, or is neither right nor acceptable, or hardly better than the worst. Gives, in shards of 256 prompts, the
folders rollouts/ (everything: answers with ids and log-probabilities, what each judge said, both rules' choices) and pairs/ (what
TRL reads), and `results.json`: shares of loops, of what is right and of what is dropped, and by which reason. Killed and started
again it goes on behind the last whole shard; on several hosts each takes its part of the shards. Minutes for 1,000 prompts of a
small model on a CPU.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "preference_data"})
