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

    python run.py --config=configs/preference_data.py:loops --workdir=workdirs/loops --config.init_from=workdirs/sft \
        --config.rollouts=workdirs/preferences

makes pairs of the second kind of those answers, for configs/ftpo.py (Liquid AI's antidoom, 2026): for each that loops, all ids up
to where the second repetition begins, the token that begins it, and up to 20 that the policy would as soon say there (of at least
`min_probability`). Antidoom draws its answers at temperature 0.1. Gives the folder loops/, shard by shard, and how many places
and pairs there are and which tokens begin loops.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """argument: none, or "loops": the pairs of final tokens in what was answered."""
    if argument not in ("", "loops"):
        raise ValueError(f"{argument!r}: this config takes the argument loops, or none")
    return ConfigDict({"experiment": "preference_data.loops" if argument else "preference_data"})
