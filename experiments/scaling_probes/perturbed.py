"""A model's parameters rounded, or moved by noise: what is done to them, without any training."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.models.rounding import summed_axes
from lfm_jax.training.state import Purpose, random_key


def to_bits(functions: FunctionalModel, params: Tree, bits: int) -> Tree:
    """The blocks' matrices rounded to the nearest of 2^bits - 1 steps around 0, with a scale for each output.

    The table of the vocabulary stays as it is, as in Kumar et al. 2024, who round the linear layers, and count N without it.
    """
    most = 2 ** (bits - 1) - 1

    def rounded(weight: np.ndarray, axes: tuple[str | None, ...]) -> np.ndarray:
        summed = summed_axes(axes)
        if summed is None or "vocab" in axes:
            return weight
        scale = np.abs(weight).max(axis=summed, keepdims=True) / most
        return np.round(weight / np.where(scale == 0, 1, scale)) * scale

    return _changed(rounded, params, functions.param_axes)


def initial_deviations(functions: FunctionalModel, seed: int) -> Tree:
    """Standard deviation of each array of new parameters, floats; 0 of what begins as a constant: the norms' scales."""
    params, _ = jax.jit(functions.init)(random_key(seed, Purpose.INIT))
    return jax.tree.map(lambda leaf: float(np.std(np.asarray(leaf, np.float64))), params)


def with_noise(params: Tree, deviations: Tree, strength: float, seed: int) -> Tree:
    """theta + g eps, eps ~ N(0, Sigma), Sigma the covariance of the initialisation (Springer et al. 2025, arXiv 2503.19206).

    Args:
      strength: g. seed: of eps, which is the same for all models of a shape and for all g.
    """
    draws = np.random.default_rng(seed)
    return _changed(lambda leaf, deviation: leaf + strength * deviation * draws.standard_normal(leaf.shape), params, deviations)


def _changed(change: Callable[..., np.ndarray], params: Tree, about: Any) -> Tree:
    """`change` of each array in float64, in its own type and where it was."""

    def changed(leaf: jax.Array, about: Any) -> jax.Array:
        found = change(np.asarray(leaf, np.float64), about)
        return jax.device_put(found.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(changed, params, about)
