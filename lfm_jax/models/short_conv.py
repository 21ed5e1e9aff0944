"""The double-gated short convolution: out_proj(C * conv(B * x)) with B, C and x projected from the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden
from lfm_jax.kernels import short_conv
from lfm_jax.models.cache import CacheBytes, ConvState
from lfm_jax.models.config import ComputeConfig, ModelConfig
from lfm_jax.models.context import Context
from lfm_jax.models.layers import compute_dtype, parameter, project
from lfm_jax.sharding import constrain


def _last_window(state: ConvState, bcx: jax.Array, new_lengths: jax.Array) -> ConvState:
    """The window after row r's first new_lengths[r] positions; the padding behind them never enters it."""
    size = state.window.shape[1]
    index = new_lengths[:, None] - size + jnp.arange(size)[None, :]
    at = jnp.maximum(index, 0)[:, :, None]
    fresh = jnp.take_along_axis(bcx[0], at, axis=1) * jnp.take_along_axis(bcx[2], at, axis=1)
    kept = jnp.take_along_axis(state.window, jnp.clip(index + size, 0, size - 1)[:, :, None], axis=1)
    return ConvState(jnp.where((index >= 0)[:, :, None], fresh.astype(kept.dtype), kept))


class ShortConv(nnx.Module):
    """Token mixing of a conv block (LFM2; transformers `Lfm2ShortConv`)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, residual_gain: float, rngs: nnx.Rngs):
        embed, channels, width = config.embed_dim, config.embed_dim, config.conv_width
        dtype = compute_dtype(compute)
        self.in_proj = parameter(rngs, (embed, 3, channels), ("embed", None, "channels"), embed, dtype)
        # The default of torch's Conv1d: uniform within 1 / sqrt(fan_in), and the fan-in of a depthwise tap row is its width.
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.kernel = nnx.Param(taps, axes=(None, "channels"))
        self.out_proj = parameter(rngs, (channels, embed), ("channels", "embed"), channels, dtype, residual_gain)
        if config.conv_bias:
            self.in_bias = nnx.Param(jnp.zeros((3, channels)), axes=(None, "channels"))
            self.kernel_bias = nnx.Param(jnp.zeros(channels), axes=("channels",))
            self.out_bias = nnx.Param(jnp.zeros(embed), axes=("embed",))
        self.biased = config.conv_bias
        self.implementation = compute.short_conv
        self.matmul = compute.matmul
        self.dtype = dtype

    def __call__(self, x: Hidden, context: Context, state: ConvState | None) -> tuple[Hidden, ConvState | None]:
        # The three parts on the leading axis: the matmul writes them apart, and no slice of a wider array is ever copied. An
        # einsum to "pbsc" says the same, but TPUs get a slower matmul for it (docs/benchmarks/short_conv.md).
        bcx = project(x, self.in_proj[...].astype(self.dtype), matmul=self.matmul).transpose(2, 0, 1, 3)
        if self.biased:
            bcx = bcx + self.in_bias[...].astype(self.dtype)[:, None, None, :]
        bcx = constrain(bcx, (None, "batch", "seq", "channels"))
        mixed, _ = short_conv(
            bcx,
            self.kernel[...],
            bias=self.kernel_bias[...] if self.biased else None,
            # With a cache the tokens of a row stand in front of its padding, so that nothing needs masking.
            segment_ids=context.segment_ids if state is None else None,
            initial_state=None if state is None else state.window.astype(self.dtype),
            implementation=self.implementation,
        )
        if state is not None:
            state = _last_window(state, bcx, context.new_lengths)
        out = project(mixed, self.out_proj[...].astype(self.dtype), matmul=self.matmul)
        if self.biased:
            out = out + self.out_bias[...].astype(self.dtype)[None, None, :]
        return out, state

    @classmethod
    def init_state(cls, config: ModelConfig, batch: int, capacity: int, call: int, dtype: jnp.dtype) -> ConvState:
        """Nothing before the first token, whatever the capacity."""
        return ConvState(jnp.zeros((batch, config.conv_width - 1, config.embed_dim), dtype))

    @classmethod
    def flops_per_token(cls, config: ModelConfig, seq: int, causal: bool) -> float:
        """in_proj and out_proj; then B * x, the taps (a product and a sum each) and C * the sum, a channel each."""
        return 8 * config.embed_dim**2 + config.embed_dim * (2 * config.conv_width + 2)

    @classmethod
    def cache_bytes(cls, config: ModelConfig, bytes_per_value: float) -> CacheBytes:
        """The window, whatever the length."""
        return CacheBytes(constant=(config.conv_width - 1) * config.embed_dim * bytes_per_value)
