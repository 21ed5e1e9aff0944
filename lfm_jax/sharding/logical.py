"""From logical axis names to mesh axes.

Parameters and activations name what their axes *are* ("embed", "heads", "batch"); the one table here says which mesh axes
split them. Code that computes never names a mesh axis, so a new parallelism is a change of this file alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxes = tuple[str | None, ...]

Rules = dict[str | None, tuple[str, ...]]

_BY_TENSOR: Rules = {name: ("tensor",) for name in ("vocab", "heads", "kv_heads", "mlp", "channels")}
# What every large array is split over. Feed-forward weights are along the first axis, where XLA scatters a gradient's sum; along
# the last it makes it whole on each device first (docs/log.md, 2026-11-27).
_ALL_LARGE = ("fsdp", "context", "expert")
PARAMETER_RULES: Rules = {**_BY_TENSOR, "expert": ("expert",), "mlp": ("tensor", *_ALL_LARGE), "embed": _ALL_LARGE}
ACTIVATION_RULES: Rules = {**_BY_TENSOR, "expert": ("expert",), "batch": ("data", "fsdp", "expert"), "seq": ("context",)}


def _split(axes: LogicalAxes, rules: Rules, mesh, shape: Sequence[int] | None) -> list[tuple[list[str], list[str]]]:
    """For each axis of an array, (the mesh axes that are to split it, those of them that do).

    They do as far as they divide its length. A mesh axis splits one axis of an array: the first that names it. Those of one
    device split nothing and are left out, as are those that an enclosing shard_map has split along already.
    """
    found: list[tuple[list[str], list[str]]] = []
    for index, name in enumerate(axes):
        used = {axis for _, chosen in found for axis in chosen}
        wanted = [axis for axis in rules.get(name, ()) if mesh.shape[axis] > 1 and axis not in {*used, *mesh.manual_axes}]
        chosen: list[str] = []
        for axis in wanted:
            parts = math.prod(mesh.shape[other] for other in (*chosen, axis))
            if shape is None or shape[index] % parts == 0:
                chosen.append(axis)
        found.append((wanted, chosen))
    return found


def split_axes(axes: LogicalAxes, rules: Rules, mesh, shape: Sequence[int] | None) -> list[list[str]]:
    """The mesh axes that split each axis of an array (see `_split`)."""
    return [chosen for _, chosen in _split(axes, rules, mesh, shape)]


def _spec(axes: LogicalAxes, rules: Rules, mesh, shape: Sequence[int] | None) -> PartitionSpec:
    entries = split_axes(axes, rules, mesh, shape)
    return PartitionSpec(*(tuple(chosen) if len(chosen) > 1 else next(iter(chosen), None) for chosen in entries))


def parameter_sharding(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter (or an optimizer moment of its shape)."""
    return NamedSharding(mesh, _spec(axes, PARAMETER_RULES, mesh, shape))


def state_sharding(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of what is kept of a parameter from step to step: the parameter itself in float32, and its moments.

    As the parameter's, and over its replicas too, each of which updates its own part (ZeRO-1, Rajbhandari et al. 2020): along the
    first axis that they divide, and one that nothing else splits if there is one.
    """
    entries = [tuple(chosen) for _, chosen in _split(axes, PARAMETER_RULES, mesh, shape)]
    replicas = mesh.shape["data"]
    parts = [replicas * math.prod(mesh.shape[axis] for axis in entry) for entry in entries]
    fitting = [index for index, length in enumerate(shape) if replicas > 1 and length % parts[index] == 0]
    if fitting:
        chosen = min(fitting, key=lambda index: len(entries[index]) > 0)
        entries[chosen] = ("data", *entries[chosen])
    return NamedSharding(mesh, PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries)))


def check_split(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int], array: str) -> None:
    """Refuses a mesh that leaves an axis of a parameter whole which it is meant to split: every device would hold all of it.

    Heads of keys may be fewer than the devices that share those of queries: these then get copies.

    Args:
      array: the parameter's name, for the message.
    Raises:
      ValueError: the mesh axes do not divide the length.
    """
    found = _split(axes, PARAMETER_RULES, mesh, shape)
    for index, (name, length, (wanted, chosen)) in enumerate(zip(axes, shape, found, strict=True)):
        # What a later axis has taken instead is no loss; but experts are computed by `expert`.
        elsewhere = {axis for _, others in found[index + 1 :] for axis in others if name != "expert"}
        wanted = [axis for axis in wanted if axis not in elsewhere]
        if wanted != chosen and name != "kv_heads":
            parts = math.prod(mesh.shape[axis] for axis in wanted)
            product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
            raise ValueError(
                f"{product} does not divide {name} = {length} of {array}; together they may be {math.gcd(length, parts)}, and "
                "data takes the devices that are left"
            )


def activation_sharding(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int] | None = None) -> NamedSharding:
    """The sharding of an activation or of a batch; shape None: of one whose every length divides."""
    return NamedSharding(mesh, _spec(axes, ACTIVATION_RULES, mesh, shape))


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Pins an activation to its sharding under the mesh of the enclosing `jax.set_mesh`; no mesh, no change."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, ACTIVATION_RULES, mesh, x.shape))


def target_platform() -> str:
    """What the program being traced is for: the platform of the enclosing mesh, which need not be there, or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_device() -> bool:
    """Whether the program being traced is for one device: the enclosing mesh has no more, or there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def shard_count(name: str, mesh: Mesh | None = None) -> int:
    """Over how many devices a mesh splits the logical axis `name` of activations.

    mesh: None is the enclosing one; without any the answer is 1.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ACTIVATION_RULES[name])


def gather_shards(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `map_shards`: the shards of the devices that share the logical axis `name`, one after the other along `axis`."""
    return jax.lax.all_gather(x, ACTIVATION_RULES[name], axis=axis, tiled=True)


def sum_shards(x: jax.Array, name: str) -> jax.Array:
    """Inside `map_shards`: the sum over the devices that share the logical axis `name`."""
    return jax.lax.psum(x, ACTIVATION_RULES[name])


def max_shards(x: jax.Array, name: str) -> jax.Array:
    """Inside `map_shards`: the largest over the devices that share the logical axis `name`, element by element."""
    return jax.lax.pmax(x, ACTIVATION_RULES[name])


def sum_and_scatter_shards(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `map_shards`: this device's part, along `axis`, of the sum over the devices that share the logical axis `name`."""
    return jax.lax.psum_scatter(x, ACTIVATION_RULES[name], scatter_dimension=axis, tiled=True)


def shard_index(name: str) -> jax.Array:
    """Inside `map_shards`: which part of the logical axis `name` this device has."""
    return jax.lax.axis_index(ACTIVATION_RULES[name])


class Pieces(NamedTuple):
    """Runs of rows that a device exchanges, [devices * pieces of each], in the order of the devices at the other end.

    here, there: the first row of each in this device's array and in the other's; sizes: rows.
    """

    here: jax.Array
    there: jax.Array
    sizes: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def exchange_rows(x: jax.Array, name: str, rows: int, outgoing: Pieces, incoming: Pieces) -> jax.Array:
    """Inside `map_shards`: sends pieces of x to the devices that share the logical axis `name`, and gets theirs.

    Args:
      x: [rows here, ...]; rows: of the result.
      outgoing: pieces of x, and where they go to in the results of the others. incoming: pieces of the result, and where they are
        in the others' x. Each must be what the other devices' arguments say.
    Returns:
      [rows, ...]; rows that nobody sent may be anything.
    """
    axis = ACTIVATION_RULES[name]

    def ragged(x: jax.Array, outgoing: Pieces, incoming: Pieces) -> jax.Array:
        empty = jax.lax.empty((rows, *x.shape[1:]), x.dtype)
        sent = outgoing.here, outgoing.sizes, outgoing.there
        return jax.lax.ragged_all_to_all(x, empty, *sent, incoming.sizes, axis_name=axis)

    def emulated(x: jax.Array, outgoing: Pieces, incoming: Pieces) -> jax.Array:
        """XLA has no ragged all-to-all for CPUs. What nobody sent is NaN, so that tests fail where it is read."""
        from_all = jax.lax.all_gather(x, axis, axis=0, tiled=True)
        pieces = incoming.sizes.size
        others = jnp.arange(pieces) // (pieces // (from_all.shape[0] // x.shape[0]))
        offset = jnp.arange(rows)[:, None] - incoming.here[None, :]
        inside = (offset >= 0) & (offset < incoming.sizes[None, :])
        source = jnp.sum(jnp.where(inside, offset + (others * x.shape[0] + incoming.there)[None, :], 0), axis=1)
        sent = jnp.any(inside, axis=1).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(sent, from_all[source], jnp.nan)

    return jax.lax.platform_dependent(x, outgoing, incoming, cpu=emulated, default=ragged)


def _exchange_forward(x: jax.Array, name: str, rows: int, outgoing: Pieces, incoming: Pieces):
    return exchange_rows(x, name, rows, outgoing, incoming), (outgoing, incoming, x.shape[0])


def _exchange_backward(name: str, rows: int, saved, gradient: jax.Array):
    outgoing, incoming, before = saved
    returned = exchange_rows(gradient, name, before, incoming, outgoing)
    return returned, None, None


exchange_rows.defvjp(_exchange_forward, _exchange_backward)


def map_shards(function: Callable, arguments: Sequence[jax.Array], in_axes: Sequence[LogicalAxes], out_axes):
    """Calls `function(*arguments)` on each device's shards, the axes split as for activations.

    XLA cannot partition a Mosaic kernel by itself, so kernels are called through here. Axes that the mesh does not divide stay
    whole, and each device then computes the same. Without a mesh (or with one device) it is a plain call.

    Args:
      in_axes: logical axes of each argument.
      out_axes: a pytree of logical axes that matches the output.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arguments)
    sizes: dict[str, int] = {}
    for argument, axes in zip(arguments, in_axes, strict=True):
        sizes |= {name: size for name, size in zip(axes, argument.shape, strict=True) if name is not None}

    def spec(axes: LogicalAxes) -> PartitionSpec:
        return _spec(axes, ACTIVATION_RULES, mesh, [sizes.get(name, 1) for name in axes])

    is_axes = lambda leaf: isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(spec(axes) for axes in in_axes),
        out_specs=jax.tree.map(spec, out_axes, is_leaf=is_axes),
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )
    return mapped(*arguments)
