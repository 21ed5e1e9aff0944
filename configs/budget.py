"""On how many tokens to train a model of a size for a demand: the budget by each scaling law, its cost, and where it is a guess.

    python run.py --config=configs/budget.py --workdir=workdirs/budget --config.params=350e6 --config.inference_tokens=1e15

Prints, by ten laws, the tokens with which so many parameters are the cheapest model of their loss when that demand is counted
(Sardana et al. 2024), in FLOPs where whoever trains also serves, and in energy where the users' devices run it; intervals where
the law has resamples; a warning wherever a law is asked beyond its runs. `--config.tokens=28e12` adds the demand for which that
budget would be right, `--config.unique_tokens=7e12` what repetition costs, `--config.plan=WORKDIR` chip-hours from a plan of
configs/pod_plan.py. What chips and devices cost is in `--config.costs`. Expect 20 (15 to 25) trillion tokens by Chinchilla's
points, 170 times beyond their tokens a parameter. Seconds.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"this config takes no argument, got {argument!r}; say --config.params=N --config.inference_tokens=D")
    return ConfigDict({"experiment": "budget", "params": 350e6, "inference_tokens": 1e15})
