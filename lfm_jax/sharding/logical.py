"""From logical axis names to mesh axes.

Parameters and activations name what their axes *are* ("embed", "heads", "batch"); the one table here says which mesh axes
split them. Code that computes never names a mesh axis, so a new parallelism is a change of this file alone.
"""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxes = tuple[str | None, ...]

PARAMETER_RULES: dict[str, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "channels": "tensor",
}
ACTIVATION_RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "channels": "tensor",
}


def _spec(axes: LogicalAxes, rules, mesh, shape: Sequence[int] | None) -> PartitionSpec:
    """Axes the table does not name, and lengths that the mesh axis does not divide, stay whole."""
    entries = []
    for index, name in enumerate(axes):
        mesh_axes = rules.get(name)
        if mesh_axes is not None and shape is not None:
            names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
            if shape[index] % math.prod(mesh.shape[axis] for axis in names):
                mesh_axes = None
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def parameter_sharding(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a parameter (or an optimizer moment of its shape)."""
    return NamedSharding(mesh, _spec(axes, PARAMETER_RULES, mesh, shape))


def activation_sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """The sharding of an activation or of a batch."""
    return NamedSharding(mesh, _spec(axes, ACTIVATION_RULES, mesh, None))


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Pins an activation to its sharding under the mesh of the enclosing `jax.set_mesh`; no mesh, no change."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, ACTIVATION_RULES, mesh, x.shape))


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
        check_vma=False,
    )
    return mapped(*arguments)
