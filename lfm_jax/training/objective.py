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


class Sums(NamedTuple):
    """What an objective returns for a (micro-)batch: sums, so that they add up over micro-batches, batches and hosts.

    loss: float32 scalar, the sum of loss * weight. A step differentiates it and divides by the weight of the whole step.
    weight: float32 scalar, the sum of the weights.
    metrics: float32 scalars, each logged divided by `weight`.
    router_counts: tokens that chose each expert, [moe layers, experts] float32; None for a dense model.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    router_counts: jax.Array | None


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
