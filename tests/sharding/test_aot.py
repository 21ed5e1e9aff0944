"""Compiling for TPUs on a host without one."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.sharding import MeshConfig, aot, make_mesh


def test_a_sharded_program_compiles_for_a_whole_pod():
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(fsdp=16, tensor=16), aot.tpu_devices("v5e:16x16"))
    rows = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    compiled = aot.compile_for(lambda x: x @ x.T, (rows,))
    assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()


def test_a_mesh_may_split_an_axis_of_the_torus():
    """Two of eight chips in a row share parameters; with 8 they would be a whole axis."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2), aot.tpu_devices("v5p:8x8x8"))
    coordinates = [[device.coords for device in pair] for pair in mesh.devices.reshape(256, 2)]
    assert all(sum(abs(one - other) for one, other in zip(*pair, strict=True)) == 1 for pair in coordinates)


def test_slices_hold_replicas():
    """The outer part of `data`; within a slice the mesh is that of one slice."""
    pytest.importorskip("libtpu")
    two, one = aot.tpu_devices("v5e:2x4", slices=2), aot.tpu_devices("v5e:2x4")
    mesh = make_mesh(MeshConfig(data=4, fsdp=-1, tensor=2), two)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    places = lambda grid: [device.coords for device in grid.flat]
    alone = places(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2), one).devices)
    assert places(mesh.devices[:2]) == places(mesh.devices[2:]) == alone
    rows = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    total = aot.compile_for(lambda x: jnp.sum(x, dtype=jnp.float32), (rows,)).as_text()
    assert "replica_groups={{0,2,4,6},{1,3,5,7}}" in total and "xla_megascale_runtime" in total  # within slices, then between


def test_slices_that_would_share_a_replica_are_refused():
    pytest.importorskip("libtpu")
    message = r"mesh fsdp=16 over 2 slices: each slice must have whole replicas of the model; make data a multiple of 2, like"
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(), aot.tpu_devices("v5e:2x4", slices=2))


def test_an_unknown_topology_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="no topology 'v5e:1x7x9'"):
        aot.tpu_devices("v5e:1x7x9")


def test_a_missing_variable_is_named(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    with pytest.raises(RuntimeError, match="TPU_SKIP_MDS_QUERY must be set before libtpu is loaded"):
        aot.tpu_devices("v5e:2x2")


def test_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs libtpu, which is not installed"):
        aot.tpu_devices("v5e:2x2")


def test_the_environment_of_the_tests_holds_what_is_asked_for():
    assert set(aot.ENVIRONMENT) <= set(os.environ)
