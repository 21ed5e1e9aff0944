"""Muon: the momentum of each matrix, orthogonalised (Jordan et al. 2024; Moonlight, Liu et al. 2025, arXiv 2502.16982).

Not optax.contrib.muon, which leaves products of matrices that are split over devices to XLA's partitioner. The iteration
below, left to it in that way over 16 chips, gathers them in 79 collectives and takes twenty times the cycles of whole
matrices dealt to the chips (docs/benchmarks/optimizers.md).
"""

import collections
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfm_jax.models.functional import Tree
from lfm_jax.sharding import map_dealt, shard_count

# What the axes of a block's parameters are: the residual stream's side of a matrix (e) and the other side (o), which may be
# several axes (heads and their dimension); parts (p) and experts (x) number matrices that are orthogonalised each for itself.
LAYOUTS = {
    ("in_proj", 3): "epo",
    ("out_proj", 2): "oe",
    ("q_proj", 3): "eoo",
    ("k_proj", 3): "eoo",
    ("v_proj", 3): "eoo",
    ("out_proj", 3): "ooe",
    ("gate_proj", 2): "eo",
    ("gate", 2): "eo",
    ("up", 2): "eo",
    ("down", 2): "oe",
    ("gate", 3): "xeo",
    ("up", 3): "xeo",
    ("down", 3): "xoe",
}
_NO_MATRICES = ("router", "kernel", "scale")  # in blocks: the router by custom, taps, norms; and biases, by their ending
# The quintic whose slope at 0 is steepest for what five steps of it leave of singular values: 0.7 to 1.2 (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def is_matrix(path: tuple) -> bool:
    """Whether the parameter at this path is one of the blocks' matrices, by its name."""
    name = path[-1].key
    return path[0].key == "layers" and name not in _NO_MATRICES and not name.endswith("bias")


def newton_schulz(matrices: jax.Array) -> jax.Array:
    """Nearly U V^T of each matrix U S V^T: its singular vectors with singular values between 0.7 and 1.2.

    `STEPS` times X <- a X + (b A + c A^2) X with A = X X^T, from X of Frobenius norm 1, on the shorter side. A matrix of zeros
    stays one.

    Args:
      matrices: [..., rows, columns].
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


def orthogonalize() -> optax.GradientTransformation:
    """Replaces each matrix by its orthogonalisation times 0.2 sqrt(max(rows, columns)).

    With that factor the root mean square of an update is 0.2 whatever the shape, about that of AdamW's, so that AdamW's learning
    rate and weight decay carry over (Liu et al. 2025, section 2.2).

    Over several devices each orthogonalises whole matrices, its share of those of one shape: the parts of a matrix travel to
    one device and back, once a step, where a product of split matrices would gather them in each of its 15 products.

    Raises:
      ValueError: a parameter's axes are not in `LAYOUTS`.
    """

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        layouts = [_layout(path, leaf) for path, leaf in leaves]
        stacks = [_as_matrices(leaf, layout) for (_, leaf), layout in zip(leaves, layouts, strict=True)]
        alike = collections.defaultdict(list)
        for index, stack in enumerate(stacks):
            alike[stack.shape[1:]].append(index)
        for (*_, rows, columns), members in alike.items():
            dealt = _dealt(jnp.concatenate([stacks[index] for index in members]))
            ends = list(itertools.accumulate(len(stacks[index]) for index in members))
            for index, stack in zip(members, jnp.split(0.2 * max(rows, columns) ** 0.5 * dealt, ends[:-1]), strict=True):
                stacks[index] = stack
        new = [_as_parameter(*each) for each in zip(stacks, (leaf for _, leaf in leaves), layouts, strict=True)]
        return jax.tree.unflatten(tree, new), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _layout(path: tuple, leaf: jax.Array) -> str:
    layout = LAYOUTS.get((path[-1].key, leaf.ndim))
    if layout is None:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise ValueError(
            f"{name} of shape {leaf.shape}: nothing says which matrices it holds; add its name to LAYOUTS in {__name__}, or "
            "to the parameters there that are none"
        )
    return layout


def _order(layout: str) -> list[int]:
    """The axes as parts, experts, the residual stream's side, the other side."""
    return sorted(range(len(layout)), key=lambda axis: "pxeo".index(layout[axis]))


def _as_matrices(leaf: jax.Array, layout: str) -> jax.Array:
    """[parts, experts, embed, other]; what there is none of is 1."""
    sizes = [math.prod(size for size, kind in zip(leaf.shape, layout, strict=True) if kind == wanted) for wanted in "pxeo"]
    return leaf.transpose(_order(layout)).reshape(sizes)


def _as_parameter(matrices: jax.Array, leaf: jax.Array, layout: str) -> jax.Array:
    order = _order(layout)
    return matrices.reshape([leaf.shape[axis] for axis in order]).transpose(np.argsort(order))


def _dealt(matrices: jax.Array) -> jax.Array:
    """Orthogonalises [n, experts, embed, other]."""
    # Experts that are split over devices stay where they are; others are dealt like any matrices.
    stack = matrices if shard_count("expert") > 1 else matrices.reshape(-1, 1, *matrices.shape[2:])
    return map_dealt(newton_schulz, stack, (None, "expert", "embed", "mlp"), whole=(2, 3)).reshape(matrices.shape)
