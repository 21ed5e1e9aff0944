"""What mixes tokens in a block.

A new operator is one file with a class like `Operator`, its name in `lfm_jax.models.config.LayerType`, and one line here.
"""

from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden
from lfm_jax.models.attention import Attention, SlidingAttention
from lfm_jax.models.cache import CacheBytes, DecoderCache
from lfm_jax.models.config import ComputeConfig, LayerType, ModelConfig
from lfm_jax.models.context import Context
from lfm_jax.models.short_conv import ShortConv


class Operator(Protocol):
    """What the decoder, its cache and its accounting ask of an operator, which is an `nnx.Module`."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, residual_gain: float, rngs: nnx.Rngs):
        """residual_gain: multiplies the initial scale of the projection that joins the residual stream."""

    def __call__(self, x: Hidden, context: Context, state: Any) -> tuple[Hidden, Any]:
        """The mixed tokens, and the continued state, which is None where none was given."""

    @classmethod
    def init_state(cls, config: ModelConfig, batch: int, capacity: int, call: int, dtype: jnp.dtype) -> Any:
        """What a row remembers before its first token, a pytree of arrays.

        capacity: the most tokens that it will be given; call: the most of them in one call.
        """

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq: int, causal: bool) -> float:
        """Of the forward pass, for a token of a sequence of `seq`; see `lfm_jax.models.accounting`."""

    @classmethod
    def cache_bytes(cls, config: ModelConfig, bytes_per_value: float) -> CacheBytes:
        """What one sequence's state takes."""


OPERATORS: dict[LayerType, type[Operator]] = {
    "conv": ShortConv,
    "full_attention": Attention,
    "sliding_attention": SlidingAttention,
}


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, call: int | None = None) -> DecoderCache:
    """An empty cache with room for `capacity` tokens a row, given in calls of at most `call` of them (None: any number).

    Tokens beyond the capacity overwrite the first ones, and a traced program cannot say so: whoever decodes checks the length.
    """
    call = capacity if call is None else call
    layers = tuple(OPERATORS[kind].init_state(config, batch, capacity, call, dtype) for kind in config.layer_types)
    return DecoderCache(lengths=jnp.zeros(batch, jnp.int32), layers=layers)
