"""The published runs that the laws are fitted to: Chinchilla's points and the 104 models of Gadre et al. 2024."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lfm_jax.configuration import ConfigError
from lfm_jax.scaling import FLOPS_PER_PARAMETER_AND_TOKEN, Points, points

NEEDED = ("chinchilla/svg_extracted_data.csv", "overtraining/models", "overtraining/evals")
CORPORA = {"c4_original": "c4", "rpj": "red_pajama", "rw_original": "refined_web"}
# By the file of an evaluation set, its name in the authors' code (scaling/constants.py).
_EVALUATION_SETS = {
    "openlm": "openlm",
    "c4_val": "c4_val",
    "paloma_c4_en": "paloma_c4_en",
    "paloma_dolma_100_programing_languages": "paloma_100_programming_languages",
    "paloma_falcon-refinedweb": "paloma_refined_web",
    "paloma_ptb": "paloma_penn_tree_bank",
    "paloma_redpajama": "paloma_red_pajama",
    "de-en": "c4_german",
}
# The 17 tasks on which a model of 0.154B is 10 points above chance (SUBSET in scaling/constants.py).
TASKS_17 = (
    "bigbench_operators", "pubmed_qa_labeled", "hellaswag_zeroshot", "boolq", "arc_easy", "coqa", "bigbench_dyck_languages",
    "lambada_openai", "bigbench_novel_concepts", "winograd", "bigbench_cs_algorithms", "commonsense_qa", "bigbench_qa_wikidata",
    "hellaswag", "copa", "squad", "piqa",
)  # fmt: skip


class Model(NamedTuple):
    """A model of Gadre et al.: corpus, shape as its authors name it, N with and without embeddings, M, losses and mean errors."""

    corpus: str
    shape: str
    params: float
    body_params: float
    multiplier: float
    losses: dict[str, float]
    error_17: float
    error_46: float

    @property
    def tokens(self) -> float:
        """D = M N."""
        return self.multiplier * self.params


def folder_of(data: str, otherwise: str) -> Path:
    """The folder with the published runs.

    Args:
      otherwise: what to do without them.
    Raises:
      ConfigError: something is not there.
    """
    folder = Path(data)
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"--config.data: {folder} has no {', '.join(missing)}; set LFM_JAX_DATA to the folder with the published data, "
            f"or give {otherwise}"
        )
    return folder


def read_chinchilla(folder: Path) -> tuple[Points, Points]:
    """The points of Hoffmann et al. 2022, figure 4, as Besiroglu et al. 2024 read them off: (all 245, the 240 that they fitted).

    The five of highest loss are left out: all lie at 1e19 FLOPs with 2 to 7 billion parameters, where the colours are pale.
    """
    with (folder / "chinchilla" / "svg_extracted_data.csv").open() as file:
        rows = list(csv.DictReader(file))
    params, flops, loss = (np.array([float(row[name]) for row in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    every = points(params, flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params), loss)
    return every, every.take(np.sort(np.argsort(loss, kind="stable")[:-5]))


def read_overtraining(folder: Path) -> list[Model]:
    """The 104 models of Gadre et al. 2024 with their evaluations."""
    return [_read_model(path) for path in sorted((folder / "overtraining" / "models").glob("*.json"))]


def _read_model(path: Path) -> Model:
    model = json.loads(path.read_text())
    shape = model["hyperparameters"]
    evaluation = path.parent.parent / "evals" / f"evaluation_{path.stem}_heavy.json"
    accuracy = json.loads(evaluation.read_text())["eval_metrics"]["icl"]
    return Model(
        corpus=CORPORA[model["dataset_name"]],
        shape=model["results"][0]["model"],
        params=float(shape["params"]),
        body_params=float(shape["params_no_embed"]),
        multiplier=20 * shape["chinchilla_multiplier"],
        losses={_evaluation_set(result): result["loss"] for result in model["results"]},
        error_17=1 - float(np.mean([accuracy[task] for task in TASKS_17])),
        error_46=1 - float(np.mean(list(accuracy.values()))),
    )


def _evaluation_set(result: dict[str, Any]) -> str:
    folder = Path(result["val_data"][0]).parent.name
    return _EVALUATION_SETS[folder]
