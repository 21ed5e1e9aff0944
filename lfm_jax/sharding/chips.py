"""What the accelerators can do at best, for MFU and rooflines."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device, which on TPU v7 is half a chip.

    topology: the smallest host that the TPU compiler can compile for; None for a GPU.
    clock_hz: of the vector unit, None for a GPU; cores: that share the device's work (TPU v5p's two act as one device).
    flops: a second in bfloat16 with float32 sums; hbm_bytes: a second.
    hbm_capacity: bytes that a program can have.
    link_bytes: a second, one way, over one interconnect link of a chip; None where there is no torus.
    devices_per_chip: JAX devices that share a chip's links.
    ring_length: an axis of a slice closes to a ring where its length is a multiple of this.
    """

    topology: str | None
    clock_hz: float | None
    cores: int
    flops: float
    hbm_bytes: float
    hbm_capacity: float
    link_bytes: float | None = None
    devices_per_chip: int = 1
    ring_length: int = 1


# Peaks and bandwidths: cloud.google.com/tpu/docs and the scaling book for TPUs, data sheets (dense, SXM) for GPUs. Clocks are not
# published: these make the published peak a whole number of matrix units (2 * 128^2 operations a cycle each, 4 of them on v5e and
# on each v5p core; 2 * 256^2, 4 of them, on v6e and each v7 core), and are good to some percent.
# HBM of a TPU: what the compiler says is available when a program does not fit (libtpu 0.0.42); of a GPU, its data sheet. Links:
# the Cloud pages' interconnect bandwidth of a chip over its links and both directions (v5e 400 GB/s and v6e 800 GB/s over 4, v5p
# and v7 1,200 GB/s over 6). Rings: the scaling book, "TPUs": v5e and v6e close an axis of 16, v5p and v7 one of whole cubes of 4.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 1, 197e12, 819e9, 15.75 * 2**30, 50e9, 1, 16),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2, 459e12, 2765e9, 95.74 * 2**30, 100e9, 1, 4),
    "v6e": Chip("v6e:2x2", 1.75e9, 1, 918e12, 1640e9, 31.25 * 2**30, 100e9, 1, 16),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 1, 1153.5e12, 3690e9, 94.75 * 2**30, 100e9, 2, 4),
    "h100": Chip(None, None, 1, 989.5e12, 3350e9, 80e9),
    "h200": Chip(None, None, 1, 989.5e12, 4800e9, 141e9),
}
_BY_KIND = {
    "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """The entry for a JAX device, None where the peaks are not known (a CPU)."""
    name = _BY_KIND.get(device.device_kind)
    return None if name is None else CHIPS[name]
