"""The settings of the probes."""

import dataclasses

from experiments.scaling_probes.answers import QuestionsConfig
from experiments.scaling_probes.fine_tuned import FineTuningConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """sweep: the workdir of a sweep, finished or not. held_out_tokens: of its text and of the new one, for measuring losses.

    bits: to which weights are rounded. noise: g, in standard deviations of the initialisation; noise_draws: of each.
    resamples: drawings of ends, for the intervals. seed: of noise, drawings and the starts of fits.
    """

    sweep: str
    held_out_tokens: int = 1 << 15
    bits: tuple[int, ...] = (3, 4, 5, 6)
    noise: tuple[float, ...] = (0.2, 0.4, 0.8)
    noise_draws: int = 3
    fine_tuning: FineTuningConfig = FineTuningConfig()
    questions: QuestionsConfig = QuestionsConfig()
    resamples: int = 200
    seed: int = 0

    def __post_init__(self):
        if min(self.bits, default=2) < 2:
            raise ValueError(f"bits must be at least 2, with a sign among them, got {self.bits}")
        if min(self.noise, default=1) <= 0:
            raise ValueError(f"noise must be above 0, got {self.noise}")
        for name in ("held_out_tokens", "noise_draws", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
