"""The model accounts for itself: parameters, FLOPs, cache and bytes read.

Everything that reports a size or a speed (model FLOPs utilization, the parameter audit, planners, rooflines) reads it here; how
each figure is counted is said once more for readers in docs/numbers.md.
"""

import math

import jax

from lfm_jax.models.cache import CacheBytes
from lfm_jax.models.config import ModelConfig
from lfm_jax.models.decoder import Decoder
from lfm_jax.models.functional import Tree, functional
from lfm_jax.models.operators import OPERATORS

GROUPS = ("embeddings", "operators", "feed_forward", "norms")


def parameter_group(path: tuple) -> str:
    """The one of `GROUPS` that the parameter at a path of the tree belongs to."""
    names = [key.key for key in path]
    if names[-1] == "scale":
        return "norms"
    if names[0] in ("embed", "lm_head"):
        return "embeddings"
    return "operators" if "operator" in names else "feed_forward"


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
        groups[parameter_group(path)] += math.prod(leaf.shape)
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
        OPERATORS[kind].flops_per_token(config, seq, causal) + _feed_forward_flops(config, index)
        for index, kind in enumerate(config.layer_types)
    )
    return blocks + 2 * config.embed_dim * config.vocab_size


def training_flops_per_token(config: ModelConfig, seq: int, *, causal: bool = True) -> float:
    """Model FLOPs of a training step per token: a backward pass is two forward passes; recomputation is not counted."""
    return 3 * forward_flops_per_token(config, seq, causal=causal)


def cache_bytes(config: ModelConfig, bytes_per_value: float = 2) -> CacheBytes:
    """What decoding keeps for each sequence, at `bytes_per_value` (2: bfloat16)."""
    each = [OPERATORS[kind].cache_bytes(config, bytes_per_value) for kind in config.layer_types]
    return CacheBytes(*map(sum, zip(*each, strict=True)))


def decode_bytes_per_token(config: ModelConfig, context: int, weight_bytes: float = 2, cache_value_bytes: float = 2) -> float:
    """Bytes that decoding one token must read: the active weights once, and the sequence's cache.

    Tied models read the embedding once, for the logits; untied ones need a single row of it, which counts as nothing.
    """
    idle = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    cache = cache_bytes(config, cache_value_bytes).total(context, config.sliding_window)
    return (active_parameter_count(config) - idle) * weight_bytes + cache

