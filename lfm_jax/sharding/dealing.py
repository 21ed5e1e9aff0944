"""Arrays whose slices are split over devices, dealt so that each device has some slices whole."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lfm_jax.sharding.logical import PARAMETER_RULES, LogicalAxes, split_axes


def map_dealt(function: Callable[[jax.Array], jax.Array], x: jax.Array, axes: LogicalAxes, whole: Sequence[int]) -> jax.Array:
    """`function(x)` under the mesh of the enclosing `jax.set_mesh`, the leading axis dealt to the devices. No mesh: a plain call.

    The mesh axes that split `x` move to its leading axis one array axis at a time, which XLA makes an all-to-all each; in one
    move it would gather the whole array on every device. They move back in the same way.

    Args:
      function: acts on each slice along the leading axis for itself, keeps the shape, and gives zeros for zeros, which fill up
        what does not divide over the devices.
      axes: the logical axes of x, split like a parameter's; the first is None.
      whole: array axes that the function needs whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(x)
    split = [tuple(names) for names in split_axes(axes, PARAMETER_RULES, mesh, x.shape)]
    stations = [tuple(split)]
    for axis in reversed(whole):
        split[0], split[axis] = split[0] + split[axis], ()
        stations.append(tuple(split))
    split[0] += tuple(name for name in mesh.axis_names if not any(name in names for names in split))
    stations.append(tuple(split))
    missing = -len(x) % math.prod(mesh.shape[name] for name in split[0])
    dealt = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    for station in stations:
        dealt = jax.lax.with_sharding_constraint(dealt, PartitionSpec(*station))
    dealt = function(dealt)
    for station in reversed(stations):
        dealt = jax.lax.with_sharding_constraint(dealt, PartitionSpec(*station))
    return dealt[: len(x)]
