"""AdamW with clipping, as a chain of optax transformations."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lfm_jax.models.functional import Tree
from lfm_jax.training.schedule import Schedule, ScheduleConfig, make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with clipping of the gradient's global norm (Pascanu et al. 2013).

    learning_rate: the peak of the schedule.
    schedule: how it gets there and back.
    b1, b2: decay of the averages of the gradient and of its square; eps: added to the root of the latter.
    weight_decay: each update takes learning rate * weight_decay of a parameter away (as in PyTorch). Norms' scales and biases are
      spared.
    clip_norm: longer gradients are scaled down to this norm; None: none is.
    """

    learning_rate: float = 1e-3
    schedule: ScheduleConfig = ScheduleConfig()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {self.clip_norm}")


class LearningRateState(NamedTuple):
    """count: updates done, int32; learning_rate: of the last of them, float32, for the log."""

    count: jax.Array
    learning_rate: jax.Array


def decayed(params: Tree) -> Tree:
    """True for the parameters that weight decay applies to: all but the scales of norms and the biases, by their names."""

    def decays(path, leaf) -> bool:
        name = path[-1].key
        return not (name == "scale" or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, Adam with moments of the parameters' type (float32), decoupled decay, learning rate.

    The rate is computed in the update from the number of updates done; the state keeps it as `learning_rate`.

    Args:
      steps: updates of the whole run, which the schedule spans.
    """
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        _promoting(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _scale_by_learning_rate(make_schedule(config.schedule, config.learning_rate, steps)),
    )


def _promoting(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Allows implicit promotion inside, whatever the caller's setting is: optax raises a float to an integer count."""

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def _scale_by_learning_rate(schedule: Schedule) -> optax.GradientTransformation:
    """optax.scale_by_learning_rate, but for the state, which says what the rate was."""

    def init(params: Tree) -> LearningRateState:
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Tree, state: LearningRateState, params: Tree | None = None) -> tuple[Tree, LearningRateState]:
        rate = schedule(state.count)
        return jax.tree.map(lambda leaf: -rate * leaf, updates), LearningRateState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)
