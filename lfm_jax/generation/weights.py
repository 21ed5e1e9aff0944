"""Matrices in eight bits: a quarter of float32's bytes to read for each token, half of bfloat16's."""

import jax
import jax.numpy as jnp

from lfm_jax.models import FunctionalModel, QuantizedWeight
from lfm_jax.models.functional import Tree
from lfm_jax.models.rounding import summed_axes


def quantize_weights(functions: FunctionalModel, params: Tree) -> Tree:
    """Rounds every matrix to int8 with one scale for each of its outputs; norms, taps, biases and routers stay as they are.

    The largest absolute value of an output becomes 127 (Jacob et al. 2018, symmetric).

    Raises:
      ValueError: the model rounds them for a file already (`ComputeConfig.file_format`).
    """
    if jax.tree.leaves(functions.roundings):
        raise ValueError("compute.file_format rounds the matrices already; leave it out, or take weights=float")

    def quantize(leaf: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype, path: str) -> jax.Array | QuantizedWeight:
        summed = summed_axes(axes)
        if summed is None or "router" in path:
            return leaf.astype(dtype)
        wide = leaf.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=summed, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
        return QuantizedWeight(jnp.round(wide / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes, dtype: quantize(leaf, axes, dtype, jax.tree_util.keystr(path)),
        params, functions.param_axes, functions.compute_dtypes, is_leaf=lambda node: isinstance(node, jax.Array),
    )  # fmt: skip
