"""Device meshes with named axes."""

import dataclasses
import math

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


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Builds the mesh over `devices` (default: all of them).

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, name) for name in AXES]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // rest)
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True) if size > 1) or "of one"
        raise ValueError(
            f"mesh {shape} needs {math.prod(sizes)} devices, {len(devices)} are there; "
            f"set one axis to -1 and let the others divide {len(devices)}"
        )
    auto = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # a size that is no product of whole axes of the torus
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, axis_types=auto)
