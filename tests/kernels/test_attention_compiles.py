"""Splash attention through Mosaic, forward and backward, for chips that are not there, at the presets' shapes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lfm_jax.kernels import attention
from lfm_jax.models import preset
from lfm_jax.sharding import MeshConfig, activation_sharding, aot, make_mesh
from lfm_jax.sharding.chips import CHIPS

pytest.importorskip("libtpu")

HEAVY = functools.partial(pytest.param, marks=pytest.mark.heavy)
# (topology, preset, kind of layer, rows, positions, mesh, kernels: two where the backward pass is one)
CASES = [(chip.topology, "lfm2_350m", "full_attention", 2, 4096, MeshConfig(), 2) for chip in CHIPS.values() if chip.topology]
CASES += [
    ("v5e:2x2", "lfm3_1_7b", "full_attention", 1, 4096, MeshConfig(), 2),
    ("v5e:2x2", "lfm3_1_7b", "sliding_attention", 1, 4096, MeshConfig(), 3),
    HEAVY("v5e:2x2", "lfm2_350m", "full_attention", 1, 32_768, MeshConfig(), 2),
    HEAVY("v5p:2x2x1", "lfm3_1_7b", "full_attention", 1, 32_768, MeshConfig(), 2),
    HEAVY("v5p:2x2x1", "lfm3_1_7b", "sliding_attention", 1, 32_768, MeshConfig(), 3),
    HEAVY("v5e:2x2", "lfm2_1_2b", "full_attention", 1, 32_768, MeshConfig(), 3),  # whose partial sums have no room
    HEAVY("v6e:2x2", "lfm2_1_2b", "full_attention", 1, 32_768, MeshConfig(fsdp=1, context=4), 2),
    ("v5e:4x4", "lfm2_1_2b", "full_attention", 1, 32_768, MeshConfig(fsdp=1, context=1, tensor=16), 2),
]


@pytest.mark.parametrize("topology, name, kind, rows, seq, config, kernels", CASES)
def test_splash_attention_compiles(topology, name, kind, rows, seq, config, kernels):
    model = preset(name)
    devices = aot.tpu_devices(topology)
    mesh = make_mesh(config, devices if config != MeshConfig() else devices[:1])

    def array(heads):
        shape = rows, seq, heads, model.head_dim
        axes = "batch", "seq", "heads" if heads == model.num_heads else "kv_heads", None
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=activation_sharding(mesh, axes, shape))

    segments = jax.ShapeDtypeStruct((rows, seq), jnp.int32, sharding=activation_sharding(mesh, ("batch", "seq")))
    window = model.sliding_window if kind == "sliding_attention" else None

    def step(query, key, value, dout, segment_ids):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            mask = jnp.ones((rows, seq, seq), bool)  # not read
            function = lambda *inputs: attention(*inputs, mask, segment_ids, window=window)
            out, transpose = jax.vjp(function, query, key, value)
            return out, transpose(dout)

    query, key = array(model.num_heads), array(model.num_kv_heads)
    compiled = aot.compile_for(step, (query, key, key, query, segments))
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert f"{seq},{seq}]" not in text
    # Far less than the scores would take.
    scores = 2 * rows * seq * seq * model.num_heads / mesh.size
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
