"""Matrices in eight bits: a quarter of float32's bytes to read for each token, half of bfloat16's."""

import jax
import jax.numpy as jnp

from lfm_jax.models import FunctionalModel, QuantizedWeight
from lfm_jax.models.functional import Tree


def _summed_axes(axes: tuple[str | None, ...]) -> tuple[int, ...] | None:
    """Which axes of a matrix with these logical axes a product sums over; None: it is no matrix that reading costs time for.

    Projections out of the residual stream begin with "embed" and those into it end with it, behind an axis of experts or not; the
    table of the vocabulary has a row for each token.
    """
    first = int(axes[0] == "expert")
    if len(axes) - first < 2:
        return None
    if axes[first] == "vocab":
        return (first + 1,)
    if axes[first] == "embed":
        return (first,)
    return tuple(range(first, len(axes) - 1)) if axes[-1] == "embed" else None


def quantize_weights(functions: FunctionalModel, params: Tree) -> Tree:
    """Rounds every matrix to int8 with one scale for each of its outputs; norms, taps, biases and routers stay as they are.

    The largest absolute value of an output becomes 127 (Jacob et al. 2018, symmetric).
    """

    def quantize(leaf: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype, path: str) -> jax.Array | QuantizedWeight:
        summed = _summed_axes(axes)
        if summed is None or "router" in path:
            return leaf.astype(dtype)
        wide = leaf.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=summed, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
        return QuantizedWeight(jnp.round(wide / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes, dtype: quantize(leaf, axes, dtype, jax.tree_util.keystr(path)),
        params, functions.param_axes, functions.compute_dtypes, is_leaf=lambda node: isinstance(node, jax.Array),
    )  # fmt: skip
