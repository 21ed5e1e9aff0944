"""Gadre et al. 2024 again: their constants, their headline predictions, and what the headline does not say."""

from typing import Any, NamedTuple

import numpy as np

from experiments.scaling_fit.parity import row
from experiments.scaling_fit.published_data import Model
from lfm_jax.scaling import Points, chinchilla, overtraining, points
from lfm_jax.scaling.overtraining import DownstreamError, Overtraining

_SMALL = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
_1B, _7B = "open_lm_1b", "open_lm_7b"
_EVALUATION = "c4_val"
_NOISE_SHARES = (0.002, 0.005, 0.01)
# (corpus, shape, M): relative errors of loss and of the mean error over 17 tasks, as the authors' notebook and Table 7 have them.
_HEADLINES = (
    ("red_pajama", _1B, 640, 0.007103, 0.036365, "1.4B at 900B tokens"),
    ("red_pajama", _7B, 20, 0.007320, 0.000464, "6.9B at 138B tokens"),
    ("c4", _7B, 20, 0.042952, 0.001370, "6.9B at 138B tokens"),
)
_PUBLISHED = {
    "c4": (overtraining.C4, overtraining.C4_ERROR, 3.36),
    "red_pajama": (overtraining.RED_PAJAMA, overtraining.RED_PAJAMA_ERROR, 7.42),
    "refined_web": (overtraining.REFINED_WEB, overtraining.REFINED_WEB_ERROR, 5.85),
}


class Fits(NamedTuple):
    """Of one training corpus: the five models fitted, the law of the loss, and of the mean error over 17 and 46 tasks."""

    five: list[Model]
    loss: Overtraining
    error_17: DownstreamError
    error_46: DownstreamError


def to_points(models: list[Model], evaluation: str = _EVALUATION) -> Points:
    """Models as points with their loss on an evaluation set."""
    return points(
        [model.params for model in models], [model.tokens for model in models], [model.losses[evaluation] for model in models]
    )


def fit_corpus(models: list[Model], corpus: str) -> Fits:
    """The fits of the paper: the loss from five models, four sizes at M = 20 and the smallest at 320; the error from six."""
    five = [_find(models, corpus, shape, 20) for shape in _SMALL] + [_find(models, corpus, _SMALL[0], 320)]
    six = to_points([*five, _find(models, corpus, _1B, 20)])
    errors = [
        overtraining.fit_error(six.loss, [getattr(model, name) for model in (*five, _find(models, corpus, _1B, 20))])
        for name in ("error_17", "error_46")
    ]
    return Fits(five, overtraining.fit(to_points(five)), *errors)


def study(models: list[Model], draws: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Fits]]:
    """(figures, rows of the parity table, the fits by corpus)."""
    fits = {corpus: fit_corpus(models, corpus) for corpus in _PUBLISHED}
    rows = [each for corpus in fits for each in _constants(corpus, fits[corpus])]
    predictions = [_predict(model, fits[model.corpus]) for model in models if model.shape in (_1B, _7B)]
    for corpus, shape, multiplier, loss, error, about in _HEADLINES:
        found = next(each for each in predictions if _key(each) == (corpus, shape, multiplier))
        name = f"over-training, headline, {corpus}"
        rows += [
            row(name, f"{about}: relative error of the loss", abs(found["loss_error_share"]), loss),
            row(name, f"{about}: relative error of the 17-task error", abs(found["error_17_error_share"]), error),
        ]
    figures = {
        "overtraining_predictions": predictions,
        "overtraining_noise": [_noise(fits["red_pajama"], models, share, draws, seed) for share in _NOISE_SHARES],
        "overtraining_by_evaluation_set": [
            _evaluation_set(models, corpus, fits[corpus].five, name) for corpus in fits for name in models[0].losses
        ],
        "overtraining_more_points": [_more_points(models, corpus) for corpus in fits],
    }
    return figures, rows, fits


def _find(models: list[Model], corpus: str, shape: str, multiplier: float) -> Model:
    return next(each for each in models if (each.corpus, each.shape, each.multiplier) == (corpus, shape, multiplier))


def _key(prediction: dict[str, Any]) -> tuple[str, str, float]:
    return prediction["corpus"], prediction["shape"], prediction["multiplier"]


def _constants(corpus: str, fits: Fits) -> list[dict[str, Any]]:
    law, error, multiplier = _PUBLISHED[corpus]
    name = f"over-training, {corpus} (Gadre et al. 2024)"
    rows = [row(name, key, getattr(fits.loss, key), getattr(law, key)) for key in law._fields]
    rows += [row(name, f"17 tasks: {key}", getattr(fits.error_17, key), getattr(error, key)) for key in error._fields]
    return [*rows, row(name, "M*", fits.loss.optimal_multiplier, multiplier)]


def _predict(model: Model, fits: Fits) -> dict[str, Any]:
    """What the laws say of a large model, beside what it is; the last figure is the error law's own, from the true loss."""
    loss, true = float(fits.loss.predict(to_points([model]))[0]), model.losses[_EVALUATION]
    error = float(fits.error_17.error(loss))
    return {
        "corpus": model.corpus, "shape": model.shape, "multiplier": model.multiplier, "loss": loss, "true_loss": true,
        "loss_error_share": loss / true - 1, "error_17": error, "true_error_17": model.error_17,
        "error_17_error_share": error / model.error_17 - 1,
        "error_17_from_true_loss_error_share": float(fits.error_17.error(true)) / model.error_17 - 1,
    }  # fmt: skip


def _noise(fits: Fits, models: list[Model], share: float, draws: int, seed: int) -> dict[str, Any]:
    """How far normal noise of that share on the five losses moves the prediction of 1.4B at M = 640."""
    five, target = to_points(fits.five), to_points([_find(models, "red_pajama", _1B, 640)])
    generator = np.random.RandomState(seed)
    laws = [
        overtraining.fit(points(five.params, five.tokens, five.loss * (1 + share * generator.standard_normal(len(five)))))
        for _ in range(draws)
    ]
    losses = np.array([law.predict(target)[0] for law in laws])
    return {
        "noise_share": share, "draws": draws, "prediction_deviation_share": float(losses.std() / target.loss[0]),
        "error_median_share": float(np.median(np.abs(losses / target.loss[0] - 1))),
        "E_deviation": float(np.std([law.E for law in laws])), "alpha_deviation": float(np.std([2 * law.eta for law in laws])),
    }  # fmt: skip


def _evaluation_set(models: list[Model], corpus: str, five: list[Model], name: str) -> dict[str, Any]:
    """The same five-point fit to the losses on another evaluation set, and how far off it is on the other models of M >= 20."""
    law = overtraining.fit(to_points(five, name))
    others = [model for model in models if model.corpus == corpus and model.multiplier >= 20 and model not in five]
    rest = to_points(others, name)
    errors = law.predict(rest) / rest.loss - 1
    worst = int(np.abs(errors).argmax())
    overtrained = max((model for model in others if model.shape == _1B), key=lambda model: model.multiplier)
    return {
        "corpus": corpus, "evaluation_set": name, "mean_error_share": float(np.abs(errors).mean()),
        "worst_error_share": float(errors[worst]), "worst_model": f"{others[worst].shape}, M = {others[worst].multiplier:g}",
        "1.4B_overtrained_error_share": float(errors[others.index(overtrained)]), "1.4B_multiplier": overtrained.multiplier,
    }  # fmt: skip


def _more_points(models: list[Model], corpus: str) -> dict[str, Any]:
    """Least squares on ln L over all models of M >= 20 up to 0.41B, alpha = beta, and its error on the larger ones."""
    known = [model for model in models if model.corpus == corpus and model.multiplier >= 20]
    small = to_points([model for model in known if model.shape in _SMALL])
    large = [model for model in known if model.shape not in _SMALL]
    law = chinchilla.fit(small, delta=np.inf, tied=True)
    untied = chinchilla.fit(small, delta=np.inf)
    errors = law.predict(to_points(large)) / to_points(large).loss - 1
    return {
        "corpus": corpus, "points": len(small), "E": law.E, "alpha": law.alpha,
        "untied_alpha": untied.alpha, "untied_beta": untied.beta,
        **{f"{model.shape}_M{model.multiplier:g}_error_share": float(error)
           for model, error in zip(large, errors, strict=True)},
    }  # fmt: skip
