"""What runs on the devices: prompts become rows, rows take slots, and all slots advance together, a token a step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.arrays import SegmentIds, Tokens
from lfm_jax.generation.sampling import Needs, Settings, choose, packed
from lfm_jax.models import Decoder, DecoderCache, FunctionalModel, ModelConfig, init_cache
from lfm_jax.models.cache import AttentionState
from lfm_jax.models.functional import Tree


class Program(NamedTuple):
    """What is the same in every call. dtype: of activations. chunk: tokens of a prompt that a call takes at most. tell_routing:
    whether calls tell the experts of each token that they read, [..., moe layers, top_k] int16."""

    functions: FunctionalModel
    config: ModelConfig
    dtype: jnp.dtype
    chunk: int
    tell_routing: bool = False

    @property
    def known(self) -> int:
        """Ids from here on are never chosen."""
        return self.config.tokenizer_vocab_size or self.config.vocab_size


class Rows(NamedTuple):
    """Prompts that have been read. hidden: [rows, embed], of the last token of each."""

    cache: DecoderCache
    hidden: jax.Array


class Chosen(NamedTuple):
    """One token of each row, or [steps, rows] of them; -1 where there is none.

    log_probs: of the model, that is before penalty, temperature and truncation, over all rows of the vocabulary.
    top_ids, top_log_probs: of the most likely tokens, [..., top], which are ids of the tokenizer.
    drawn_log_probs: after all that, over the ids of the tokenizer; kept: which ids these are of, [..., words] uint32 (see
      `packed`). None where `Tell` does not ask.
    routing: the experts of the token that was read for it, [..., moe layers, top_k]; None unless the program tells it, and of the
      first token of a row, for which its prompt was read.
    """

    tokens: jax.Array
    log_probs: jax.Array
    top_ids: jax.Array
    top_log_probs: jax.Array
    drawn_log_probs: jax.Array | None = None
    kept: jax.Array | None = None
    routing: jax.Array | None = None


class Tell(NamedTuple):
    """What a program tells beside tokens and log_probs, because a row of it is asked for: fields of `Chosen`."""

    drawn: bool = False
    kept: bool = False


NOTHING_ELSE = Tell()


class Slots(NamedTuple):
    """Where requests are answered. All arrays begin with [slots].

    last: the token that was chosen and is not in the cache yet. drawn: tokens that the request has got. left: those it may still
    get; a slot with none is free. stop_ids: [slots, ids], filled up with -1. seen: [slots, vocab] bool, tokens of the row, right
    for those with a penalty; None where none has one.
    """

    cache: DecoderCache
    last: jax.Array
    drawn: jax.Array
    left: jax.Array
    settings: Settings
    stop_ids: jax.Array
    seen: jax.Array | None


class Entry(NamedTuple):
    """What a request brings to its slot; fields as in `Slots`, [entries] each."""

    settings: Settings
    left: jax.Array
    stop_ids: jax.Array
    seen: jax.Array | None


@functools.partial(jax.jit, static_argnames=("program", "rows", "capacity"))
def empty_rows(program: Program, rows: int, capacity: int) -> Rows:
    """Rows that have read nothing, with room for `capacity` tokens each."""
    cache = init_cache(program.config, rows, capacity, program.dtype, program.chunk)
    return Rows(cache, jnp.zeros((rows, program.config.embed_dim), program.dtype))


@functools.partial(jax.jit, static_argnames=("program", "slots", "capacity", "stop_ids", "penalty"))
def empty_slots(program: Program, slots: int, capacity: int, stop_ids: int, penalty: bool) -> Slots:
    """Free slots."""
    zeros = lambda dtype: jnp.zeros(slots, dtype)
    types = Settings(jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32, jnp.float32)
    return Slots(
        cache=empty_rows(program, slots, capacity).cache,
        last=zeros(jnp.int32), drawn=zeros(jnp.int32), left=zeros(jnp.int32),
        settings=Settings(*map(zeros, types)),
        stop_ids=jnp.full((slots, stop_ids), -1, jnp.int32),
        seen=jnp.zeros((slots, program.config.vocab_size), bool) if penalty else None,
    )  # fmt: skip


def _put(into: Tree, rows: Tree, source: jax.Array, target: jax.Array) -> Tree:
    """Row source[i] of each array of `rows` becomes row target[i] of `into`, which may be longer along its other axes as well.

    What is past the end of the shorter one is kept: caches say by their lengths what is not to be read.
    """

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[(target, *map(slice, part.shape[1:]))].set(part[source], mode="drop")

    return jax.tree.map(put, into, rows)


@functools.partial(jax.jit, donate_argnums=0)
def put_rows(into: Tree, rows: Tree, source: jax.Array, target: jax.Array) -> Tree:
    """See `_put`."""
    return _put(into, rows, source, target)


@functools.partial(jax.jit, static_argnames=("program", "capacity"))
def take_row(program: Program, cache: DecoderCache, row: jax.Array, capacity: int) -> DecoderCache:
    """A row as a cache of its own, with room for `capacity` tokens; it must have no more."""
    like = jax.eval_shape(functools.partial(empty_rows, program, 1, capacity)).cache

    def take(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(array, row, 1)
        return one[tuple(map(slice, like.shape))]

    return jax.tree.map(take, cache, like)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="rows")
def prefill(
    program: Program, params: Tree, buffers: Tree, rows: Rows, tokens: Tokens, segment_ids: SegmentIds
) -> tuple[Rows, jax.Array | None]:
    """Reads the next tokens of each row; segment_ids: 1 for a token, 0 for padding. Returns the rows, and the experts of the
    tokens if the program tells them."""
    model = program.functions.bind(params, buffers)
    output = model(tokens, segment_ids, cache=rows.cache)
    # The last token of each row, on whichever side its padding is.
    last = tokens.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
    hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
    rows = Rows(output.cache, jnp.where(jnp.any(segment_ids != 0, axis=1)[:, None], hidden, rows.hidden))
    return rows, output.routing.astype(jnp.int16) if program.tell_routing else None


def _choose(
    program: Program, model: Decoder, hidden: jax.Array, slots: Slots, needs: Needs, top: int, tell: Tell
) -> tuple[Slots, Chosen]:
    """The next token of every slot that is not free."""
    logits = model.logits(hidden[:, None])[:, 0]
    tokens, chosen_by = choose(logits, slots.settings, slots.drawn, slots.seen, needs, program.known)
    log_probs = jax.nn.log_softmax(logits, axis=1)
    active = slots.left > 0
    of_tokens = lambda log_probs: jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
    drawn_log_probs = None
    if tell.drawn:
        learnt_at = jnp.where(active & (slots.settings.temperature == 0), slots.settings.greedy_as, 1.0)
        drawn_log_probs = of_tokens(jax.nn.log_softmax(chosen_by / learnt_at[:, None], axis=1))
    kept = packed(chosen_by > -jnp.inf) if tell.kept else None
    of_known = log_probs[:, : program.known]
    top_log_probs, top_ids = jax.lax.top_k(of_known, top) if top else (logits[:, :0], tokens[:, None][:, :0])
    stopped = jnp.any(slots.stop_ids == tokens[:, None], axis=1)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].max(active)
    slots = slots._replace(
        last=jnp.where(active, tokens, slots.last),
        drawn=slots.drawn + active.astype(jnp.int32),
        left=jnp.where(active & ~stopped, slots.left - 1, 0),
        seen=seen,
    )
    tokens_or_none = jnp.where(active, tokens, -1)
    return slots, Chosen(tokens_or_none, of_tokens(log_probs), top_ids, top_log_probs, drawn_log_probs, kept)


@functools.partial(jax.jit, static_argnames=("program", "needs", "top", "tell"), donate_argnames="slots")
def insert(
    program: Program, params: Tree, buffers: Tree, slots: Slots, rows: Rows, source: jax.Array, target: jax.Array, entry: Entry,
    *, needs: Needs, top: int, tell: Tell = NOTHING_ELSE,
) -> tuple[Slots, Chosen]:  # fmt: skip
    """Gives the slots target[i] what row source[i] has read, and chooses the first token of each.

    Args:
      source, target: [entries] int32; an entry whose target is past the end is padding.
      needs: of these requests. top: how many of the most likely tokens are told. tell: what else is.
    Returns:
      The slots, and the token of each entry.
    """
    model = program.functions.bind(params, buffers)
    entering = Slots(
        cache=jax.tree.map(lambda array: array[source], rows.cache), last=jnp.zeros_like(entry.left),
        drawn=jnp.zeros_like(entry.left), left=entry.left, settings=entry.settings, stop_ids=entry.stop_ids, seen=entry.seen,
    )  # fmt: skip
    entering, chosen = _choose(program, model, rows.hidden[source], entering, needs, top, tell)
    return _put(slots, entering, jnp.arange(source.shape[0]), target), chosen


def _filled(cache: DecoderCache, reach: int) -> DecoderCache:
    """The first `reach` places for keys and values of each row. A row of no more tokens has all of its own there."""
    cut = lambda state: AttentionState(state.keys[:, :, :, :reach], state.values[:, :, :reach])
    return cache._replace(layers=tuple(cut(state) if isinstance(state, AttentionState) else state for state in cache.layers))


@functools.partial(jax.jit, static_argnames=("program", "steps", "reach", "needs", "top", "tell"), donate_argnames="slots")
def decode(
    program: Program, params: Tree, buffers: Tree, slots: Slots, keep: jax.Array, until_free: jax.Array,
    *, steps: int, reach: int, needs: Needs, top: int, tell: Tell = NOTHING_ELSE,
) -> tuple[Slots, Chosen]:  # fmt: skip
    """Advances all slots by up to `steps` tokens, until none is left or, with `until_free`, one has got its last.

    Args:
      keep: [slots] bool; the others become free first. until_free: bool, whether somebody waits for a slot.
      reach: tokens that a row has at the end, at most. The places behind are not read: those of a long answer to come, perhaps.
      needs: of the requests in the slots. top: how many of the most likely tokens are told. tell: what else is.
    """
    whole = slots.cache
    slots = slots._replace(left=jnp.where(keep, slots.left, 0), cache=_filled(whole, reach))
    count, at_first = slots.left.shape[0], jnp.sum(slots.left > 0)
    out = Chosen(
        tokens=jnp.full((steps, count), -1, jnp.int32), log_probs=jnp.zeros((steps, count), jnp.float32),
        top_ids=jnp.zeros((steps, count, top), jnp.int32), top_log_probs=jnp.zeros((steps, count, top), jnp.float32),
        drawn_log_probs=jnp.zeros((steps, count), jnp.float32) if tell.drawn else None,
        kept=jnp.zeros((steps, count, -(-program.config.vocab_size // 32)), jnp.uint32) if tell.kept else None,
        routing=jnp.zeros((steps, count, *program.config.routing_shape), jnp.int16) if program.tell_routing else None,
    )  # fmt: skip

    def unfinished(carry: tuple[jax.Array, Slots, Chosen]) -> jax.Array:
        step, slots, _ = carry
        active = jnp.sum(slots.left > 0)
        return (step < steps) & (active > 0) & ~(until_free & (active < at_first))

    def advance(carry: tuple[jax.Array, Slots, Chosen]) -> tuple[jax.Array, Slots, Chosen]:
        step, slots, out = carry
        # Tied to the step: or XLA would turn eight bits into floats before the loop, and read those in each step.
        bound, _ = jax.lax.optimization_barrier((params, step))
        model = program.functions.bind(bound, buffers)
        active = (slots.left > 0).astype(jnp.int32)
        output = model(slots.last[:, None], active[:, None], cache=slots.cache)
        slots, chosen = _choose(program, model, output.hidden[:, 0], slots._replace(cache=output.cache), needs, top, tell)
        if program.tell_routing:
            chosen = chosen._replace(routing=output.routing[:, 0].astype(jnp.int16))
        return step + 1, slots, jax.tree.map(lambda all, one: all.at[step].set(one), out, chosen)

    _, slots, out = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), slots, out))
    put_back = lambda array, part: jax.lax.dynamic_update_slice(array, part, (0,) * array.ndim)
    return slots._replace(cache=jax.tree.map(put_back, whole, slots.cache)), out
