"""How the next token of each row is chosen from its logits; every row by settings of its own."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 256  # tokens whose weights are summed before one of them is looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen. The steps come in this order, as in transformers.

    max_new_tokens: tokens after the prompt, at most.
    repetition_penalty: divides the positive logits of tokens that the row already has, the prompt's included, and multiplies the
      negative ones (Keskar et al. 2019, section 4.1); 1 changes nothing.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: only so many of the most likely tokens are sampled from; 0 keeps all.
    top_p: of those, the smallest set whose probability reaches it (Holtzman et al. 2020).
    min_p: of those, the tokens that are at least so many times as likely as the most likely one (Nguyen et al. 2024).
    seed: of the draws; the t-th token of a request is drawn from (seed, t) alone, whatever other rows there are.
    greedy_as: at temperature 0, the temperature whose distribution `Update.drawn_log_probs` are of.
    """

    max_new_tokens: int = 128
    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    greedy_as: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be positive and finite, got {self.repetition_penalty}; 1 changes nothing")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}; 0 is greedy")
        if not 0 < self.greedy_as < float("inf"):
            raise ValueError(f"greedy_as must be a temperature above 0, got {self.greedy_as}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}; 0 keeps every token")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be in 0..{(1 << 32) - 1}, got {self.seed}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Settings(NamedTuple):
    """`SamplingConfig` of each row, [rows]."""

    repetition_penalty: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    greedy_as: jax.Array


class Needs(NamedTuple):
    """Which steps a program has, because a row of it needs them; the others change no row, so that they can be left out."""

    penalty: bool
    draws: bool
    top_k: bool
    top_p: bool
    min_p: bool


def settings_of(configs: Sequence[SamplingConfig]) -> Settings:
    """Those of some rows, on the host."""
    types = {"top_k": np.int32, "seed": np.uint32}
    every = lambda name: [getattr(config, name) for config in configs]
    return Settings(*(np.array(every(name), types.get(name, np.float32)) for name in Settings._fields))


def needs_of(configs: Sequence[SamplingConfig]) -> Needs:
    """What a program must have for these rows."""
    drawn = [each for each in configs if each.temperature > 0]
    return Needs(
        penalty=any(each.repetition_penalty != 1 for each in configs),
        draws=bool(drawn),
        top_k=any(each.top_k > 0 for each in drawn),
        top_p=any(each.top_p < 1 for each in drawn),
        min_p=any(each.min_p > 0 for each in drawn),
    )


def _ordered(values: jax.Array) -> jax.Array:
    """Integers in the order of float32 values (Herf 2001: the bits, those of negative numbers turned round)."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _keep_before(logits: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Sets to -inf every logit for which the weights of larger ones reach the row's limit; the largest and its equals stay.

    No sort, which of 65,536 logits takes a CPU milliseconds: the lowest number that has less than the limit above it is looked
    for by halving the range of float32, 32 times.

    Args:
      logits, weights: [rows, vocab]; limit: [rows].
    """
    ordered = _ordered(logits)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # below low too much lies above, from high on not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        fits = jnp.sum(jnp.where(ordered > middle[:, None], weights, 0), axis=1) < limit
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    extremes = jnp.iinfo(jnp.int32)
    start = jnp.full(limit.shape, extremes.min, jnp.int32), jnp.full(limit.shape, extremes.max, jnp.int32)
    _, lowest = jax.lax.fori_loop(0, 32, halve, start)
    return jnp.where((ordered >= lowest[:, None]) | (logits == jnp.max(logits, axis=1, keepdims=True)), logits, -jnp.inf)


def processed(logits: jax.Array, settings: Settings, seen: jax.Array | None, needs: Needs) -> jax.Array:
    """The logits that tokens are chosen by: after the penalty and, for rows that are drawn, everything else.

    Args:
      logits: [rows, vocab] float32, -inf where a token is never chosen. seen: [rows, vocab] bool, tokens that the row has; None
        where no row has a penalty.
    """
    if needs.penalty:
        penalty = settings.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if not needs.draws:
        return logits
    drawn = settings.temperature > 0
    tempered = logits / jnp.where(drawn, settings.temperature, 1.0)[:, None]
    if needs.top_k:
        limit = jnp.where(settings.top_k > 0, settings.top_k, logits.shape[1])
        tempered = _keep_before(tempered, jnp.ones_like(tempered), limit.astype(jnp.float32))
    if needs.top_p:
        limit = jnp.where(settings.top_p < 1, settings.top_p, jnp.inf)
        tempered = _keep_before(tempered, jax.nn.softmax(tempered, axis=1), limit)
    if needs.min_p:
        least = jnp.max(tempered, axis=1, keepdims=True) + jnp.log(settings.min_p)[:, None]
        tempered = jnp.where(tempered < least, -jnp.inf, tempered)
    return jnp.where(drawn[:, None], tempered, logits)


def _first_above(sums: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first index whose cumulative sum is above the target, what the target is above the sum before it); last axis.

    The target is brought below the whole sum first, so that what is found has weight.
    """
    cumulative = jnp.cumsum(sums, axis=-1)
    target = jnp.clip(target, 0, jnp.nextafter(cumulative[:, -1], jnp.float32(0)))
    index = jnp.argmax(cumulative > target[:, None], axis=-1)
    before = jnp.take_along_axis(cumulative - sums, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token a row by one uniform number each: where the cumulative probability passes it. [rows] int32."""
    rows, vocab = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = jnp.sum(weights, axis=2)
    block, rest = _first_above(sums, uniform * jnp.sum(sums, axis=1))
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + _first_above(inside, rest)[0]).astype(jnp.int32)


def choose(
    logits: jax.Array, settings: Settings, drawn_before: jax.Array, seen: jax.Array | None, needs: Needs, known: int
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, [rows] int32, and the logits that it was chosen by, [rows, vocab] (see `processed`).

    Args:
      logits: [rows, vocab] float32. drawn_before: [rows] int32, tokens that the row's request has got. seen: see `processed`.
      known: ids from here on are not the tokenizer's and are never chosen.
    """
    if known < logits.shape[1]:
        logits = jnp.where(jnp.arange(logits.shape[1])[None, :] < known, logits, -jnp.inf)
    logits = processed(logits, settings, seen, needs)
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)
    if not needs.draws:
        return greedy, logits
    keys = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(settings.seed, drawn_before)
    drawn = _draw(logits, jax.vmap(jax.random.uniform)(keys))
    return jnp.where(settings.temperature > 0, drawn, greedy), logits


def packed(chosen: jax.Array) -> jax.Array:
    """[rows, vocab] bool as bit sets, [rows, ceil(vocab / 32)] uint32: bit i of word w, from the lowest, is id 32 w + i."""
    rows, vocab = chosen.shape
    bits = jnp.pad(chosen, ((0, 0), (0, -vocab % 32))).reshape(rows, -1, 32).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32)[None, None], axis=2, dtype=jnp.uint32)
