"""Device meshes with named axes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: `tensor` communicates in every matmul, `data` once a step.
AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, which takes what the others leave.

    data: replicas of the model, each with its own part of the batch. They split the training state among them (ZeRO-1), gather
      the parameters once a step, in the type of the computation, and sum the gradient once.
    fsdp: the batch and every large array are split over it (ZeRO-3); layers gather their parameters as they run.
    expert: the batch and the experts of a mixture are split over it, every other large array as over fsdp.
    context: each sequence is split over it (see `lfm_jax.sharding.context`), every large array as over fsdp.
    tensor: heads, feed-forward, convolution channels and vocabulary are split over it.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        free = [name for name, size in sizes.items() if size == -1]
        wrong = {name: size for name, size in sizes.items() if size != -1 and size < 1}
        if wrong or len(free) > 1:
            raise ValueError(f"mesh sizes must be positive, with at most one -1; got {sizes}")


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> list[int]:
    """Devices along each of `AXES`, over so many in all.

    slices: that they are of, each of as many. The replicas of `data`, which meet twice a step, are spread over these, and nothing
      else is: what crosses from one to another goes over the data-centre network.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or replicas do not divide over slices.
    """
    sizes = [getattr(config, name) for name in AXES]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, devices // rest)
    shape = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size > 1) or "of one"
    if math.prod(sizes) != devices:
        raise ValueError(
            f"mesh {shape} needs {math.prod(sizes)} devices, {devices} are there; "
            f"set one axis to -1 and let the others divide {devices}"
        )
    if sizes[0] % slices:
        raise ValueError(
            f"mesh {shape} over {slices} slices: each slice must have whole replicas of the model; "
            f"make data a multiple of {slices}, like --config.mesh.data={slices}"
        )
    return sizes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Builds the mesh over `devices` (default: all of them).

    Raises:
      ValueError: see `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if devices[0].platform != "tpu":
        grid = np.asarray(devices).reshape(mesh_sizes(config, len(devices)))
    else:
        slices = {}
        for device in devices:
            slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
        data, *others = mesh_sizes(config, len(devices), len(slices))
        # `data` is the first axis, so that slices come one after the other along it.
        grid = np.concatenate([_on_torus([data // len(slices), *others], slices[each]) for each in sorted(slices)])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on_torus(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """A slice's devices, so that neighbours along an axis are neighbours on its links."""
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices).devices
    except NotImplementedError:  # a size that is no product of whole axes of the torus
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
