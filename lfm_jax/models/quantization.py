"""Eight bits: weights that are kept in them, and products of projections, forwards and backwards, through qwix.

Of a product each row of an operand is quantised, along what is summed over, by a scale of its own (its largest absolute value),
when the product is taken; sums are int32 or float32. What is kept stays as it was: parameters, activations, and the gradients
outside.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

Matmul = Literal["plain", "int8", "fp8"]
# Of values and of gradients, whose range is wider (Micikevicius et al. 2022, arXiv 2209.05433).
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


# The largest integer is 127. qwix scales to 127.5, half of which rounds up to what int8 has not: whether 127 or -128 comes of a
# row's largest value would be decided by a division's last bit.
_CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}


@struct.dataclass
class QuantizedWeight:
    """values * scale, in the place of a parameter: it becomes a matrix where the model asks for the type it computes in.

    values: int8, of the parameter's shape; scale: float32, with length 1 on the axes that are summed over.
    """

    values: jax.Array
    scale: jax.Array

    def __getitem__(self, index: Any) -> "QuantizedWeight":
        """All of it, `[...]`, as a module reads its parameters."""
        if index is not Ellipsis:
            raise TypeError(f"a quantized weight is read whole, [...]; not [{index}]")
        return self

    @property
    def T(self) -> "QuantizedWeight":
        """The transposed matrix."""
        return QuantizedWeight(self.values.T, self.scale.T)

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix in floating point."""
        return self.values.astype(dtype) * self.scale.astype(dtype)


def _product(
    left: jax.Array, right: jax.Array, left_axes: Sequence[int], right_axes: Sequence[int], types, matmul: Matmul
) -> jax.Array:
    """Sums over the axes given; the result is float32."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("int8 and fp8 matmuls need qwix, which is not installed; run: pip install qwix") from error

    def quantize(x: jax.Array, axes: Sequence[int], to: jnp.dtype):
        rest = [axis for axis in range(x.ndim) if axis not in axes]
        return qwix.quantize(x.astype(jnp.float32), to, channelwise_axes=rest, calibration_method=_CALIBRATION[matmul])

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # qwix multiplies integers by scales
        quantized = quantize(left, left_axes, types[0]), quantize(right, right_axes, types[1])
        return qwix.dot_general(*quantized, ((tuple(left_axes), tuple(right_axes)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_tensordot(x: jax.Array, weight: jax.Array, contracted: int, matmul: Matmul) -> jax.Array:
    """`jnp.tensordot(x, weight, contracted)` in eight bits, as is the gradient by x; the gradient by the weight is not.

    That one sums over tokens, of which a single one with large values would set the scale of all (SwitchBack, Wortsman et al.
    2023, arXiv 2304.13013, section 2); nor is it faster in eight bits, since both operands must be scaled anew for it
    (docs/benchmarks/quantized_matmul.md).

    Args:
      x: [*rows, *inner]; weight: [*inner, *outer]; contracted: the number of inner axes; matmul: "int8" or "fp8".
    Returns:
      [*rows, *outer], of x's type.
    """
    inner = range(contracted)
    values, _ = _TYPES[matmul]
    rows = x.ndim - contracted
    return _product(x, weight, [rows + axis for axis in inner], inner, (values, values), matmul).astype(x.dtype)


def _forward(x: jax.Array, weight: jax.Array, contracted: int, matmul: Matmul):
    return quantized_tensordot(x, weight, contracted, matmul), (x, weight)


def _backward(contracted: int, matmul: Matmul, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, weight = saved
    values, gradients = _TYPES[matmul]
    rows, outer = tuple(range(x.ndim - contracted)), range(contracted, weight.ndim)
    outer_of_gradient = range(len(rows), gradient.ndim)
    return (
        _product(gradient, weight, outer_of_gradient, outer, (gradients, values), matmul).astype(x.dtype),
        jnp.tensordot(x, gradient, (rows, rows), preferred_element_type=weight.dtype),
    )


quantized_tensordot.defvjp(_forward, _backward)
