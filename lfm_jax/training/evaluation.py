"""The loss over a whole split."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lfm_jax.models.functional import Tree
from lfm_jax.training.objective import Batch, Sums
from lfm_jax.training.step import place_batch


class Totals(NamedTuple):
    """nll: sum of -log p(target) over the targets, in nats; targets: how many they are."""

    nll: float
    targets: float

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.targets


def evaluate_loss(
    eval_step: Callable[[Tree, Tree, Batch], Sums],
    params: Tree,
    buffers: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> Totals:
    """Sums the loss over `batches`, in float64 between them.

    Args:
      eval_step: of `make_eval_step` with a next-token objective.
      batches: this host's rows; every host has as many.
    Raises:
      ValueError: no target in any of them.
    """
    nll = targets = 0.0
    for batch in batches:
        sums = jax.device_get(eval_step(params, buffers, place_batch(batch, mesh)))
        nll += float(sums.metrics["nll"])
        targets += float(sums.weight)
    if targets == 0:
        raise ValueError("the split has no target to predict: is it empty?")
    return Totals(nll, targets)
