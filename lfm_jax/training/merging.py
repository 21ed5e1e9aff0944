"""One model of several: merging the parameters of checkpoints of one architecture.

- *linear* (Wortsman et al. 2022, arXiv 2203.05482, model soups): the weighted mean.
- *slerp* (Shoemake 1985): of two, along the great circle between them, tensor by tensor.
- *task arithmetic* (Ilharco et al. 2023, arXiv 2212.04089): what the models differ by from what they were trained from, added up.
- *TIES* (Yadav et al. 2023, arXiv 2306.01708): of each difference only the largest entries, of these at each place only those of
  the sign that outweighs the other, and of those the mean.

Trees are nested dicts of arrays, of the same shapes; arithmetic is in float32, and the result has the types of the base, or else
of the first. All are pure functions to be jitted; what is sharded stays so.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.models.functional import Tree

# Squared sine of the angle between two tensors below which they count as parallel: 0.06 degrees, where float32 still tells.
_PARALLEL = 1e-6
_WITH_BASE = ("ties", "task_arithmetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How models become one.

    weights: of the models; none: all are 1. Of linear, slerp and ties they are shares (1,3 is a quarter and three quarters), of
      task_arithmetic the factors of the differences, which may be negative.
    density: the share of each difference that ties keeps. scale: what ties and task_arithmetic multiply the merged difference by.
    """

    method: Literal["linear", "slerp", "ties", "task_arithmetic"] = "linear"
    weights: tuple[float, ...] = ()
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self):
        if self.method != "task_arithmetic" and self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"weights of {self.method} are shares: none negative and not all 0, got {self.weights}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")


def check_models(config: MergeConfig, count: int, with_base: bool) -> None:
    """Raises ValueError if the method or the weights are not for so many models, or a base is missing or unused."""
    if count < 1 or config.method == "slerp" and count != 2:
        raise ValueError(f"{config.method} merges {'two models' if config.method == 'slerp' else 'models'}, got {count}")
    if len(config.weights) not in (0, count):
        raise ValueError(f"there are {count} models and {len(config.weights)} weights; give one for each, or none")
    if with_base != (config.method in _WITH_BASE):
        wanted = "takes no base; leave it out" if with_base else "needs a base, which the models were trained from"
        raise ValueError(f"{config.method} {wanted}")


def merge(
    config: MergeConfig, params: Sequence[Tree], buffers: Sequence[Tree], base: Tree | None = None
) -> tuple[Tree, Tree]:
    """(parameters, buffers) of the models merged.

    Buffers (the experts' biases) are no directions in which anything was trained: they are averaged, by the shares where there
    are such.

    Args:
      params, buffers: of each model.
      base: parameters of what the models were trained from, for ties and task_arithmetic.

    Raises:
      ValueError: as of `check_models`.
    """
    count = len(params)
    check_models(config, count, base is not None)
    weights = config.weights or (1.0,) * count
    averaged = linear(buffers, (1.0,) * count if config.method == "task_arithmetic" else weights)
    if config.method == "linear":
        return linear(params, weights), averaged
    if config.method == "slerp":
        return slerp(*params, weights[1] / sum(weights)), averaged
    if config.method == "ties":
        return ties(base, params, weights, config.density, config.scale), averaged
    return task_arithmetic(base, params, [config.scale * weight for weight in weights]), averaged


def linear(trees: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """The mean of trees by weights, which need not sum to 1."""
    total = sum(weights)

    def mean(*leaves: jax.Array) -> jax.Array:
        parts = [weight / total * _wide(leaf) for weight, leaf in zip(weights, leaves, strict=True)]
        return sum(parts).astype(leaves[0].dtype)

    return jax.tree.map(mean, *trees)


def slerp(first: Tree, second: Tree, share: float) -> Tree:
    """Each tensor on the way from `first` to `second` that turns evenly, `share` of it; linearly, where there is no such way.

    (sin((1 - s) a) first + sin(s a) second) / sin(a), where a is the angle between the two as vectors. Lengths are not made equal
    before. Linear where a tensor is 0, or the two are parallel or opposite within 0.06 degrees; mergekit has 1.8 degrees.
    """

    def turn(one: jax.Array, two: jax.Array) -> jax.Array:
        wide, other = _wide(one), _wide(two)
        lengths = jnp.sqrt(jnp.sum(wide * wide)) * jnp.sqrt(jnp.sum(other * other))
        cosine = jnp.sum(wide * other) / jnp.where(lengths > 0, lengths, 1.0)
        straight = (lengths == 0) | (1 - cosine * cosine < _PARALLEL)
        angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
        sine = jnp.sin(angle)
        of_one = jnp.where(straight, 1 - share, jnp.sin((1 - share) * angle) / sine)
        of_two = jnp.where(straight, share, jnp.sin(share * angle) / sine)
        return (of_one * wide + of_two * other).astype(one.dtype)

    return jax.tree.map(turn, first, second)


def task_arithmetic(base: Tree, trees: Sequence[Tree], scales: Sequence[float]) -> Tree:
    """base + the sum of scale * (tree - base)."""

    def add(start: jax.Array, *leaves: jax.Array) -> jax.Array:
        wide = _wide(start)
        parts = [scale * (_wide(leaf) - wide) for scale, leaf in zip(scales, leaves, strict=True)]
        return (wide + sum(parts)).astype(start.dtype)

    return jax.tree.map(add, base, *trees)


def ties(base: Tree, trees: Sequence[Tree], weights: Sequence[float], density: float, scale: float) -> Tree:
    """base + scale * the disjoint mean of the trimmed differences from it (Yadav et al. 2023, algorithm 1).

    Trim: of each tree's difference the `density` largest entries stay, over the whole tree as in the paper (mergekit: of each
    tensor), and those as large as the smallest of them. Elect: the sign of their weighted sum at each place, none where it is 0.
    Mean: by the weights, of those that have that sign.
    """
    differences = [jax.tree.map(lambda leaf, start: _wide(leaf) - _wide(start), tree, base) for tree in trees]
    smallest = [_smallest_kept(difference, density) for difference in differences]

    def join(start: jax.Array, *parts: jax.Array) -> jax.Array:
        kept = [jnp.where(jnp.abs(part) >= least, part, 0.0) for part, least in zip(parts, smallest, strict=True)]
        sign = jnp.sign(sum(weight * part for weight, part in zip(weights, kept, strict=True)))
        agreeing = [jnp.where(part * sign > 0, weight, 0.0) for weight, part in zip(weights, kept, strict=True)]
        total = sum(agreeing)
        mean = sum(weight * part for weight, part in zip(agreeing, kept, strict=True)) / jnp.where(total > 0, total, 1.0)
        return (_wide(start) + scale * mean).astype(start.dtype)

    return jax.tree.map(join, base, *differences)


def _wide(leaf: jax.Array) -> jax.Array:
    return jnp.asarray(leaf, jnp.float32)


@functools.partial(jax.jit, static_argnames="density")
def _smallest_kept(tree: Tree, density: float) -> jax.Array:
    """The magnitude of the smallest of the `density` largest entries of a tree, float32.

    By halving: the bits of numbers that are not negative, read as integers, are in the order of the numbers. Nothing is sorted or
    gathered, and 31 sums over a sharded tree are cheap.
    """
    leaves = [lax.bitcast_convert_type(jnp.abs(leaf), jnp.int32) for leaf in jax.tree.leaves(tree)]
    keep = max(1, round(density * sum(leaf.size for leaf in leaves)))

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # as many as wanted are at least as large as low, fewer as high
        middle = low + (high - low) // 2
        counts = jnp.stack([jnp.sum(leaf >= middle, dtype=jnp.int32) for leaf in leaves])
        enough = _reach(counts, keep)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, 31, halve, (jnp.int32(0), jnp.int32(2**31 - 1)))
    return lax.bitcast_convert_type(low, jnp.float32)


def _reach(counts: jax.Array, wanted: int) -> jax.Array:
    """Whether counts, [n] int32, sum to so many or more; the sum, of a large model, is no int32."""
    high, low = jnp.sum(counts >> 16), jnp.sum(counts & 0xFFFF)
    high, low = high + (low >> 16), low & 0xFFFF
    return (high > wanted >> 16) | (high == wanted >> 16) & (low >= wanted & 0xFFFF)
