"""What the loss of pre-training does not show: rounding, repeated text, a teacher, and fine-tuning."""

from typing import Any

import numpy as np

from experiments.scaling_study import budgets
from lfm_jax.scaling import distillation, precision, repeated_data

BITS = (8, 6, 5, 4)
_TOKENS = (7e9, 1e12, 10e12, budgets.MOST_TOKENS)
_UNIQUE = (14e12, 7e12, 3e12, 1e12)
# Most of the runs of Kumar et al. 2024: N without embeddings, D, D / N.
ROUNDING_RANGE = {"params": 220e6, "tokens": 26e9, "multiplier": 1e3}
# Springer et al. 2025 (arXiv 2503.19206): OLMo-1B fine-tunes worse from about 2.5T tokens on, OLMo-7B not up to 3T.
FINE_TUNING_MULTIPLIERS = 2100, 2500
FINE_TUNING_UNHARMED_MULTIPLIER = 430


def rounding() -> list[dict[str, Any]]:
    """Nats that rounding to so many bits after training adds (Kumar et al. 2024, table 2), by tokens."""
    rows = []
    for name in budgets.MODELS:
        size = budgets.body_params(name)
        for tokens in _TOKENS:
            added = {f"{bits}_bits": float(precision.KUMAR.degradation(size, tokens, bits)) for bits in BITS}
            beyond = {"tokens": tokens / ROUNDING_RANGE["tokens"], "multiplier": tokens / size / ROUNDING_RANGE["multiplier"],
                      "params": size / ROUNDING_RANGE["params"]}  # fmt: skip
            rows.append({"model": name, "body_params": size, "tokens": tokens, **added, "beyond": beyond})
    return rows


def repetition(params: dict[str, int]) -> list[dict[str, Any]]:
    """Nats that it costs each size to see fewer different tokens more often, of 28T (Muennighoff et al. 2023)."""
    law, tokens = repeated_data.MUENNIGHOFF, budgets.MOST_TOKENS
    rows = []
    for unique in _UNIQUE:
        added = {name: float(law.loss(size, tokens, unique) - law.loss(size, tokens, tokens)) for name, size in params.items()}
        worth = float(law.effective_tokens(tokens, unique))
        rows.append({"unique_tokens": unique, "epochs": tokens / unique, "worth_tokens": worth, **added})
    return rows


def teachers() -> list[dict[str, Any]]:
    """The loss alone and with the best teacher (Busbridge et al. 2025)."""
    rows = []
    for name in budgets.MODELS:
        size = budgets.body_params(name)
        for tokens in (100e9, 1e12, budgets.MOST_TOKENS):
            best, loss = distillation.DISTILLED.best_teacher(size, tokens)
            alone = float(distillation.SUPERVISED.loss(size, tokens))
            rows.append(
                {
                    "model": name, "tokens": tokens, "loss_alone": alone, "best_teacher_loss": best, "loss_taught": loss,
                    "gain": alone - loss, "beyond_tokens": tokens / budgets.DISTILLATION_TOKENS,
                }
            )  # fmt: skip
    return rows


def fine_tuning(params: dict[str, int]) -> list[dict[str, Any]]:
    """28T tokens against the tokens a parameter from which OLMo-1B fine-tuned worse, and up to which OLMo-7B did not."""
    rows = []
    for name, size in params.items():
        multiplier = budgets.MOST_TOKENS / size
        onset = {"times_onset": multiplier / np.mean(FINE_TUNING_MULTIPLIERS), "onset_tokens": size * FINE_TUNING_MULTIPLIERS[0]}
        rows.append({"model": name, "multiplier": multiplier, **onset})
    return rows
