"""Norm, embedding, rotary phases and the dense feed-forward."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lfm_jax.arrays import Hidden, Positions, Tokens
from lfm_jax.models.config import ComputeConfig, RopeConfig
from lfm_jax.models.quantization import Matmul, QuantizedWeight, quantized_tensordot
from lfm_jax.sharding import constrain, map_shards, on_one_device, shard_count, shard_index, sum_shards, target_platform


def compute_dtype(compute: ComputeConfig) -> jnp.dtype:
    """The type of activations, and of the weights as they enter a matmul."""
    if compute.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(compute.dtype)


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, dtype: jnp.dtype, gain: float = 1.0
) -> nnx.Param:
    """A float32 matrix drawn from a normal of standard deviation gain / sqrt(fan_in), truncated at two deviations.

    dtype: in which it enters matmuls (see `FunctionalModel.cast`).
    """
    draw = nnx.initializers.truncated_normal(gain * fan_in**-0.5, dtype=jnp.float32)
    return nnx.Param(draw(rngs.params(), shape), axes=axes, compute_dtype=dtype)


PROJECTED = "projected"  # the name by which rematerialisation knows what `project` returns


def project(
    x: jax.Array,
    weight: jax.Array,
    contracted: int = 1,
    matmul: Matmul = "plain",
    precision: str | None = None,
) -> jax.Array:
    """x times weight: `jnp.tensordot(x, weight, contracted)`, it and its gradients as matmuls that no layout makes slow.

    What autodiff derives for the weight is the transpose of the product below; XLA on CPUs copies an operand to undo that, and
    then takes a slower matmul: a feed-forward layer took 2.5 times as long (docs/log.md, 2026-11-25). Over two axes of rows it
    copies as well, and computes what the operand is made of in that copy, a value at a time; over one it does not.

    Args:
      x: [batch, seq, *inner]; weight: [*inner, *outer]; contracted: the number of inner axes; matmul: in which numbers (see
        `ComputeConfig`); precision: of the product and its gradients, "highest" where TPUs are not to round float32 to bfloat16,
        for "plain" alone.
    Returns:
      [batch, seq, *outer], of x's type.
    """
    if matmul != "plain":
        return checkpoint_name(quantized_tensordot(x, weight, contracted, matmul), PROJECTED)
    return checkpoint_name(_tensordot(x, weight, contracted, precision), PROJECTED)


_LEAST_PART = 2**17  # bytes; by what a step of decoding takes on two cores (docs/benchmarks/generation.md)


def _parts(x: jax.Array, weight: jax.Array, contracted: int) -> int:
    """In how many parts the sum over the inner axes is taken.

    XLA on CPUs multiplies one row with a matrix of less than 3 MB on one core, but the products of a batch side by side on all.
    """
    one_row = all(size == 1 for size in x.shape[: x.ndim - contracted])
    if not one_row or target_platform() != "cpu" or not on_one_device():
        return 1
    inner, size = math.prod(weight.shape[:contracted]), weight.size * weight.dtype.itemsize
    fit = lambda parts: inner % parts == 0 and size >= parts * _LEAST_PART
    return next(filter(fit, (4, 2)), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tensordot(x: jax.Array, weight: jax.Array, contracted: int, precision: str | None) -> jax.Array:
    parts = _parts(x, weight, contracted)
    if parts == 1:
        return jnp.tensordot(x, weight, contracted, precision=precision)
    outer = weight.shape[contracted:]
    x_parts, weight_parts = x.reshape(parts, -1), weight.reshape(parts, -1, math.prod(outer))
    sums = jnp.einsum("pi,pio->po", x_parts, weight_parts, precision=precision, preferred_element_type=jnp.float32)
    return jnp.sum(sums, axis=0).reshape(*x.shape[: x.ndim - contracted], *outer).astype(x.dtype)


def _tensordot_forward(x: jax.Array, weight: jax.Array, contracted: int, precision: str | None):
    return _tensordot(x, weight, contracted, precision), (x, weight)


def _tensordot_backward(contracted: int, precision: str | None, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, weight = saved
    product = functools.partial(jnp.tensordot, precision=precision)
    rows = tuple(range(x.ndim - contracted))
    outer = tuple(range(contracted, weight.ndim))
    outer_of_gradient = tuple(range(len(rows), gradient.ndim))
    by_x = product(gradient, weight, (outer_of_gradient, outer), preferred_element_type=x.dtype)
    if target_platform() == "cpu" and shard_count("seq") == 1:  # rows of a sequence that devices share are no one axis
        x, gradient = (array.reshape(-1, *array.shape[len(rows) :]) for array in (x, gradient))
        rows = (0,)
    return by_x, product(x, gradient, (rows, rows), preferred_element_type=weight.dtype)


_tensordot.defvjp(_tensordot_forward, _tensordot_backward)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, features: int, eps: float, *, axis: str | None = None):
        self.scale = nnx.Param(jnp.ones(features), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype)


def _rows(table: jax.Array, tokens: Tokens) -> Hidden:
    """Rows of a table whose rows may be split over devices, whole ones: the device that has a row sends it to those who want it.

    By hand, because XLA's partitioner fails on the scatter in the gradient (inside a shard_map over another axis).
    """

    def on_shard(part: jax.Array, tokens: Tokens) -> Hidden:
        split = part.shape[0] < table.shape[0]
        ids = tokens - shard_index("vocab") * part.shape[0] if split else tokens
        here = (ids >= 0) & (ids < part.shape[0])
        rows = jnp.where(here[:, :, None], part[jnp.where(here, ids, 0)], 0)
        return sum_shards(rows, "vocab") if split else rows

    return map_shards(on_shard, [table, tokens], [("vocab", None), ("batch", "seq")], ("batch", "seq", None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: jax.Array, tokens: Tokens, dtype: jnp.dtype) -> Hidden:
    """Rows of the table in another type. Their gradients are added up in float32: of a frequent token there are thousands, and
    a sum in bfloat16 stands still at 256 times what it adds."""
    return _rows(table.astype(dtype), tokens)


def _look_up_forward(table: jax.Array, tokens: Tokens, dtype: jnp.dtype):
    return _look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype: jnp.dtype, saved: tuple[jax.Array, Tokens], gradient: Hidden):
    table, tokens = saved
    wide = jax.ShapeDtypeStruct(table.shape, jnp.float32)
    (by_table,) = jax.linear_transpose(lambda table: _rows(table, tokens), wide)(gradient.astype(jnp.float32))
    return by_table.astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nnx.Module):
    """The table from token ids to the residual stream; tied models use it for the logits as well."""

    def __init__(self, vocab_size: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(draw(rngs.params(), (vocab_size, features)), axes=("vocab", "embed"), compute_dtype=dtype)
        self.dtype = dtype

    def __call__(self, tokens: Tokens) -> Hidden:
        table = self.embedding[...]
        if isinstance(table, QuantizedWeight):  # row by row: TPUs would make floats of the whole table first
            return _rows(table.values, tokens).astype(self.dtype) * _rows(table.scale, tokens).astype(self.dtype)
        return _look_up(table, tokens, self.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, embed: int, mlp: int, *, residual_gain: float, dtype: jnp.dtype, matmul: Matmul, rngs: nnx.Rngs):
        self.gate = parameter(rngs, (embed, mlp), ("embed", "mlp"), embed, dtype)
        self.up = parameter(rngs, (embed, mlp), ("embed", "mlp"), embed, dtype)
        self.down = parameter(rngs, (mlp, embed), ("mlp", "embed"), mlp, dtype, residual_gain)
        self.dtype = dtype
        self.matmul = matmul

    def __call__(self, x: Hidden) -> Hidden:
        times = lambda x, weight: project(x, weight[...].astype(self.dtype), matmul=self.matmul)
        gate = constrain(times(x, self.gate), ("batch", "seq", "mlp"))
        up = constrain(times(x, self.up), ("batch", "seq", "mlp"))
        return times(jax.nn.silu(gate) * up, self.down)


def rope_phases(positions: Positions, head_dim: int, config: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [batch, seq, 1, head_dim], in float32 whatever the model computes in. The halves are alike.

    Positions reach 131,071; a bfloat16 product with the frequency is off by whole turns there.
    """
    pairs = head_dim // 2
    index = jnp.arange(pairs, dtype=jnp.float32)
    rotated = int(config.fraction * head_dim // 2)  # rounded down, as in transformers' proportional kind
    frequency = jnp.where(index < rotated, config.theta ** (-2.0 * index / head_dim), 0.0)
    phase = positions.astype(jnp.float32)[:, :, None, None] * jnp.tile(frequency, 2)[None, None, None, :]
    return jnp.cos(phase), jnp.sin(phase)


def apply_rope(x: jax.Array, phases: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of each head; x is [batch, seq, heads, head_dim].

    Partners change places in a product with a signed permutation, which is exact. TPUs are slow at moving halves of a head: a
    layer's projections, norms and rotations took 1.20 ms that way by the compiler's count, and take 0.87 (docs/log.md).
    """
    cos, sin = phases
    pairs = x.shape[-1] // 2
    swap = jnp.asarray(np.kron([[0, 1], [-1, 0]], np.eye(pairs)), x.dtype)  # (x, y) to (-y, x)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.tensordot(x, swap, 1, precision=exact, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
