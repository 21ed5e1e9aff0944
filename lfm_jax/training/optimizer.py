"""AdamW with clipping, and Muon for the matrices of blocks, as chains of optax transformations."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lfm_jax.models.functional import Tree
from lfm_jax.training import muon
from lfm_jax.training.schedule import Schedule, ScheduleConfig, make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with clipping of the gradient's global norm (Pascanu et al. 2013), or Muon beside it.

    learning_rate: the peak of the schedule.
    schedule: how it gets there and back.
    b1, b2: decay of the averages of the gradient and of its square; eps: added to the root of the latter.
    weight_decay: each update takes learning rate * weight_decay of a parameter away (as in PyTorch). Norms' scales and biases are
      spared.
    cautious_decay: only where the update itself brings the parameter nearer to zero (Chen et al. 2025, arXiv 2510.12402).
    clip_norm: longer gradients are scaled down to this norm; None: none is.
    matrices: what updates the blocks' projections, feed-forward and experts; "muon" is in `lfm_jax.training.muon`. Embeddings,
      the logits' matrix, routers, norms, biases and the convolutions' taps have AdamW in any case.
    matrix_rate: these matrices' learning rate, as a factor of `learning_rate`; their decay goes with it.
    muon_momentum: decay of Muon's sum of gradients, which is Nesterov's.
    moment_dtype: what the averages are kept in. They are computed in float32 and rounded to the nearest.

    Bytes of training state a parameter, beside its gradient (4): the parameter itself 4, and moments

      | moment_dtype | AdamW | Muon |
      | float32      | 8     | 4    |
      | bfloat16     | 4     | 2    |

    What bfloat16 costs: an average stands still once its next change is less than half a unit in its last place, so that with a
    steady input x it may stay off by x / (256 (1 - b)): for b1 = 0.9 by 4 %, for b2 = 0.95 by 8 %, which is 4 % of the update's
    length; for b2 = 0.999 it would never come down at all. Hence b2 must be 0.98 or less with it.
    """

    learning_rate: float = 1e-3
    schedule: ScheduleConfig = ScheduleConfig()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    cautious_decay: bool = False
    clip_norm: float | None = 1.0
    matrices: Literal["adamw", "muon"] = "adamw"
    matrix_rate: float = 1.0
    muon_momentum: float = 0.95
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        for name in ("learning_rate", "eps", "matrix_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping; got {self.clip_norm}")
        if self.moment_dtype == "bfloat16" and max(self.b1, self.b2, self.muon_momentum) > 0.98:
            raise ValueError(
                f"b1={self.b1}, b2={self.b2}, muon_momentum={self.muon_momentum}: averages in bfloat16 stand still beyond 0.98; "
                "lower them, or take moment_dtype='float32'"
            )


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
    """Clipping, AdamW's or Muon's direction, decoupled decay, learning rate.

    The rate is computed in the update from the number of updates done; the state keeps it as `learning_rate`.

    Args:
      steps: updates of the whole run, which the schedule spans.
    """
    directions = _kept_in(config.moment_dtype, optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.matrices == "muon":
        momentum = _kept_in(config.moment_dtype, optax.trace(config.muon_momentum, nesterov=True))
        parts = {"adamw": directions, "muon": optax.chain(momentum, muon.orthogonalize())}
        directions = optax.partition(parts, _matrix_labels)
    decay = _add_cautious_decay(config.weight_decay) if config.cautious_decay else optax.add_decayed_weights(config.weight_decay)
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        _promoting(directions),
        optax.masked(decay, decayed),
        _scale_by_learning_rate(make_schedule(config.schedule, config.learning_rate, steps), config.matrix_rate),
    )


def _matrix_labels(params: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "muon" if muon.is_matrix(path) else "adamw", params)


def _promoting(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Allows implicit promotion inside, whatever the caller's setting is: optax raises a float to an integer count."""

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def _kept_in(dtype: str, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the state's averages in `dtype`; they are computed in float32."""

    def cast(state: optax.OptState, dtype: str) -> optax.OptState:
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)

    def update(updates: Tree, state: optax.OptState, params: Tree | None = None) -> tuple[Tree, optax.OptState]:
        updates, state = transformation.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(transformation.init(params), dtype), update)


def _add_cautious_decay(weight_decay: float) -> optax.GradientTransformation:
    """optax.add_decayed_weights where update and parameter have the same sign, before the update is subtracted."""

    def add(update: jax.Array, parameter: jax.Array) -> jax.Array:
        return update + jnp.where(update * parameter > 0, weight_decay * parameter, 0)

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params))


def _scale_by_learning_rate(schedule: Schedule, matrix_rate: float) -> optax.GradientTransformation:
    """optax.scale_by_learning_rate, but for the factor of the matrices, and for the state, which says what the rate was."""

    def init(params: Tree) -> LearningRateState:
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Tree, state: LearningRateState, params: Tree | None = None) -> tuple[Tree, LearningRateState]:
        rate = schedule(state.count)

        def scaled(path, leaf: jax.Array) -> jax.Array:
            return -(rate * matrix_rate if muon.is_matrix(path) else rate) * leaf

        return jax.tree_util.tree_map_with_path(scaled, updates), LearningRateState(state.count + 1, rate)

    return optax.GradientTransformation(init, update)
