"""Grouped-query attention in plain JAX: the specification of every kernel, what GPUs compute, and the same in a CPU's layouts."""

import jax
import jax.numpy as jnp

from lfm_jax.arrays import Mask


def attention_reference(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
    """Softmax attention where heads share keys and values in groups; the softmax is in float32.

    Args:
      query: [batch, queries, heads, head_dim]; key, value: [batch, keys, kv_heads, head_dim].
      mask: [batch, queries, keys]. A row without any True (a padding position) attends evenly, which nothing reads.
    Returns:
      [batch, queries, heads, head_dim].
    """
    batch, queries, heads, head_dim = query.shape
    grouped = query.reshape(batch, queries, key.shape[2], -1, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(batch, queries, heads, head_dim)


def attention_by_rows(query: jax.Array, keys: jax.Array, values: jax.Array, mask: Mask) -> jax.Array:
    """`attention_reference` over a cache, or on a CPU, in layouts that products read straight through.

    With [keys, head_dim] for the keys as well, XLA on CPUs takes nine times as long for the scores of few rows, and two to three
    times as long for a layer's training (docs/log.md, 2026-11-26). The largest score has no gradient: it cancels out.

    Args:
      query: [batch, queries, heads, head_dim]; keys: [batch, kv_heads, head_dim, keys];
      values: [batch, kv_heads, keys, head_dim].
      mask: [batch, queries, keys].
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    rows = query.reshape(batch, queries, kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkrd,bkds->bkrs", rows, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    visible = jnp.repeat(mask, heads // kv_heads, axis=1)[:, None]
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bkrs,bksd->bkrd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)
    out = out.reshape(batch, kv_heads, queries, -1, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, head_dim)
