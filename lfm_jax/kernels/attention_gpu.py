"""cuDNN's flash attention through `jax.nn.dot_product_attention`, for NVIDIA GPUs.

On an H200 it is `attention_reference` to the rounding of bfloat16, in both directions, at up to 57 % of what the device can do
(docs/benchmarks/kernels.md). Tests, which need no GPU, see that it is lowered to cuDNN's call, and that XLA's implementation of
the same call, with the same arguments, is `attention_reference`.

The public call knows no segments, so that packed rows bring their mask as a bias: [batch, seq, seq] values of the query's type,
and as many again for a gradient of it that jax asks of cuDNN (33.5 MB each for a row of 4,096, 2.1 GB for one of 32,768), where
XLA alone has scores of that size for every head. Blocks above the diagonal are skipped, those between documents are not.
"""

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from lfm_jax.arrays import Mask


def takes(query: jax.Array) -> bool:
    """Whether cuDNN has a kernel for a query of [batch, seq, heads, head_dim], forward and backward, on Ampere and later."""
    return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[1] % 2 == 0 and query.shape[3] in range(8, 129, 8)


def available() -> bool:
    """Whether the default devices are NVIDIA's; JAX calls those of AMD "gpu" as well."""
    return "cuda" in get_backend().platform_version


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, *, window: int | None
) -> jax.Array:
    """Causal attention as `attention_reference`; sequences in their order.

    Args:
      query: [batch, seq, heads, head_dim]; key, value: [batch, seq, kv_heads, head_dim], bfloat16 or float16.
      mask: [batch, seq, seq], window included; None: each row is one document, and no mask is read from memory.
      window: positions that a query sees at most, itself included; None: all before it.
    Returns:
      [batch, seq, heads, head_dim].
    """
    windowed = mask is None and window is not None  # cuDNN may have no kernel for a bias and a window at once
    return jax.nn.dot_product_attention(
        query, key, value, mask=None if mask is None else mask[:, None], is_causal=True,
        local_window_size=(window - 1, 0) if windowed else None, implementation="cudnn",
    )  # fmt: skip
