"""Sizes of meshes, and those that there cannot be. Where devices come to lie on a slice is in test_aot.py."""

import pytest

from lfm_jax.sharding import AXES, MeshConfig, make_mesh, mesh_sizes


def test_one_axis_takes_what_the_others_leave():
    assert dict(zip(AXES, mesh_sizes(MeshConfig(data=2, tensor=2), 8), strict=True)) == {
        "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2,
    }  # fmt: skip
    assert mesh_sizes(MeshConfig(data=-1, fsdp=4), 32, slices=4) == [8, 4, 1, 1, 1]
    assert make_mesh(MeshConfig(context=4)).shape["fsdp"] == 2


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_sizes_without_sense_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh sizes must be positive, with at most one -1; got {'data'"):
        MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("config", "devices", "slices", "message"),
    [
        (MeshConfig(fsdp=3), 8, 1, "mesh fsdp=3 needs 3 devices, 8 are there; set one axis to -1 and let the others divide 8"),
        (MeshConfig(data=16), 8, 1, "mesh data=16 needs 16 devices, 8 are there"),
        (MeshConfig(data=2), 12, 3, "mesh data=2 x fsdp=6 over 3 slices: .*; make data a multiple of 3, like .*data=3"),
        (MeshConfig(), 512, 2, "mesh fsdp=512 over 2 slices"),
    ],
)
def test_meshes_that_cannot_be_are_refused(config, devices, slices, message):
    with pytest.raises(ValueError, match=message):
        mesh_sizes(config, devices, slices)
