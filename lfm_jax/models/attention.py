"""Grouped-query attention with a norm on queries and keys."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden
from lfm_jax.kernels import attention, attention_by_rows
from lfm_jax.models.cache import AttentionState, CacheBytes
from lfm_jax.models.config import ComputeConfig, ModelConfig
from lfm_jax.models.context import Context
from lfm_jax.models.layers import RMSNorm, apply_rope, compute_dtype, parameter, project
from lfm_jax.sharding import constrain, target_platform


def _stored(state: AttentionState, key: jax.Array, value: jax.Array, slots: jax.Array) -> AttentionState:
    """With the keys and values of new tokens, [batch, seq, kv_heads, head_dim], in their slots."""
    if slots.size == 1 and target_platform() == "cpu":
        # Where there is but one place, XLA writes it as a slice, into two copies of the cache: one to keep, one to read. A second
        # place, past the end, makes it write in place.
        twice = lambda array, rest: jnp.concatenate([array, jnp.full_like(array, rest)], axis=1)
        key, value, slots = twice(key, 0), twice(value, 0), twice(slots, state.values.shape[2])
    rows = jnp.arange(key.shape[0])[:, None]
    # Padding has a slot past the end, and "drop" leaves the cache as it was there.
    keys = state.keys.at[rows, :, :, slots].set(key.astype(state.keys.dtype), mode="drop")
    values = state.values.at[rows, :, slots].set(value.astype(state.values.dtype), mode="drop")
    sharded = lambda cached: constrain(cached, ("batch", "kv_heads", None, None))
    return AttentionState(sharded(keys), sharded(values))


class Attention(nnx.Module):
    """Attention of one block: RMSNorm over each head of q and k, rotation, softmax, and (LFM3) a sigmoid gate per head.

    kind: whose mask and rotation it takes from the context.
    """

    kind: ClassVar[str] = "full_attention"

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, residual_gain: float, rngs: nnx.Rngs):
        embed, heads, kv_heads, head_dim = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        dtype = compute_dtype(compute)
        self.q_proj = parameter(rngs, (embed, heads, head_dim), ("embed", "heads", None), embed, dtype)
        self.k_proj = parameter(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", None), embed, dtype)
        self.v_proj = parameter(rngs, (embed, kv_heads, head_dim), ("embed", "kv_heads", None), embed, dtype)
        out_axes, fan_in = ("heads", None, "embed"), heads * head_dim
        self.out_proj = parameter(rngs, (heads, head_dim, embed), out_axes, fan_in, dtype, residual_gain)
        self.q_norm = RMSNorm(head_dim, config.norm_eps)
        self.k_norm = RMSNorm(head_dim, config.norm_eps)
        if config.attention_gate:
            self.gate_proj = parameter(rngs, (embed, heads), ("embed", "heads"), embed, dtype)
        self.gated = config.attention_gate
        self.sliding_window = self.window(config)
        self.implementation = compute.attention
        self.matmul = compute.matmul
        self.dtype = dtype

    def __call__(self, x: Hidden, context: Context, state: AttentionState | None) -> tuple[Hidden, AttentionState | None]:
        heads = lambda weight: project(x, weight[...].astype(self.dtype), matmul=self.matmul)
        phases = context.rope[self.kind]
        query = constrain(apply_rope(self.q_norm(heads(self.q_proj)), phases), ("batch", "seq", "heads", None))
        key = constrain(apply_rope(self.k_norm(heads(self.k_proj)), phases), ("batch", "seq", "kv_heads", None))
        value = constrain(heads(self.v_proj), ("batch", "seq", "kv_heads", None))
        if state is not None:
            state = _stored(state, key, value, context.slots[self.kind])
            key, value = state.keys.astype(self.dtype), state.values.astype(self.dtype)
            out = attention_by_rows(query, key, value, context.masks[self.kind])
        else:
            out = attention(
                query, key, value, context.masks[self.kind], context.segment_ids,
                window=self.sliding_window, implementation=self.implementation,
            )  # fmt: skip
        if self.gated:
            gate = jax.nn.sigmoid(project(x, self.gate_proj[...].astype(self.dtype)).astype(jnp.float32))
            out = out * gate[..., None].astype(self.dtype)
        return project(out, self.out_proj[...].astype(self.dtype), 2, matmul=self.matmul), state

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """Positions that a query sees at most, itself included; None: all before it."""
        return None

    @classmethod
    def init_state(cls, config: ModelConfig, batch: int, capacity: int, call: int, dtype: jnp.dtype) -> AttentionState:
        """No token yet, and room for `capacity`, or for what a call's first token still sees once all of them are stored."""
        window = cls.window(config)
        slots = capacity if window is None else min(capacity, window + call - 1)
        heads, width = config.num_kv_heads, config.head_dim
        return AttentionState(jnp.zeros((batch, heads, width, slots), dtype), jnp.zeros((batch, heads, slots, width), dtype))

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq: int, causal: bool) -> float:
        """The projections, and two products with the keys that an average query sees (not causal: with every key)."""
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        gate = config.num_heads if config.attention_gate else 0
        reach = min(cls.window(config) or seq, seq)
        visible = reach - reach * (reach - 1) / (2 * seq) if causal else seq
        return 2 * config.embed_dim * (2 * query + 2 * key + gate) + 4 * query * visible

    @classmethod
    def cache_bytes(cls, config: ModelConfig, bytes_per_value: float) -> CacheBytes:
        """A key and a value for each token, or for each of the window."""
        token, window = 2 * config.num_kv_heads * config.head_dim * bytes_per_value, cls.window(config)
        return CacheBytes(per_token=token) if window is None else CacheBytes(windows=token * window)


class SlidingAttention(Attention):
    """The same over the last `sliding_window` positions, with a rotation of its own."""

    kind = "sliding_attention"

    @classmethod
    def window(cls, config: ModelConfig) -> int | None:
        """See `Attention.window`."""
        return config.sliding_window
