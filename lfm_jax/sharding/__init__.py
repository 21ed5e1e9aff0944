"""Meshes and the one table from logical axes to mesh axes."""

from lfm_jax.sharding.logical import LogicalAxes, activation_sharding, constrain, map_shards, parameter_sharding
from lfm_jax.sharding.mesh import AXES, MeshConfig, make_mesh

__all__ = [
    "AXES", "LogicalAxes", "MeshConfig", "activation_sharding", "constrain", "make_mesh", "map_shards", "parameter_sharding",
]
