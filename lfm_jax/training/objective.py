"""What is trained towards: objectives as sums over a batch, and the first of them, the next token."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp

from lfm_jax.arrays import Positions, SegmentIds, Tokens
from lfm_jax.models import Decoder
from lfm_jax.training.cross_entropy import linear_cross_entropy


class Batch(TypedDict):
    """Packed or padded sequences, the rows split over the devices. An objective may ask for more arrays, [batch, ...] each.

    tokens: the inputs, [batch, seq] int32.
    targets: the token that follows each input in its document, [batch, seq] int32; any id where the mask is 0.
    segment_ids: documents of a row numbered from 1; 0 is padding, on either side.
    positions: restart at 0 with each document.
    loss_mask: weight of each target, [batch, seq] float32; 0 for padding and for what is not to be learnt.
    """

    tokens: Tokens
    targets: Tokens
    segment_ids: SegmentIds
    positions: Positions
    loss_mask: jax.Array


class Part(NamedTuple):
    """Sums over a part of what counts, and the number of what is in it, float32 scalars."""

    metrics: dict[str, jax.Array]
    of: jax.Array


class Sums(NamedTuple):
    """What an objective returns for a (micro-)batch: sums, so that they add up over micro-batches, batches and hosts, and
    extremes, of which the lowest or the highest counts.

    loss: float32 scalar, the sum of loss * weight. A step differentiates it and divides by the weight of the whole step.
    weight: float32 scalar, the sum of the weights.
    metrics: float32 scalars, each logged divided by `weight`, or by `of` where it is given.
    router_counts: tokens that chose each expert, [moe layers, experts] float32; None for a dense model.
    of: float32 scalar, what the metrics are means over where the weight counts something else.
    counts: float32 scalars, logged as they are; `tokens` makes the rate of a run. None: the weight is the tokens.
    lowest, highest: float32 scalars, logged as NAME_min and NAME_max; infinite and -infinite where there is nothing.
    parts: by name; a metric of one is logged as METRIC_of_NAME, divided by the part's own `of`: no number where it is empty.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    router_counts: jax.Array | None
    of: jax.Array | None = None
    counts: dict[str, jax.Array] | None = None
    lowest: dict[str, jax.Array] | None = None
    highest: dict[str, jax.Array] | None = None
    parts: dict[str, Part] | None = None

    def joined(
        self,
        total: Callable[..., jax.Array],
        least: Callable[..., jax.Array],
        most: Callable[..., jax.Array],
        *others: "Sums",
    ) -> "Sums":
        """`total` of all sums, `least` of what is lowest, `most` of what is highest, leaf by leaf."""
        extremes = {
            "lowest": jax.tree.map(least, self.lowest, *(other.lowest for other in others)),
            "highest": jax.tree.map(most, self.highest, *(other.highest for other in others)),
        }
        return jax.tree.map(total, self, *others)._replace(**extremes)

    def figures(self) -> dict[str, jax.Array]:
        """What is logged: `loss`, the metrics, counts, extremes and parts, float32 scalars. 0 where nothing has weight."""
        share, of = _share(self.weight), self.weight if self.of is None else self.of
        means = {name: value * _share(of) for name, value in self.metrics.items()}
        counts = {"tokens": self.weight} if self.counts is None else self.counts
        ends = {f"{name}_min": value for name, value in (self.lowest or {}).items()}
        ends |= {f"{name}_max": value for name, value in (self.highest or {}).items()}
        parts = {
            f"{metric}_of_{name}": value / part.of
            for name, part in (self.parts or {}).items()
            for metric, value in part.metrics.items()
        }
        return {"loss": self.loss * share, **means, **counts, **ends, **parts}


def _share(total: jax.Array) -> jax.Array:
    """1 / total, 0 where that is 0."""
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


Objective = Callable[[Decoder, Batch, jax.Array], Sums]  # (the model bound inside jit, batch, random key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Next-token cross-entropy.

    z_loss: weight of logsumexp(logits)^2, which keeps the logits from drifting (PaLM, Chowdhery et al. 2022, section 5: 1e-4).
    block: tokens whose logits exist at one time, on each device.
    """

    z_loss: float = 0.0
    block: int = 2048

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")


def next_token_objective(config: LossConfig) -> Objective:
    """Cross-entropy of each target plus z-loss, in float32; metrics: `nll`, the cross-entropy alone.

    The softmax runs over all rows of the vocabulary, also those beyond the tokenizer's: an exported model has them too, and
    what loads it neither masks nor drops them, so the model must learn that they do not occur.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        output = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        weights = batch["loss_mask"].astype(jnp.float32)
        loss, nll = linear_cross_entropy(
            output.hidden, model.head, batch["targets"], weights, z_loss=config.z_loss, block=config.block
        )  # fmt: skip
        return Sums(loss, jnp.sum(weights), {"nll": nll}, output.router_counts)

    return objective
