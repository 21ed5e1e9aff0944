"""What is trained towards: objectives as sums over a batch, and the first of them, the next token."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp

from lfm_jax.arrays import Hidden, Positions, SegmentIds, Tokens
from lfm_jax.models import Decoder
from lfm_jax.sharding import constrain, shard_count


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
    block: positions of every row whose logits exist at one time. A sequence of up to so many is one block; of a longer one the
      logits are computed again in the backward pass, block by block.
    """

    z_loss: float = 0.0
    block: int = 512

    def __post_init__(self):
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 position, got {self.block}")


def next_token_objective(config: LossConfig) -> Objective:
    """Cross-entropy of each target plus z-loss, in float32; metrics: `nll`, the cross-entropy alone.

    The softmax runs over all rows of the vocabulary, also those beyond the tokenizer's: an exported model has them too, and
    what loads it neither masks nor drops them, so the model must learn that they do not occur.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        output = model(batch["tokens"], batch["segment_ids"], batch["positions"])
        weights = batch["loss_mask"].astype(jnp.float32)
        nll, square = _blockwise(model, output.hidden, batch["targets"], weights, config.block)
        loss = nll + config.z_loss * square
        return Sums(loss, jnp.sum(weights), {"nll": nll}, output.router_counts)

    return objective


def _block_sums(model: Decoder, hidden: Hidden, targets: Tokens, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of -log p(target) and of logsumexp^2 over one block."""
    logits = constrain(model.logits(hidden), ("batch", "seq", "vocab"))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it stays on the devices that hold a part of the vocabulary, and its gradient is no scatter.
    chosen = jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]
    score = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    return jnp.sum(weights * (normalizer - score)), jnp.sum(weights * jnp.square(normalizer))


def _blockwise(model: Decoder, hidden: Hidden, targets: Tokens, weights: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """`_block_sums` over the whole sequence. The blocks are pieces of what each device has, so that nothing leaves it."""
    batch, seq = targets.shape
    shards = shard_count("seq")
    local = seq // shards
    if local <= block:
        return _block_sums(model, hidden, targets, weights)
    count = -(-local // block)
    size = -(-local // count)

    def split(x: jax.Array) -> jax.Array:
        """[batch, seq, ...] as [count, batch, shards * size, ...]; what is added to a shard's end weighs nothing."""
        rest = x.shape[2:]
        widths = ((0, 0), (0, 0), (0, count * size - local), *((0, 0) for _ in rest))
        padded = jnp.pad(x.reshape(batch, shards, local, *rest), widths)
        pieces = jnp.moveaxis(padded.reshape(batch, shards, count, size, *rest), 2, 0)
        return constrain(pieces.reshape(count, batch, shards * size, *rest), (None, "batch", "seq", *(None for _ in rest)))

    @jax.checkpoint
    def accumulate(sums, piece):
        return jax.tree.map(jnp.add, sums, _block_sums(model, *piece)), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(accumulate, (zero, zero), (split(hidden), split(targets), split(weights)))
    return sums
