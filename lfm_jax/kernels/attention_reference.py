"""Grouped-query attention in plain JAX: the specification of every kernel, and what CPUs and GPUs compute."""

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
