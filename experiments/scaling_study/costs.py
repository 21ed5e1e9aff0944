"""What training and inference cost, whoever trains and the devices of whoever uses the model: stated values, all settings."""

import dataclasses

from lfm_jax.configuration import nearest
from lfm_jax.scaling.data_points import FLOPS_PER_PARAMETER_AND_TOKEN
from lfm_jax.scaling.deployment import Device, Prices
from lfm_jax.scaling.inference_aware import INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN
from lfm_jax.sharding.chips import CHIPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """chip, mfu_share: what training runs on, and the share of its peak that it reaches, where there is no plan.

    inference_mfu_share: the same of serving in a data centre. Equal shares count FLOPs alone, as Sardana et al. do in their
      examples; decoding reaches far less, which makes every served token dearer.
    joules_per_flop: of training, all of the machine included. 3.2e-12 is a DGX H100's 10.2 kW at most over 8 x 40 % of 989.5e12;
      TPUs' power is not published.
    weight_bits: of a weight on the device, 4.5 being Q4_0's.
    device_bytes_per_second: LFM2.5-350M decodes 100 tokens/s in 8 bits on one core of a Galaxy S25 Ultra (cactuscompute.com,
      2026) and 188 tokens/s on a Snapdragon (its model card): 36 to 39 GB/s, of a peak of 84.8.
    device_joules_per_byte: 0.1 J a token and billion parameters of 8 bits (MobileLLM, arXiv 2402.14905, from energies of DRAM,
      no measurement). A measured study finds that fewer bits save little energy on a phone's cores (arXiv 2603.26603), so
      a byte may cost more where there are fewer of them.
    battery_joules: a phone's, 50 kJ (MobileLLM). devices: that share the demand. context: tokens whose cache a decoded one reads.
    """

    chip: str = "v5p"
    mfu_share: float = 0.4
    inference_mfu_share: float = 0.4
    joules_per_flop: float = 3.2e-12
    weight_bits: float = 4.5
    device_bytes_per_second: float = 38e9
    device_joules_per_byte: float = 1e-10
    battery_joules: float = 50e3
    devices: float = 1e8
    context: int = 4096

    def __post_init__(self):
        if self.chip not in CHIPS:
            raise ValueError(f"chip: no peak is known of {self.chip!r}. {nearest(self.chip, CHIPS)}")
        for name in ("mfu_share", "inference_mfu_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        numbers = (
            "joules_per_flop", "weight_bits", "device_bytes_per_second", "device_joules_per_byte", "battery_joules", "devices",
            "context",
        )  # fmt: skip
        for name in numbers:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero, got {getattr(self, name)}")

    @property
    def served(self) -> Prices:
        """In FLOPs of training: those of serving are dearer by as much as they reach less of the peak, on the same chips."""
        dearer = self.mfu_share / self.inference_mfu_share
        return Prices(FLOPS_PER_PARAMETER_AND_TOKEN, INFERENCE_FLOPS_PER_PARAMETER_AND_TOKEN * dearer)

    @property
    def on_devices(self) -> Prices:
        """Joules: trained in a data centre, run on devices, where a token reads each parameter once."""
        return Prices(
            FLOPS_PER_PARAMETER_AND_TOKEN * self.joules_per_flop, self.weight_bits / 8 * self.device_joules_per_byte
        )

    @property
    def device(self) -> Device:
        """The device."""
        return Device(self.device_bytes_per_second, self.device_joules_per_byte)

    def chip_hours(self, flops: float) -> float:
        """Of training, at the stated share of the peak."""
        chip = CHIPS[self.chip]
        return flops / (chip.flops * chip.devices_per_chip * self.mfu_share) / 3600
