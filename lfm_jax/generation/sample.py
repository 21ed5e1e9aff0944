"""Autoregressive sampling: one prefill of left-padded prompts, then one jitted loop over single steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.models import DecoderCache, FunctionalModel, ModelConfig, init_cache
from lfm_jax.models.functional import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    max_new_tokens: tokens after the prompt, at most.
    temperature: divides the logits; 0 takes the most likely token.
    top_p: only the smallest set of tokens whose probability reaches it is sampled from (Holtzman et al. 2020).
    seed: of the draws; request r at step t draws from a key of (seed, r, t), so that a batch's other rows change nothing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token")


class _Progress(NamedTuple):
    step: jax.Array
    cache: DecoderCache
    last: jax.Array  # [batch] int32
    stopped: jax.Array  # [batch] bool
    tokens: jax.Array  # [batch, max_new_tokens] int32


def _keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Sets the logits outside the nucleus to -inf; the token that crosses top_p stays in."""
    descending = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(descending, axis=-1)
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _choose(logits: jax.Array, step: jax.Array, config: ModelConfig, sampling: SamplingConfig) -> jax.Array:
    """The next token of each row, [batch] int32; ids that the tokenizer does not know are never chosen."""
    if config.tokenizer_vocab_size is not None:
        known = jnp.arange(config.vocab_size) < config.tokenizer_vocab_size
        logits = jnp.where(known[None, :], logits, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _keep_top_p(logits / sampling.temperature, sampling.top_p)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("functional_model", "config", "sampling", "stop_ids"))
def _generate(
    params: Tree,
    buffers: Tree,
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    functional_model: FunctionalModel,
    config: ModelConfig,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
) -> jax.Array:
    model = functional_model.bind(params, buffers)
    batch, prompt = tokens.shape
    limit = sampling.max_new_tokens
    output = model(tokens, segment_ids, cache=init_cache(config, batch, prompt + limit, model.dtype))
    is_stop = lambda chosen: jnp.isin(chosen, jnp.asarray(stop_ids, jnp.int32))

    def start() -> _Progress:
        first = _choose(model.logits(output.hidden[:, -1]), jnp.int32(0), config, sampling)
        out = jnp.full((batch, limit), -1, jnp.int32).at[:, 0].set(first)
        return _Progress(jnp.int32(1), output.cache, first, is_stop(first), out)

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.step < limit) & ~jnp.all(progress.stopped)

    def advance(progress: _Progress) -> _Progress:
        output = model(progress.last[:, None], cache=progress.cache)
        chosen = _choose(model.logits(output.hidden[:, 0]), progress.step, config, sampling)
        written = jnp.where(progress.stopped, -1, chosen)
        tokens = progress.tokens.at[:, progress.step].set(written)
        return _Progress(progress.step + 1, output.cache, chosen, progress.stopped | is_stop(chosen), tokens)

    return jax.lax.while_loop(unfinished, advance, start()).tokens


def generate(
    functional_model: FunctionalModel,
    config: ModelConfig,
    params: Tree,
    buffers: Tree,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids, at least one each (a bare beginning-of-text token starts from nothing).
      stop_ids: a row ends with the first of these, which is part of the result.
    Returns:
      The new token ids of each prompt.
    Raises:
      ValueError: no prompt, an empty prompt, or an id outside the vocabulary.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"each of the {len(prompts)} prompts needs at least one token; start with the beginning-of-text token")
    highest, lowest = max(map(max, prompts)), min(map(min, prompts))
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(f"prompt ids must be in 0..{config.vocab_size - 1}, got {lowest}..{highest}; is it this tokenizer?")
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), longest), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        segment_ids[row, longest - len(prompt) :] = 1
    new = _generate(
        params, buffers, tokens, segment_ids,
        functional_model=functional_model, config=config, sampling=sampling, stop_ids=stop_ids,
    )
    return [[int(token) for token in row if token >= 0] for row in np.asarray(new)]
