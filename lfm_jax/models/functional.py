"""An NNX module as pure functions: a static graph definition beside plain pytrees of arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lfm_jax.models.rounding import rounded

Tree = Any  # nested dicts of arrays; the path of a leaf is the path of the module's attribute


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionalModel:
    """What jitted code needs of a module, without its parameters; hashable by identity, so that jit takes it as static.

    The module is built once, abstractly: no array is allocated until `init` runs, so a jitted `init` with `out_shardings`
    never holds a parameter unsharded.

    Attributes:
      graphdef: the static structure.
      abstract_params: trainable arrays (`nnx.Param`) as `jax.ShapeDtypeStruct`, nested by module path.
      abstract_buffers: the arrays that carry no gradient (e.g. a router's expert bias).
      param_axes, buffer_axes: the logical axis names of every leaf, read from its `axes` metadata.
      compute_dtypes: the type in which each parameter is computed with, from its `compute_dtype`; its own where it has none.
      roundings: how each is rounded before that, from its `rounding`; None where it is not.
      init: key -> (params, buffers).
    """

    graphdef: nnx.GraphDef
    abstract_params: Tree
    abstract_buffers: Tree
    param_axes: Tree
    buffer_axes: Tree
    compute_dtypes: Tree
    roundings: Tree
    init: Callable[[jax.Array], tuple[Tree, Tree]]

    def bind(self, params: Tree, buffers: Tree) -> nnx.Module:
        """The module over these arrays. Costs a walk over the structure: call it inside jit, where that happens once."""
        return nnx.merge(self.graphdef, nnx.State(params), nnx.State(buffers))

    def cast(self, params: Tree) -> Tree:
        """The parameters as they are computed with: rounded, where that is asked for, and in types that make what moves between
        devices no wider than need be."""
        enter = lambda leaf, dtype, rounding: (leaf if rounding is None else rounded(leaf, rounding)).astype(dtype)
        return jax.tree.map(enter, params, self.compute_dtypes, self.roundings)


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> FunctionalModel:
    """Splits the module that `make(rngs)` builds into its static structure and pure functions."""
    graphdef, params, buffers = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)

    def init(key: jax.Array) -> tuple[Tree, Tree]:
        _, params, buffers = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)

    def of_each(state: nnx.State, read: Callable[[nnx.Variable], Any]) -> Tree:
        return nnx.to_pure_dict(jax.tree.map(read, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))

    axes = lambda variable: variable.axes

    return FunctionalModel(
        graphdef=graphdef,
        abstract_params=nnx.to_pure_dict(params),
        abstract_buffers=nnx.to_pure_dict(buffers),
        param_axes=of_each(params, axes),
        buffer_axes=of_each(buffers, axes),
        compute_dtypes=of_each(params, lambda variable: variable.get_metadata().get("compute_dtype", variable.dtype)),
        roundings=of_each(params, lambda variable: variable.get_metadata().get("rounding")),
        init=init,
    )
