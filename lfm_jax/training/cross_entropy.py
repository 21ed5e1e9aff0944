"""Cross-entropy of a linear head, block by block: the logits of a whole sequence never exist."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.arrays import Hidden, Tokens
from lfm_jax.sharding import map_shards, max_shards, shard_index, sum_shards


class _Settings(NamedTuple):
    """z_loss, block: as in `LossConfig`; split: whether the vocabulary is split over devices; known: ids from there on have no
    probability; entropy: whether it is wanted."""

    z_loss: float
    block: int
    split: bool
    known: int | None = None
    entropy: bool = False


class _Drawing(NamedTuple):
    """What changes the logits of each position, see `drawn_log_probs`; [batch, seq], or [tokens] of a block."""

    temperature: jax.Array | None = None
    kept: jax.Array | None = None


_AS_THEY_ARE = _Drawing()


def linear_cross_entropy(
    hidden: Hidden, head: jax.Array, targets: Tokens, weights: jax.Array, *, z_loss: float, block: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums over all positions of -log p(target) + z_loss * logsumexp^2, and of -log p(target) alone.

    With logits l = head h and n = logsumexp(l), the gradient of a position's loss by l is (1 + 2 z_loss n) softmax(l) - onehot.
    It is taken in the forward pass, while the logits of a block are there, and not by computing them again: the gradients by
    hidden and head are kept for the backward pass, which scales them (as Liger Kernel does, Hsu et al. 2024, 2410.10989, section
    3.2). The head's adds up over the blocks in float32. Softmax and sums are in float32, the products in the type of `hidden`.

    Args:
      hidden: [batch, seq, embed]; head: [vocab, embed]; targets: [batch, seq] int32; weights: [batch, seq] float32.
      block: tokens whose logits exist at one time, on each device.
    Returns:
      Two float32 scalars. Only the first has a gradient.
    """
    vocab = head.shape[0]

    def on_shard(hidden: Hidden, head: jax.Array, targets: Tokens, weights: jax.Array):
        split = head.shape[0] < vocab
        ids = targets - shard_index("vocab") * head.shape[0] if split else targets
        sums = _summed(_Settings(z_loss, block, split), hidden, head, ids, weights)
        return jax.tree.map(lambda total: total[None, None], sums)  # a [batch, seq] of one position for each device

    rows = ("batch", "seq")
    loss, nll = map_shards(
        on_shard, [hidden, head, targets, weights], [(*rows, None), ("vocab", None), rows, rows], (rows, rows)
    )  # fmt: skip
    return jnp.sum(loss), jax.lax.stop_gradient(jnp.sum(nll))


class LogProbs(NamedTuple):
    """of_targets: log p of each position's target; entropy: of each position's distribution, in nats. [batch, seq] float32."""

    of_targets: jax.Array
    entropy: jax.Array


def linear_log_probs(hidden: Hidden, head: jax.Array, targets: Tokens, *, block: int) -> jax.Array:
    """log p(target) of each position, [batch, seq] float32, for losses that are no sum over tokens.

    What such a loss makes of a position is known only when all have been seen, so the backward pass computes the logits of each
    block again. Arguments and types are those of `linear_cross_entropy`.
    """
    return _log_probs(_Settings(0.0, block, False), hidden, head, targets, None, None).of_targets


def drawn_log_probs(
    hidden: Hidden,
    head: jax.Array,
    targets: Tokens,
    temperature: jax.Array,
    kept: jax.Array | None = None,
    *,
    known: int | None,
    block: int,
) -> LogProbs:
    """As `linear_log_probs`, under the distribution that a sampler draws from (`lfm_jax.generation`), and its entropy.

    Args:
      temperature: [batch] or [batch, seq] float32, that divides the logits; 0 counts as 1, as in the sampler's own account.
      kept: the tokens that could be drawn, [batch, seq, ceil(vocab / 32)] uint32: bit i of word w, from the lowest, is id
        32 w + i. A position whose words are all 0 keeps every token. A target that is not kept has -inf, and no gradient.
      known: ids from here on have no probability; None: all have some.
    Returns:
      The entropy has no gradient.
    """
    temperature = jnp.broadcast_to(temperature.reshape(*temperature.shape, *(1,) * (2 - temperature.ndim)), targets.shape)
    settings = _Settings(0.0, block, False, known if known is not None and known < head.shape[0] else None, entropy=True)
    return _log_probs(settings, hidden, head, targets, temperature, kept)


def _log_probs(
    settings: _Settings,
    hidden: Hidden,
    head: jax.Array,
    targets: Tokens,
    temperature: jax.Array | None,
    kept: jax.Array | None,
) -> LogProbs:
    vocab = head.shape[0]
    optional = [(temperature, ("batch", "seq")), (kept, ("batch", "seq", None))]
    given = [(array, axes) for array, axes in optional if array is not None]

    def on_shard(hidden: Hidden, head: jax.Array, targets: Tokens, *others: jax.Array) -> tuple[jax.Array, jax.Array]:
        split = head.shape[0] < vocab
        ids = targets - shard_index("vocab") * head.shape[0] if split else targets
        rest = iter(others)
        temperature, kept = (None if array is None else next(rest) for array, _ in optional)
        return _each(settings._replace(split=split), hidden, head, ids, _Drawing(temperature, kept))

    rows = ("batch", "seq")
    found = map_shards(
        on_shard, [hidden, head, targets, *(array for array, _ in given)],
        [(*rows, None), ("vocab", None), rows, *(axes for _, axes in given)], (rows, rows),
    )  # fmt: skip
    return LogProbs(*found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(settings: _Settings, hidden: Hidden, head: jax.Array, ids: Tokens, weights: jax.Array):
    """The two sums over this device's rows; ids count from the first row of its part of the head."""
    add = lambda sums, piece: (jax.tree.map(jnp.add, sums, _block(settings, head, *piece)[0]), None)
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), _blocks(settings.block, (hidden, ids, weights)))[0]


def _summed_forward(settings: _Settings, hidden: Hidden, head: jax.Array, ids: Tokens, weights: jax.Array):
    def add(carry, piece):
        sums, by_head = carry
        found, by_logits = _block(settings, head, *piece)
        by_logits = by_logits.astype(hidden.dtype)
        by_hidden = jnp.einsum("tv,ve->te", by_logits, head, preferred_element_type=hidden.dtype)
        by_head += jnp.einsum("tv,te->ve", by_logits, piece[0], preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, found), by_head), by_hidden

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero), jnp.zeros(head.shape, jnp.float32)
    (sums, by_head), by_hidden = jax.lax.scan(add, start, _blocks(settings.block, (hidden, ids, weights)))
    by_hidden = by_hidden.reshape(-1, hidden.shape[2])[: ids.size].reshape(hidden.shape)
    return sums, (by_hidden, by_head.astype(head.dtype))


def _summed_backward(settings: _Settings, kept: tuple[jax.Array, jax.Array], gradient: tuple[jax.Array, jax.Array]):
    by_loss, _ = gradient
    # Devices that hold parts of the vocabulary return the same sum, and each gets its share of that sum's gradient.
    by_loss = sum_shards(by_loss, "vocab") if settings.split else by_loss
    by_hidden, by_head = (array * by_loss.astype(array.dtype) for array in kept)
    return by_hidden, by_head, None, None


_summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(settings: _Settings, hidden: Hidden, head: jax.Array, ids: Tokens, drawing: _Drawing) -> tuple[jax.Array, jax.Array]:
    """log p of each of this device's targets, and the entropies; ids count from the first row of its part of the head."""
    return _each_forward(settings, hidden, head, ids, drawing)[0]


def _each_forward(settings: _Settings, hidden: Hidden, head: jax.Array, ids: Tokens, drawing: _Drawing):
    def of_block(_, piece):
        hidden, ids, drawing = piece
        logits = _logits(settings, head, hidden, drawing)
        scored = _scored(settings, logits, ids)
        entropy = _entropy(settings, logits, scored) if settings.entropy else jnp.zeros_like(scored.score)
        return None, (scored.score - scored.normalizer, entropy, scored.normalizer)

    _, found = jax.lax.scan(of_block, None, _blocks(settings.block, (hidden, ids, drawing)))
    log_probs, entropy, normalizer = (array.reshape(-1)[: ids.size].reshape(ids.shape) for array in found)
    return (log_probs, entropy), (hidden, head, ids, drawing, normalizer)


def _each_backward(settings: _Settings, kept: tuple, gradients: tuple[jax.Array, jax.Array]):
    (hidden, head, ids, drawing, normalizer), (gradient, _) = kept, gradients
    gradient = sum_shards(gradient, "vocab") if settings.split else gradient  # as in _summed_backward

    def add(by_head, piece):
        hidden, ids, drawing, normalizer, gradient = piece
        logits = _logits(settings, head, hidden, drawing)
        chosen = jnp.arange(logits.shape[-1])[None, :] == ids[:, None]
        by_logits = gradient[:, None] * (chosen.astype(jnp.float32) - jnp.exp(logits - normalizer[:, None]))
        by_logits = jnp.where(jnp.isneginf(logits), 0.0, by_logits)
        if drawing.temperature is not None:
            by_logits /= _divisor(drawing.temperature)
        by_logits = by_logits.astype(hidden.dtype)
        by_hidden = jnp.einsum("tv,ve->te", by_logits, head, preferred_element_type=hidden.dtype)
        return by_head + jnp.einsum("tv,te->ve", by_logits, hidden, preferred_element_type=jnp.float32), by_hidden

    pieces = _blocks(settings.block, (hidden, ids, drawing, normalizer, gradient))
    by_head, by_hidden = jax.lax.scan(add, jnp.zeros(head.shape, jnp.float32), pieces)
    by_hidden = by_hidden.reshape(-1, hidden.shape[2])[: ids.size].reshape(hidden.shape)
    return by_hidden, by_head.astype(head.dtype), None, None


_each.defvjp(_each_forward, _each_backward)


def _divisor(temperature: jax.Array) -> jax.Array:
    """[tokens, 1]. What a block is filled up with has temperature 0 as well, and must be no NaN in the head's gradient."""
    return jnp.where(temperature > 0, temperature, 1.0)[:, None]


def _logits(settings: _Settings, head: jax.Array, hidden: jax.Array, drawing: _Drawing = _AS_THEY_ARE) -> jax.Array:
    """This device's logits of a block, [tokens, vocab] float32; -inf where a token cannot be drawn."""
    logits = jnp.einsum("te,ve->tv", hidden, head, preferred_element_type=jnp.float32)
    if drawing.temperature is not None:
        logits /= _divisor(drawing.temperature)
    if settings.known is None and drawing.kept is None:
        return logits
    count = logits.shape[1]
    first = shard_index("vocab") * count if settings.split else 0
    if settings.known is not None:
        logits = jnp.where((first + jnp.arange(count) < settings.known)[None, :], logits, -jnp.inf)
    if drawing.kept is not None:
        bits = (drawing.kept[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
        bits = jax.lax.dynamic_slice_in_dim(bits.reshape(bits.shape[0], -1), first, count, axis=1)
        whole = jnp.all(drawing.kept == 0, axis=1, keepdims=True)
        logits = jnp.where((bits == 1) | whole, logits, -jnp.inf)
    return logits


def _blocks(block: int, arrays):
    """A tree of [batch, seq, ...] as [blocks, block, ...] each; what is added to the end is zeros, and weighs nothing."""
    batch, seq = jax.tree.leaves(arrays)[0].shape[:2]
    positions = batch * seq
    count = -(-positions // block)
    size = -(-positions // count)

    def split(x: jax.Array) -> jax.Array:
        tokens = x.reshape(positions, *x.shape[2:])
        padded = jnp.pad(tokens, ((0, count * size - positions), *((0, 0) for _ in x.shape[2:])))
        return padded.reshape(count, size, *x.shape[2:])

    return jax.tree.map(split, arrays)


class _Scored(NamedTuple):
    """Of a block: exp(logits - their largest) and which logit is the target's, [tokens, vocab]; [tokens] each: the sum of the
    former over the whole vocabulary, logsumexp, and the target's logit."""

    powers: jax.Array
    chosen: jax.Array
    total: jax.Array
    normalizer: jax.Array
    score: jax.Array


def _scored(settings: _Settings, logits: jax.Array, ids: jax.Array) -> _Scored:
    over_vocab = lambda reduce, array: reduce(array, "vocab") if settings.split else array
    peak = over_vocab(max_shards, jnp.max(logits, axis=-1))
    powers = jnp.exp(logits - peak[:, None])
    total = over_vocab(sum_shards, jnp.sum(powers, axis=-1))
    # A masked sum, not a gather: it stays on the devices that hold a part of the vocabulary.
    chosen = jnp.arange(logits.shape[-1])[None, :] == ids[:, None]
    score = over_vocab(sum_shards, jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1))
    return _Scored(powers, chosen, total, peak + jnp.log(total), score)


def _entropy(settings: _Settings, logits: jax.Array, scored: _Scored) -> jax.Array:
    """log(sum of e^l) - the mean of l, [tokens]."""
    mean = jnp.sum(scored.powers * jnp.where(jnp.isneginf(logits), 0.0, logits), axis=-1)
    return scored.normalizer - (sum_shards(mean, "vocab") if settings.split else mean) / scored.total


def _block(settings: _Settings, head: jax.Array, hidden: jax.Array, ids: jax.Array, weights: jax.Array):
    """The two sums over a block of tokens, and the gradient of the first by this device's logits, [tokens, vocab] float32."""
    powers, chosen, total, normalizer, score = _scored(settings, _logits(settings, head, hidden), ids)
    nll = jnp.sum(weights * (normalizer - score))
    loss = nll + settings.z_loss * jnp.sum(weights * jnp.square(normalizer))
    slope = weights * (1 + 2 * settings.z_loss * normalizer) / total
    by_logits = slope[:, None] * powers - jnp.where(chosen, weights[:, None], 0.0)
    return (loss, nll), by_logits
