"""Grouped matmuls through the TPU compiler (Mosaic and XLA), for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lfm_jax.kernels import grouped_matmul
from lfm_jax.sharding import aot

pytest.importorskip("libtpu")

# (topology, rows, groups, k, columns): the experts of lfm2_8b_a1b on every chip, those of lfm2_24b_a2b, a quarter of the width of
# the former with rows that no block divides, and shapes that no tile divides.
SHAPES = [
    ("v5e:2x2", 32_768, 32, 2048, 1792),
    ("v5p:2x2x1", 32_768, 32, 2048, 1792),
    ("v6e:2x2", 32_768, 32, 2048, 1792),
    ("tpu7x:2x2x1", 32_768, 32, 2048, 1792),
    ("v5p:2x2x1", 65_536, 64, 2048, 1536),
    ("v5p:2x2x1", 5000, 8, 2048, 448),
    ("v5e:2x2", 100, 3, 72, 200),
]


def _kernels(topology, rows, groups, k, columns, dtype):
    """Values and gradients of two products of the same rows."""
    device = SingleDeviceSharding(aot.tpu_devices(topology)[0])
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def both(lhs, gate, up, sizes, gradients):
        multiply = lambda lhs, gate, up: grouped_matmul(lhs, (gate, up), sizes, implementation="pallas")
        outs, transpose = jax.vjp(multiply, lhs, gate, up)
        return outs, transpose(gradients)

    matrices, gradients = array(groups, k, columns), (array(rows, columns),) * 2
    arguments = array(rows, k), matrices, matrices, array(groups, dtype=jnp.int32), gradients
    return aot.compile_for(both, arguments).as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("shape", SHAPES)
def test_preset_shapes_compile(shape):
    assert _kernels(*shape, jnp.bfloat16) == 2 + 1 + 2


def test_float32_compiles():
    assert _kernels("v5p:2x2x1", 4096, 4, 512, 384, jnp.float32) == 2 + 1 + 2
