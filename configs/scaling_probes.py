"""Probes of a sweep's ends: does more training make a small model easier to harm, and which size answers best?

    python run.py --config=configs/scaling_probes.py --workdir=workdirs/scaling_probes --config.sweep=workdirs/scaling_sweep

Of each end of a branch of configs/scaling_sweep.py, a hybrid at the rule's rate, four things are measured on text whose entropy
is known. What rounding its blocks' matrices to 3 to 6 bits adds to the loss, and, where its widths are multiples of 32, a q4_0
file (Kumar et al. 2024, arXiv 2411.04330). What Gaussian noise of the initialisation's covariance adds (Springer et al. 2025,
arXiv 2503.19206). What 65,536 tokens of another source of the same kind leave of the old one, and how well that is learnt. And
-ln pass@k of questions whose right answer is the source's own most probable one (Roberts et al. 2026, arXiv 2604.01411).

Gives scaling_probes.md (exponents of N and D with intervals beside the published ones; each trunk over M; the best size at fixed
budgets of training and inference), scaling_probes.png, probes.jsonl, which configs/scaling_study.py reads, and results.json. A
sweep that is not finished is probed as far as it is, and what is missing is named; given again, the command probes what has come
since. Recorded: docs/scaling_probes.md; about half a minute of a core for each end.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """Takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "scaling_probes"})
