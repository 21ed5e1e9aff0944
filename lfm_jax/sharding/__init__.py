"""Meshes, the one table from logical axes to mesh axes, and sequences that are split over devices."""

from lfm_jax.sharding.context import CHUNKS, dealt_order, ends_before, in_sequence
from lfm_jax.sharding.dealing import map_dealt
from lfm_jax.sharding.logical import (
    LogicalAxes,
    Pieces,
    activation_sharding,
    check_split,
    constrain,
    exchange_rows,
    gather_shards,
    map_shards,
    max_shards,
    on_one_device,
    parameter_sharding,
    shard_count,
    shard_index,
    state_sharding,
    sum_and_scatter_shards,
    sum_shards,
    target_platform,
)
from lfm_jax.sharding.mesh import AXES, MeshConfig, make_mesh, mesh_sizes

__all__ = [
    "AXES", "CHUNKS", "LogicalAxes", "MeshConfig", "Pieces", "activation_sharding", "check_split",
    "constrain", "dealt_order", "ends_before", "exchange_rows", "gather_shards", "in_sequence", "make_mesh",
    "map_dealt", "map_shards", "max_shards", "mesh_sizes", "on_one_device", "parameter_sharding",
    "shard_count", "shard_index", "state_sharding", "sum_and_scatter_shards", "sum_shards", "target_platform",
]
