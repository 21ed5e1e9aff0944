"""What the laws give beside what was published: rows of ours, published and the difference.

Not every figure on the published side is printed in its paper: some are what the printed constants come to, computed apart from
this code. Their rows say printed = False.
"""

from typing import Any

from lfm_jax.scaling import distillation, inference_aware, repeated_data

_GOPHER_FLOPS = 5.76e23  # N* and D* there are printed in huggingface/datablations, utils/parametric_fit.ipynb
# (N, D, supervised loss, best teacher's loss, the student's loss with it) by the constants of Busbridge et al.'s Table 6.
_DISTILLED = (
    (1e9, 2e10, 2.3747, 1.723, 2.2523),
    (300e6, 6e9, 2.6705, 1.833, 2.4589),
    (300e6, 1e12, 2.3417, 2.158, 2.3319),
    (350e6, 28e12, 2.2746, 2.122, 2.2755),
)


def row(law: str, figure: str, ours: float, published: float, *, printed: bool = True) -> dict[str, Any]:
    """A row of the table: difference is ours less the published, relative_difference_share that over the published."""
    difference = float(ours) - published
    return {
        "law": law, "figure": figure, "ours": float(ours), "published": published, "difference": difference,
        "relative_difference_share": difference / published, "printed": printed,
    }  # fmt: skip


def from_constants() -> list[dict[str, Any]]:
    """The rows that need no points: what published constants give, against what was published of it."""
    return [*_repeated(), *_inference_aware(), *_distilled()]


def _repeated() -> list[dict[str, Any]]:
    law = repeated_data.MUENNIGHOFF
    name = "repeated data (Muennighoff et al. 2023)"
    rows = [
        row(name, f"{epochs} epochs of U tokens are worth, in U", law.effective_tokens(epochs, 1.0), published, printed=False)
        for epochs, published in ((4, 3.73), (16, 10.6), (40, 15.2))
    ]
    params, tokens = law.law.optimum(_GOPHER_FLOPS)
    return [
        *rows,
        row(name, "endless epochs of U tokens are worth, in U", law.effective_tokens(1e9, 1.0), 16.4, printed=False),
        row(name, f"N* at {_GOPHER_FLOPS:g} FLOPs", params, 69962173313.52),
        row(name, f"D* at {_GOPHER_FLOPS:g} FLOPs", tokens, 1372170066384.24),
    ]


def _inference_aware() -> list[dict[str, Any]]:
    rows, law = [], inference_aware.SARDANA
    examples = (
        (30e9, 1e13, {"params": 13.6e9, "token_factor": 2.84, "saved_share": 0.28}),
        (13e9, 2e12, {"params": 7e9, "saved_flops": 1.7e22, "saved_share": 0.17}),
    )
    for params, demand, published in examples:
        budget = inference_aware.cheapest(law, inference_aware.compute_optimal_loss(law, params), demand)
        share = inference_aware.saving(law, params, demand)
        ours = {
            "params": budget.params,
            "token_factor": budget.tokens / float(law.optimal_tokens(params)),
            "saved_flops": budget.cost * share / (1 - share),
            "saved_share": share,
        }
        about = f"{params / 1e9:g}B quality, {demand:g} tokens served"
        rows += [row("inference-aware (Sardana et al. 2024)", f"{about}: {key}", ours[key], published[key]) for key in published]
    return rows


def _distilled() -> list[dict[str, Any]]:
    rows, name = [], "distillation (Busbridge et al. 2025)"
    for params, tokens, supervised, teacher, student in _DISTILLED:
        about = f"N = {params:g}, D = {tokens:g}"
        best, loss = distillation.DISTILLED.best_teacher(params, tokens)
        rows += [
            row(name, f"{about}: supervised loss", distillation.SUPERVISED.loss(params, tokens), supervised, printed=False),
            row(name, f"{about}: loss of the best teacher", best, teacher, printed=False),
            row(name, f"{about}: student's loss with it", loss, student, printed=False),
        ]
    return rows
