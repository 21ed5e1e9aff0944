"""What the accelerators can do at best, for MFU and rooflines."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device, which on TPU v7 is half a chip.

    topology: the smallest host that the TPU compiler can compile for; None for a GPU.
    clock_hz: of the vector unit, None for a GPU; cores: that share the device's work (TPU v5p's two act as one device).
    flops: a second in bfloat16 with float32 sums; hbm_bytes: a second.
    """

    topology: str | None
    clock_hz: float | None
    cores: int
    flops: float
    hbm_bytes: float


# Peaks and bandwidths: cloud.google.com/tpu/docs and the scaling book for TPUs, data sheets (dense, SXM) for GPUs. Clocks are not
# published: these make the published peak a whole number of matrix units (2 * 128^2 operations a cycle each, 4 of them on v5e and
# on each v5p core; 2 * 256^2, 4 of them, on v6e and each v7 core), and are good to some percent.
CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 1, 197e12, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2, 459e12, 2765e9),
    "v6e": Chip("v6e:2x2", 1.75e9, 1, 918e12, 1640e9),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 1, 1153.5e12, 3690e9),
    "h100": Chip(None, None, 1, 989.5e12, 3350e9),
    "h200": Chip(None, None, 1, 989.5e12, 4800e9),
}
_BY_KIND = {
    "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200",
}  # fmt: skip


def chip_of(device: jax.Device) -> Chip | None:
    """The entry for a JAX device, None where the peaks are not known (a CPU)."""
    name = _BY_KIND.get(device.device_kind)
    return None if name is None else CHIPS[name]
