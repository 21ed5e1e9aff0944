"""The language model: embedding, blocks, final norm, logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden, Logits, Positions, SegmentIds, Tokens
from lfm_jax.kernels import ATTENDED
from lfm_jax.models.cache import DecoderCache
from lfm_jax.models.config import ComputeConfig, ModelConfig
from lfm_jax.models.context import Context, cached_context, training_context
from lfm_jax.models.layers import MLP, PROJECTED, Embedding, RMSNorm, compute_dtype, parameter
from lfm_jax.models.moe import MoE, Routed
from lfm_jax.models.operators import OPERATORS
from lfm_jax.models.repeats import in_loops, in_turn
from lfm_jax.models.rounding import rounding_in
from lfm_jax.sharding import constrain

REMAT_POLICIES = {"dots": jax.checkpoint_policies.save_only_these_names(PROJECTED, ATTENDED), "full": None}


class DecoderOutput(NamedTuple):
    """hidden: [batch, seq, embed] after the final norm; cache: the continued cache, or None; router_counts: tokens that chose
    each expert, [moe layers, experts] float32, or None for a dense model; routing: the experts that the routers chose for each
    token, [batch, seq, moe layers, top_k] int32, or None."""

    hidden: Hidden
    cache: DecoderCache | None
    router_counts: jax.Array | None
    routing: jax.Array | None = None


class Block(nnx.Module):
    """h + operator(norm(h)), then h + feed_forward(norm(h)); LFM3 norms each branch once more before it joins."""

    def __init__(self, config: ModelConfig, index: int, compute: ComputeConfig, *, rngs: nnx.Rngs):
        dtype = compute_dtype(compute)
        # Two branches a block join the residual; dividing each by sqrt(2 * depth) keeps its variance (GPT-2's rule).
        gain = (2 * config.num_layers) ** -0.5
        norm = lambda: RMSNorm(config.embed_dim, config.norm_eps, axis="embed")
        self.operator_norm, self.ffn_norm = norm(), norm()
        if config.sandwich_norms:
            self.post_operator_norm, self.post_ffn_norm = norm(), norm()
        self.operator = OPERATORS[config.layer_types[index]](config, compute, residual_gain=gain, rngs=rngs)
        if config.is_moe_layer(index):
            self.moe = MoE(config.embed_dim, config.moe, compute, residual_gain=gain, rngs=rngs)
        else:
            self.mlp = MLP(config.embed_dim, config.mlp_dim, residual_gain=gain, dtype=dtype, matmul=compute.matmul, rngs=rngs)
        self.routed = config.is_moe_layer(index)
        self.sandwich = config.sandwich_norms

    def __call__(self, hidden: Hidden, context: Context, state: Any, replayed: jax.Array | None = None):
        """Returns (hidden, state, `Routed` or None). replayed: see `MoE.route`."""
        branch, state = self.operator(self.operator_norm(hidden), context, state)
        hidden = hidden + (self.post_operator_norm(branch) if self.sandwich else branch)
        hidden = constrain(hidden, ("batch", "seq", None))
        normed, routed = self.ffn_norm(hidden), None
        if self.routed:
            valid = None if context.segment_ids is None else context.segment_ids != 0
            branch, routed = self.moe(normed, valid, replayed)
        else:
            branch = self.mlp(normed)
        hidden = hidden + (self.post_ffn_norm(branch) if self.sandwich else branch)
        return constrain(hidden, ("batch", "seq", None)), state, routed


class Decoder(nnx.Module):
    """A causal hybrid language model.

    Call it on packed or padded sequences for training, or with a cache to continue one sequence a row.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig = ComputeConfig(), *, rngs: nnx.Rngs):
        dtype = compute_dtype(compute)
        self.embed = Embedding(config.vocab_size, config.embed_dim, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, index, compute, rngs=rngs) for index in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, axis="embed")
        if not config.tie_embeddings:
            self.lm_head = parameter(rngs, (config.embed_dim, config.vocab_size), ("embed", "vocab"), config.embed_dim, dtype)
        for path, node in nnx.iter_graph(self):
            if isinstance(node, nnx.Param):
                rounding = rounding_in(compute.file_format, path[-1], node.axes, node.shape, config.tie_embeddings)
                node.set_metadata(rounding=rounding)
        self.config = config
        self.dtype = dtype
        self.remat = compute.remat
        self.scan = compute.scan_layers

    def __call__(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        cache: DecoderCache | None = None,
        routing: jax.Array | None = None,
    ) -> DecoderOutput:
        """Hidden states of every position.

        Args:
          tokens: [batch, seq] int32.
          segment_ids: documents of a packed row, numbered from 1; 0 is padding. With a cache: 1 for a token, 0 for padding on
            either side. None: every position is a token of one document.
          positions: position of each token in its document; None: 0, 1, 2, ... from the row's start. Not allowed with a cache,
            which knows them.
          cache: continue these sequences. The padding enters neither keys nor convolution windows.
          routing: the experts that each token goes to, whatever the routers choose, as `DecoderOutput.routing` has them, any type
            of integers; a token whose experts are negative goes as they choose. Not with a cache.

        Raises:
          ValueError: positions and cache are both given, or packed segments come without positions; or there is a routing with a
            cache, or one that is not of this model.
        """
        if routing is not None:
            self._check(routing, tokens)
        if cache is not None:
            if positions is not None:
                raise ValueError("positions are known from the cache; give one or the other")
            if routing is not None:
                raise ValueError("a routing is replayed in whole sequences; leave it out where a cache is continued")
            return self._continue(tokens, segment_ids, cache)
        if positions is None:
            if segment_ids is not None:
                raise ValueError("segment_ids without positions: packed documents need positions that restart with each of them")
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        hidden, _, *routed = self._blocks(tokens, training_context(self.config, segment_ids, positions), None, routing)
        return DecoderOutput(hidden, None, *routed)

    def _check(self, routing: jax.Array, tokens: Tokens) -> None:
        if self.config.routing_shape is None:
            raise ValueError("there is a routing, but no block of this model is a mixture of experts; leave it out")
        expected = (*tokens.shape, *self.config.routing_shape)
        if routing.shape != expected:
            raise ValueError(f"routing must be [batch, seq, moe layers, top_k], here {expected}, got {routing.shape}")

    @property
    def head(self) -> jax.Array:
        """[vocab, embed], in the type that it is multiplied in."""
        weight = self.embed.embedding[...] if self.config.tie_embeddings else self.lm_head[...].T
        return weight.astype(self.dtype)

    def logits(self, hidden: Hidden) -> Logits:
        """Scores of the next token over all rows of the vocabulary, [..., vocab] float32; padded rows included."""
        return jnp.tensordot(hidden, self.head, (-1, -1), preferred_element_type=jnp.float32)

    def _blocks(self, tokens: Tokens, context: Context, cache: DecoderCache | None, routing: jax.Array | None = None):
        """Returns (hidden, states, router counts, routing), see `DecoderOutput`."""
        states = []

        def apply(block: Block, hidden: Hidden, replayed: jax.Array | None) -> tuple[Hidden, Routed | None]:
            call = block if self.remat == "none" else jax.checkpoint(block.__call__, policy=REMAT_POLICIES[self.remat])
            hidden, state, routed = call(hidden, context, None if cache is None else cache.layers[len(states)], replayed)
            states.append(state)
            return hidden, routed

        hidden, replayed = self.embed(tokens), [None] * len(self.layers)
        if routing is not None:
            of_each = iter(jnp.moveaxis(routing.astype(jnp.int32), 2, 0))
            replayed = [next(of_each) if block.routed else None for block in self.layers]
        if self.scan and cache is None:
            kinds = [(kind, self.config.is_moe_layer(index)) for index, kind in enumerate(self.config.layer_types)]
            hidden, told = in_loops(self.layers, replayed, kinds, apply, hidden)
        else:
            hidden, told = in_turn(self.layers, replayed, apply, hidden)
        counts = jnp.stack([routed.counts for routed in told]) if told else None
        chosen = jnp.stack([routed.experts for routed in told], axis=2) if told else None
        return self.final_norm(hidden), tuple(states), counts, chosen

    def _continue(self, tokens: Tokens, segment_ids: SegmentIds | None, cache: DecoderCache) -> DecoderOutput:
        """Moves each row's tokens to its front, so that padding stands behind them, and the outputs back again."""
        if segment_ids is None or tokens.shape[1] == 1:
            order, valid = None, jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
        else:
            order = jnp.argsort(segment_ids == 0, axis=1, stable=True)
            tokens = jnp.take_along_axis(tokens, order, axis=1)
            valid = jnp.take_along_axis(segment_ids != 0, order, axis=1)
        context = cached_context(self.config, valid, cache)
        hidden, states, counts, routing = self._blocks(tokens, context, cache)
        if order is not None:
            back = jnp.argsort(order, axis=1)[:, :, None]
            hidden = jnp.take_along_axis(hidden, back, axis=1)
            routing = None if routing is None else jnp.take_along_axis(routing, back[..., None], axis=1)
        return DecoderOutput(hidden, DecoderCache(cache.lengths + context.new_lengths, states), counts, routing)
