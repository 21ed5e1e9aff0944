"""Sequences that are split over devices, in an order that gives every device the same share of causal attention.

Of n devices, device r holds the chunks r and 2n - 1 - r of 2n: what a causal query sees of the one grows as the other's shrinks
(as Megatron-LM and MaxText deal sequences; "zigzag" elsewhere). Attention needs no order, since positions and segments say who
sees whom. What reads its neighbours, as a convolution does, gets the ends of the chunks before its own from other devices.

`place_batch` puts batches into this order. It holds for whole sequences in training and evaluation; a cached sequence is in its
natural order, and no device holds part of one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.configuration import ConfigError
from lfm_jax.sharding.logical import gather_shards, shard_count, shard_index

CHUNKS = 2  # of a sequence, on each device


def dealt_order(seq: int, shards: int) -> np.ndarray:
    """Which position of a sequence stands where in the order above: [seq] indices, to be used like `row[order]`.

    Raises:
      ConfigError: the sequence does not divide into so many chunks.
    """
    if shards == 1:
        return np.arange(seq)
    if seq % (CHUNKS * shards):
        raise ConfigError(
            f"a sequence of {seq} does not divide into {CHUNKS} chunks for each of context={shards} devices; make it a multiple "
            f"of {CHUNKS * shards}, or set another --config.mesh.context"
        )
    chunks = np.arange(seq).reshape(CHUNKS * shards, -1)
    return np.concatenate([chunks[[shard, CHUNKS * shards - 1 - shard]].ravel() for shard in range(shards)])


def in_sequence(x: jax.Array) -> jax.Array:
    """[batch, seq, ...], whole on each device, from the order above to that of the sequence."""
    shards = shard_count("seq")
    if shards == 1:
        return x
    chunks = x.reshape(x.shape[0], shards, CHUNKS, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def ends_before(ends: jax.Array) -> jax.Array:
    """For each chunk of this device, what the chunk before it in the sequence ends in; zeros for the first of all.

    To be called on shards, inside `map_shards`.

    Args:
      ends: [batch, CHUNKS, ...], of this device's chunks.
    """
    every = in_sequence(gather_shards(ends, "seq", axis=1))  # [batch, chunks, ...]
    before = jnp.concatenate([jnp.zeros_like(every[:, :1]), every[:, :-1]], axis=1)
    first = shard_index("seq")
    pick = lambda chunk: jax.lax.dynamic_index_in_dim(before, chunk, axis=1)
    return jnp.concatenate([pick(first), pick(every.shape[1] - 1 - first)], axis=1)
