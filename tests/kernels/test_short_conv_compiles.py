"""The short convolution through the TPU compiler (Mosaic and XLA), for chips that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lfm_jax.kernels import short_conv
from lfm_jax.models import PRESETS
from lfm_jax.sharding import MeshConfig, aot, make_mesh

pytest.importorskip("libtpu")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# (batch, seq, channels, width): the convolutions of all presets, and one long sequence.
CONVOLUTIONS = sorted({(config.embed_dim, config.conv_width) for config in PRESETS.values()})
SHAPES = [*((1, 4096, *convolution) for convolution in CONVOLUTIONS), (1, 131_072, 2048, 3)]


def _loss(bcx, weight, bias, segment_ids, state):
    """Values and all gradients, through y and the final state."""

    def loss(bcx, weight, bias, state):
        y, final = short_conv(
            bcx, weight, bias=bias, segment_ids=segment_ids, initial_state=state, implementation="pallas"
        )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(final.astype(jnp.float32))

    given = [index for index, value in enumerate((bcx, weight, bias, state)) if value is not None]
    return jax.value_and_grad(loss, argnums=given)(bcx, weight, bias, state)


def _arguments(place, batch, seq, channels, width, dtype=jnp.bfloat16, *, options=False):
    """place(shape, dtype, axes) -> jax.ShapeDtypeStruct; options: bias, segments and initial state."""
    return (
        place((3, batch, seq, channels), dtype, (None, "data", None, "tensor")),
        place((width, channels), jnp.float32, (None, "tensor")),
        place((channels,), jnp.float32, ("tensor",)) if options else None,
        place((batch, seq), jnp.int32, ("data", None)) if options else None,
        place((batch, width - 1, channels), dtype, ("data", None, "tensor")) if options else None,
    )


def _on_one_device(topology):
    sharding = SingleDeviceSharding(aot.tpu_devices(topology)[0])
    return lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_preset_shapes_compile(topology, shape):
    compiled = aot.compile_for(_loss, _arguments(_on_one_device(topology), *shape))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1000, 1536, 3), (1, 50, 200, 15), (1, 4097, 1024, 7)])
def test_every_option_compiles_at_ragged_shapes(topology, dtype, shape):
    """Bias, segments, states; lengths and channels that no block divides; the widest kernel."""
    compiled = aot.compile_for(_loss, _arguments(_on_one_device(topology), *shape, dtype, options=True))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:4x4"])
def test_compiles_for_many_chips(topology):
    """XLA partitions no Mosaic kernel: each device calls it on its own batch and channels."""
    devices = aot.tpu_devices(topology)
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2), devices)
    place = lambda shape, dtype, axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    with jax.set_mesh(mesh):
        compiled = aot.compile_for(_loss, _arguments(place, 8, 4096, 1024, 3, options=True))
    batch = 8 // (len(devices) // 2)
    assert f"bf16[3,{batch},4096,512]" in next(line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line)
