"""Experts over devices: the same outputs, gradients and counts as on one, however tokens and experts meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.models.config import ComputeConfig, MoEConfig
from lfm_jax.models.moe import ExpertBias, MoE
from lfm_jax.sharding import MeshConfig, aot, make_mesh

CONFIG = MoEConfig(num_experts=8, experts_per_token=3, mlp_dim=16)
MESHES = {
    "expert 2": MeshConfig(fsdp=4, expert=2),
    "expert 4": MeshConfig(fsdp=2, expert=4),
    "expert 8": MeshConfig(fsdp=1, expert=8),
    "with tensor": MeshConfig(fsdp=1, expert=4, tensor=2),
    "with context": MeshConfig(data=2, fsdp=1, expert=2, context=2),
}
# By the bias: the load as it comes; all tokens to three experts, which one device has, or two; one expert without any.
EXPERT = np.arange(8)
LOADS = {
    "even": np.zeros(8),
    "one device": np.where(EXPERT < 3, 9.0, 0),
    "an idle expert": np.where(EXPERT == 5, -9.0, 0),
}
CASES = [*((mesh, "even") for mesh in MESHES), ("expert 4", "one device"), ("expert 2", "an idle expert")]


def _split(exchange="gather", implementation="auto"):
    compute = ComputeConfig(dtype="float32", expert_exchange=exchange, grouped_matmul=implementation)
    moe = MoE(8, CONFIG, compute, residual_gain=1.0, rngs=nnx.Rngs(0))
    return nnx.split(moe, ExpertBias, ...)


def _value_and_gradients(load, mesh=None, **settings):
    """Output, counts, and gradients of a random projection of the output with respect to weights and input."""
    graphdef, bias, weights = _split(**settings)
    bias["expert_bias"][...] = jnp.asarray(LOADS[load], jnp.float32)
    x, direction = jax.random.normal(jax.random.key(1), (2, 8, 6, 8))
    valid = jnp.arange(6)[None, :] < jnp.arange(8)[:, None]

    def loss(weights, x):
        out, counts = nnx.merge(graphdef, bias, weights)(x, valid)
        return jnp.sum(out * direction), (out, counts)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    with jax.set_mesh(mesh) if mesh is not None else jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        (_, outputs), gradients = step(weights, x)
    return jax.tree.map(np.asarray, (outputs, gradients))


@functools.cache
def _on_one_device(load):
    return _value_and_gradients(load)


@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
@pytest.mark.parametrize("mesh, load", CASES)
def test_experts_over_devices_equal_one_device(mesh, load, exchange):
    found = _value_and_gradients(load, make_mesh(MESHES[mesh]), exchange=exchange)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), found, _on_one_device(load))


def test_the_kernel_within_experts_over_devices():
    """Emulated, on the buffers of an exchange, whose unused rows are no numbers."""
    found = _value_and_gradients("one device", make_mesh(MESHES["expert 2"]), exchange="all_to_all", implementation="pallas")
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), found, _on_one_device("one device"))


@pytest.mark.parametrize(
    "exchange, collectives, kernels", [("gather", ("all-gather", "reduce-scatter"), 7), ("all_to_all", ("ragged-all-to-all",), 8)]
)
def test_experts_over_tpus_compile(exchange, collectives, kernels):
    """The gradient of a sum: where copies are weighted before their last matmul, nothing needs what it gives."""
    pytest.importorskip("libtpu")
    config = MoEConfig(num_experts=32, experts_per_token=4, mlp_dim=256)
    compute = ComputeConfig(dtype="bfloat16", expert_exchange=exchange)
    mesh = make_mesh(MeshConfig(fsdp=1, expert=4), aot.tpu_devices("v5p:2x2x1"))
    moe = nnx.eval_shape(lambda: MoE(256, config, compute, residual_gain=1.0, rngs=nnx.Rngs(0)))
    graphdef, bias, weights = nnx.split(moe, ExpertBias, ...)

    def loss(weights, bias, x):
        return jnp.sum(nnx.merge(graphdef, bias, weights)(x, None)[0].astype(jnp.float32))

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    x = jax.ShapeDtypeStruct((8, 512, 256), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        text = aot.compile_for(jax.grad(loss, argnums=(0, 2)), (*jax.tree.map(place, (weights, bias)), x)).as_text()
    assert all(f" {kind}" in text for kind in collectives)
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
