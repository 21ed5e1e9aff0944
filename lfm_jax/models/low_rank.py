"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685): of a matrix that stands still, a product of two thin ones moves.

W' = W + s A B, with s = alpha / rank (section 4.1), or alpha / sqrt(rank) (rsLoRA; Kalajdzievski 2023, arXiv 2312.03732). A
`LowRankModel` has A and B as its only parameters, and W among its buffers: gradient, moments and what replicas sum up are A's and
B's alone, whatever trains it need not know, and its checkpoints are complete.

The sum is taken in float32 once a micro-batch, and then cast (and rounded, where the model is) like any parameter: the model that
trains is the one that is exported, to the bits that the type of the computation has. The other way, x W + s (x A) B, would have
no need for the gradient of W', a third of a training step's products, nor for W' beside W; but what enters the modules would be
no matrix then, neither to kernels nor to experts, and in bfloat16 it is a model that no export is. So this saves memory, not
time: for each weight 8 bytes of moments and 4 of gradient. What it costs is 6 rank FLOPs a weight and micro-batch, in float32 on
accelerators too, beside the 6 a weight and token of training.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.configuration import nearest
from lfm_jax.models.functional import FunctionalModel, Tree
from lfm_jax.models.rounding import summed_axes

# The linear projections of the operators, of feed-forward layers and of experts.
TARGETS = ("in_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "out_proj", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """What is adapted, and how.

    rank: columns of A and rows of B. alpha: the factor of A B, over `alpha_over`: the rank, or its root, with which larger ranks
      do not learn more slowly.
    targets: names of the matrices that are adapted, in all layers that have them; `TARGETS` has them all. Those of experts have
      an A and a B for each expert. Embeddings, the logits' matrix, norms, routers and taps of convolutions stand still.
    """

    rank: int = 16
    alpha: float = 32.0
    alpha_over: Literal["rank", "sqrt_rank"] = "rank"
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError(f"targets is empty; name matrices to adapt, of {', '.join(TARGETS)}")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"targets: no matrix {name!r} can be adapted. {nearest(name, TARGETS)}")

    @property
    def scale(self) -> float:
        """Of A B."""
        return self.alpha / (self.rank if self.alpha_over == "rank" else self.rank**0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankModel(FunctionalModel):
    """A model whose parameters are the adapters of another's matrices.

    params: in the place of each matrix that is adapted {"a": A, "b": B}, float32, [*inputs, rank] and [rank, *outputs]; those of
    experts behind an axis of experts. Nothing in the place of others. buffers: {"frozen": the other model's parameters,
    "buffers": its buffers}.

    Attributes:
      base: the other model. low_rank: how its matrices are adapted. adapters: key -> new ones.
    """

    base: FunctionalModel
    low_rank: LowRankConfig
    adapters: Callable[[jax.Array], Tree]

    def bind(self, params: Tree, buffers: Tree) -> nnx.Module:
        """The other model's module, its matrices with the adapters in them."""
        return self.base.bind(self.base.cast(self.merged(params, buffers["frozen"])), buffers["buffers"])

    def merged(self, params: Tree, frozen: Tree) -> Tree:
        """The other model's parameters with the adapters in them, in their own types; what is not adapted as it is."""

        def walk(frozen: Tree, axes: Tree, adapters: Tree) -> Tree:
            if not isinstance(frozen, dict):
                return frozen + self.low_rank.scale * _product(adapters, axes)
            return {key: walk(leaf, axes[key], adapters[key]) if key in adapters else leaf for key, leaf in frozen.items()}

        return walk(frozen, self.base.param_axes, params)


class _Pair(NamedTuple):
    """The A and B of one matrix. number: of the matrix among the model's parameters; inputs: that A sums over."""

    number: int
    inputs: int
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[str | None, ...]]


def adapt(functions: FunctionalModel, config: LowRankConfig) -> LowRankModel:
    """The model with adapters for its matrices.

    They begin as in Hu et al.'s code (loralib/layers.py), A uniform within 1 / sqrt(inputs) and B zero, so that the model begins
    as it was. An A depends on the key and on the matrix, not on what else is adapted.

    Raises:
      ValueError: the model has no matrix of one of the targets' names, where these are not simply all.
    """
    pairs = _pairs(functions, config)
    missing = sorted({*config.targets} - {path[-1] for path in pairs})
    if missing and config.targets != TARGETS:
        there = sorted({path[-1] for path in _pairs(functions, LowRankConfig())})
        raise ValueError(f"targets: the model has no matrix {missing[0]!r}; it has {', '.join(there)}")
    of_each = lambda value: _nested({path: {name: value(pair, name) for name in ("a", "b")} for path, pair in pairs.items()})

    def adapters(key: jax.Array) -> Tree:
        def begin(pair: _Pair, name: str) -> jax.Array:
            if name == "b":
                return jnp.zeros(pair.shapes[name])
            # Between -1 and 1 nothing is rounded, so that the bits are the same however this is compiled, and on every mesh.
            unit = jax.random.uniform(jax.random.fold_in(key, pair.number), pair.shapes[name], minval=-1.0, maxval=1.0)
            return pair.inputs**-0.5 * unit

        return of_each(begin)

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        of_base, of_adapters = jax.random.split(key)
        frozen, buffers = functions.init(of_base)
        return adapters(of_adapters), {"frozen": frozen, "buffers": buffers}

    return LowRankModel(
        graphdef=functions.graphdef,
        abstract_params=of_each(lambda pair, name: jax.ShapeDtypeStruct(pair.shapes[name], jnp.float32)),
        abstract_buffers={"frozen": functions.abstract_params, "buffers": functions.abstract_buffers},
        param_axes=of_each(lambda pair, name: pair.axes[name]),
        buffer_axes={"frozen": functions.param_axes, "buffers": functions.buffer_axes},
        compute_dtypes=of_each(lambda pair, name: jnp.dtype(jnp.float32)),
        roundings=of_each(lambda pair, name: None),
        init=init,
        base=functions,
        low_rank=config,
        adapters=adapters,
    )


def _pairs(functions: FunctionalModel, config: LowRankConfig) -> dict[tuple, _Pair]:
    """By the path of each matrix that is adapted."""
    leaves = jax.tree_util.tree_leaves_with_path(functions.abstract_params)
    axes = jax.tree.leaves(functions.param_axes, is_leaf=lambda node: isinstance(node, tuple))
    found = {}
    for number, ((keys, leaf), names) in enumerate(zip(leaves, axes, strict=True)):
        path = tuple(key.key for key in keys)
        if path[-1] in config.targets:
            summed = summed_axes(names)
            first, end = summed[0], summed[-1] + 1
            found[path] = _Pair(
                number=number,
                inputs=math.prod(leaf.shape[first:end]),
                shapes={"a": (*leaf.shape[:end], config.rank), "b": (*leaf.shape[:first], config.rank, *leaf.shape[end:])},
                axes={"a": (*names[:end], None), "b": (*names[:first], None, *names[end:])},
            )
    return found


def _product(pair: dict[str, jax.Array], axes: tuple[str | None, ...]) -> jax.Array:
    """A B, of the matrix's shape; expert by expert, where there are such."""
    experts = tuple(range(axes.count("expert")))
    summed = ((pair["a"].ndim - 1,), (len(experts),))
    return jax.lax.dot_general(pair["a"], pair["b"], (summed, (experts, experts)), precision="highest")


def _nested(flat: dict[tuple, Any]) -> Tree:
    """The tree whose leaves, or branches, are at these paths."""
    tree: Tree = {}
    for path, leaf in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree
