"""Learning rates over the steps of a run."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]  # step (updates done so far) -> learning rate of the next update, float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate rises and falls, as factors of its peak.

    kind: "wsd" (warm-up, stable, decay) holds the peak until the decay, so that a run can be prolonged from before it (MiniCPM,
      Hu et al. 2024, section 4); "cosine" falls from the end of the warm-up on (Loshchilov and Hutter 2017).
    warmup_steps: updates with a rate that rises by equal steps; the update after them has the peak.
    decay_share: of "wsd", the part of all steps that decays, at the end; 0 holds the peak.
    decay_shape: of "wsd", with p the progress of the decay: "sqrt" is 1 - sqrt(p) (Hägele et al. 2024, section 3.1, where it beat
      "linear", 1 - p).
    final_ratio: the rate that the decay ends in, as a factor of the peak.
    """

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = 0
    decay_share: float = 0.2
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    final_ratio: float = 0.0

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        for name in ("decay_share", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


def make_schedule(config: ScheduleConfig, peak: float, steps: int) -> Schedule:
    """The learning rate as a function of the step, to be called inside jit.

    No update is wasted on a rate of 0: the warm-up starts at peak / (warmup_steps + 1), and the decay would reach its end in the
    update after the last.

    Args:
      peak: the highest learning rate.
      steps: updates of the whole run.

    Raises:
      ValueError: warm-up and decay do not fit into the steps.
    """
    warmup = config.warmup_steps
    decay = max(0, steps - warmup) if config.kind == "cosine" else round(config.decay_share * steps)
    if warmup + decay > steps:
        raise ValueError(
            f"a warm-up of {warmup} and a decay of {decay} steps do not fit into {steps} steps; "
            "lower schedule.warmup_steps or schedule.decay_share, or train for more steps"
        )
    shapes = {
        "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
        "linear": lambda p: 1 - p,
        "sqrt": lambda p: 1 - jnp.sqrt(p),
    }
    shape = shapes["cosine" if config.kind == "cosine" else config.decay_shape]

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - (steps - decay)) / max(decay, 1), 0, 1)
        decayed = config.final_ratio + (1 - config.final_ratio) * shape(progress)
        return peak * jnp.where(step < warmup, (step + 1) / (warmup + 1), decayed)

    return rate
