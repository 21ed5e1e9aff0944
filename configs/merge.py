"""Several trained models of one architecture merged into one, from which the next stage starts.

    python run.py --config=configs/merge.py --workdir=workdirs/merged --config.init_from=workdirs/first,workdirs/second

`init_from` names workdirs of runs, or Hugging Face folders, that have one architecture and one tokenizer. The new workdir is a
stage like theirs: name it in `init_from` of configs/pretrain.py, evaluate.py, export.py or serve.py. As it stands the result is
the mean (model soups, Wortsman et al. 2022); `--config.merge.weights=1,3` weighs it. Of two models, tensor by tensor along the
great circle:

    python run.py --config=configs/merge.py --workdir=workdirs/merged --config.init_from=workdirs/first,workdirs/second \
        --config.merge.method=slerp --config.merge.weights=0.6,0.4

With `base`, what the models were trained from: TIES (Yadav et al. 2023) keeps the largest entries of each difference from it, and
of those the mean of the ones that agree in sign; task arithmetic (Ilharco et al. 2023) adds the differences, each times its
weight, of which a negative one unlearns.

    python run.py --config=configs/merge.py --workdir=workdirs/merged --config.init_from=workdirs/first,workdirs/second \
        --config.base=workdirs/base --config.merge.method=ties --config.merge.density=0.2
    python run.py --config=configs/merge.py --workdir=workdirs/merged --config.init_from=workdirs/first,workdirs/second \
        --config.base=workdirs/base --config.merge.method=task_arithmetic --config.merge.weights=0.5,0.5

The figures: the norm of each model, and of its difference from the merged one and from the base. Seconds for small models; all of
them are in memory at once.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    """There is one; it takes no argument."""
    if argument:
        raise ValueError(f"{argument!r}: this config takes no argument")
    return ConfigDict({"experiment": "merge"})
