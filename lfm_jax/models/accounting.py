"""The model accounts for itself: parameters, FLOPs, cache and bytes read.

Everything that reports a size or a speed (model FLOPs utilization, the parameter audit, planners, rooflines) reads it here; how
each figure is counted is said once more for readers in docs/numbers.md.
"""

import dataclasses
import math

import jax

from lfm_jax.models.config import ModelConfig
from lfm_jax.models.decoder import Decoder
from lfm_jax.models.functional import Tree, functional

GROUPS = ("embeddings", "operators", "feed_forward", "norms")


def _group(path: tuple) -> str:
    names = [key.key for key in path]
    if names[-1] == "scale":
        return "norms"
    if names[0] in ("embed", "lm_head"):
        return "embeddings"
    return "operators" if names[2] in ("conv", "attention") else "feed_forward"


def abstract_params(config: ModelConfig) -> Tree:
    """Shapes of the trainable parameters; nothing is allocated."""
    return functional(lambda rngs: Decoder(config, rngs=rngs)).abstract_params


def parameter_groups(config: ModelConfig) -> dict[str, int]:
    """Trainable parameters by group: embeddings (the logits' matrix included), operators, feed_forward, norms.

    Every parameter belongs to one group, so the groups add up to the model. A router's expert bias carries no gradient and is
    not a parameter.
    """
    groups = dict.fromkeys(GROUPS, 0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]:
        groups[_group(path)] += math.prod(leaf.shape)
    return groups


def parameter_count(config: ModelConfig) -> int:
    """All trainable parameters."""
    return sum(parameter_groups(config).values())


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token uses: of the experts, only those it is routed to."""
    if config.moe is None:
        return parameter_count(config)
    idle = config.moe.num_experts - config.moe.experts_per_token
    routed = sum(config.is_moe_layer(index) for index in range(config.num_layers))
    return parameter_count(config) - routed * idle * 3 * config.embed_dim * config.moe.mlp_dim


def _mean_visible(seq: int, window: int | None) -> float:
    """Keys an average query of a causal sequence sees, itself included."""
    reach = seq if window is None else min(window, seq)
    return reach - reach * (reach - 1) / (2 * seq)


def _operator_flops(config: ModelConfig, kind: str, seq: int, causal: bool) -> float:
    embed = config.embed_dim
    if kind == "conv":
        # in_proj and out_proj; then B * x, the taps (a product and a sum each) and C * the sum, a channel each.
        return 2 * embed * 3 * embed + 2 * embed * embed + embed * (2 * config.conv_width + 2)
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = 2 * embed * (2 * query + 2 * key) + (2 * embed * config.num_heads if config.attention_gate else 0)
    window = config.sliding_window if kind == "sliding_attention" else None
    visible = _mean_visible(seq, window) if causal else seq
    return projections + 4 * query * visible


def _feed_forward_flops(config: ModelConfig, index: int) -> float:
    if not config.is_moe_layer(index):
        return 6 * config.embed_dim * config.mlp_dim
    router = 2 * config.embed_dim * config.moe.num_experts
    return router + 6 * config.embed_dim * config.moe.mlp_dim * config.moe.experts_per_token


def forward_flops_per_token(config: ModelConfig, seq: int, *, causal: bool = True) -> float:
    """FLOPs of the forward pass per token of a sequence of `seq` tokens, logits included.

    A multiply-add is two. Attention counts the keys a causal query sees (`causal=False`: the full square, the older
    convention), a sliding window its window, a mixture of experts the experts a token uses. Norms, rotations and the softmax are
    left out, as is usual; the embedding look-up costs none.
    """
    blocks = sum(
        _operator_flops(config, kind, seq, causal) + _feed_forward_flops(config, index)
        for index, kind in enumerate(config.layer_types)
    )
    return blocks + 2 * config.embed_dim * config.vocab_size


def training_flops_per_token(config: ModelConfig, seq: int, *, causal: bool = True) -> float:
    """Model FLOPs of a training step per token: a backward pass is two forward passes; recomputation is not counted."""
    return 3 * forward_flops_per_token(config, seq, causal=causal)


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """per_token: growth with each token, full attention; windows: the most that sliding attention holds; constant: convolutions."""

    per_token: float
    windows: float
    constant: float

    def total(self, context: int, window: int | None) -> float:
        """Bytes of one sequence at `context` tokens."""
        filled = 1.0 if window is None else min(1.0, context / window)
        return self.per_token * context + self.windows * filled + self.constant


def cache_bytes(config: ModelConfig, bytes_per_value: float = 2) -> CacheBytes:
    """What decoding keeps for each sequence, at `bytes_per_value` (2: bfloat16)."""
    key_value = 2 * config.num_kv_heads * config.head_dim * bytes_per_value
    kinds = [config.layer_types.count(kind) for kind in ("full_attention", "sliding_attention", "conv")]
    return CacheBytes(
        per_token=kinds[0] * key_value,
        windows=kinds[1] * key_value * (config.sliding_window or 0),
        constant=kinds[2] * (config.conv_width - 1) * config.embed_dim * bytes_per_value,
    )


def decode_bytes_per_token(config: ModelConfig, context: int, weight_bytes: float = 2, cache_value_bytes: float = 2) -> float:
    """Bytes that decoding one token must read: the active weights once, and the sequence's cache.

    Tied models read the embedding once, for the logits; untied ones need a single row of it, which counts as nothing.
    """
    idle = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    cache = cache_bytes(config, cache_value_bytes).total(context, config.sliding_window)
    return (active_parameter_count(config) - idle) * weight_bytes + cache

