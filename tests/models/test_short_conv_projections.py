"""How the TPU compiler takes the projections around the short convolution."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.tpu_compiler import estimated_cycles
from lfm_jax.models import ComputeConfig, functional, preset
from lfm_jax.models.context import training_context
from lfm_jax.models.short_conv import ShortConv
from lfm_jax.sharding import aot


def test_projections_run_near_the_matrix_units_peak():
    """Within 10 % of the v5e's 131,072 FLOPs a cycle (in an unlucky layout 40 % over); the kernel carries no estimate."""
    pytest.importorskip("libtpu")
    config, batch, seq = preset("lfm2_1_2b"), 8, 4096
    compute = ComputeConfig(dtype="bfloat16", short_conv="pallas")
    model = functional(lambda rngs: ShortConv(config, compute, residual_gain=1.0, rngs=rngs))
    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices("v5e:2x2")[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=device)

    def forward(params, x):
        positions = jnp.broadcast_to(jnp.arange(seq)[None], (batch, seq))
        return model.bind(params, {})(x, training_context(config, None, positions), None)[0]

    x = jax.ShapeDtypeStruct((batch, seq, config.embed_dim), jnp.bfloat16, sharding=device)
    compiled = aot.compile_for(forward, (jax.tree.map(place, model.abstract_params), x))
    flops = 8 * config.embed_dim**2 * batch * seq
    assert flops / 131_072 < estimated_cycles(compiled.as_text()) < 1.1 * flops / 131_072
