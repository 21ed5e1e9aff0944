"""What a training run carries from step to step: first as shapes, then as shardings, then as arrays born sharded."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import check_split, parameter_sharding, state_sharding


class TrainState(NamedTuple):
    """step: updates done, int32 scalar; params, buffers: of the model; opt_state: of the optimizer."""

    step: jax.Array
    params: Tree
    buffers: Tree
    opt_state: Any


class Purpose(enum.IntEnum):
    """What random numbers are for. Keys of different purposes never meet, whatever the step."""

    INIT = 0
    STEP = 1
    EVALUATION = 2


def random_key(seed: int, purpose: Purpose) -> jax.Array:
    """The key of a run's random numbers for one purpose; a step folds its number in, so nothing depends on earlier draws."""
    return jax.random.fold_in(jax.random.key(seed), int(purpose))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract_state(functions: FunctionalModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the whole state as `jax.ShapeDtypeStruct`; nothing is allocated.

    The optimizer's arrays of a parameter (its moments) are split like the parameter (see `state_sharding`), its scalars are on
    each device. Buffers are split like what is computed with: each replica has all of them.
    """
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # where a part of the optimizer leaves a parameter to another

    def place(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=state_sharding(mesh, axes, leaf.shape))

    def like(leaf, parameter):
        return leaf if masked(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter.sharding)

    def place_buffer(leaf, axes):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parameter_sharding(mesh, axes, leaf.shape))

    whole = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))
    params = jax.tree.map(place, functions.abstract_params, functions.param_axes)
    opt_state = optax.tree.map_params(
        optimizer,
        like,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=whole,
        is_leaf=masked,
    )
    return TrainState(
        step=whole(jax.ShapeDtypeStruct((), jnp.int32)),
        params=params,
        buffers=jax.tree.map(place_buffer, functions.abstract_buffers, functions.buffer_axes),
        opt_state=opt_state,
    )


def check_mesh(functions: FunctionalModel, mesh: Mesh) -> None:
    """Raises ValueError if the mesh leaves a parameter whole that it is meant to split (see `check_split`)."""
    axes = jax.tree.leaves(functions.param_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(functions.abstract_params)
    for (path, leaf), names in zip(leaves, axes, strict=True):
        check_split(mesh, names, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="."))


def parameter_shardings(functions: FunctionalModel, mesh: Mesh) -> Tree:
    """The sharding of every parameter as the model computes with it: each replica has all of it."""
    place = lambda leaf, axes: parameter_sharding(mesh, axes, leaf.shape)
    return jax.tree.map(place, functions.abstract_params, functions.param_axes)


def state_shardings(functions: FunctionalModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(functions, optimizer, mesh))


def init_state(functions: FunctionalModel, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step. Each device makes its own part: no array ever exists unsharded.

    The values do not depend on the mesh.
    """

    def init(key: jax.Array) -> TrainState:
        params, buffers = functions.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params))

    return jax.jit(init, out_shardings=state_shardings(functions, optimizer, mesh))(random_key(seed, Purpose.INIT))
