"""Products in eight bits against rounding by hand, in both directions, on several devices, and what of a model they are."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.models.layers import project
from lfm_jax.models.quantization import quantized_tensordot
from lfm_jax.sharding import MeshConfig, aot, make_mesh

# A dense and a routed feed-forward; an operator of each kind, gated attention.
MODEL = ModelConfig(
    vocab_size=64, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=1), attention_gate=True, tie_embeddings=False,
)  # fmt: skip
PROJECTIONS = 2 + 4 + 3  # of the convolution, of attention (its gate is plain), of the dense feed-forward


def _rounded(rows, kind):
    """Each row by its largest value, as that many steps of int8 or as the nearest fp8 number, back in float64."""
    largest = {"int8": 127, "e4m3": 448, "e5m2": 57344}[kind]
    scale = np.abs(rows).max(axis=-1, keepdims=True) / largest
    scaled = (rows / scale).astype(np.float32)
    types = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    steps = np.round(scaled) if kind == "int8" else scaled.astype(types[kind])
    return steps.astype(np.float64) * scale


def _inputs(contracted):
    """x with outliers in one row, a weight, and the gradient of their product."""
    inner, outer = {1: ((6,), (3, 5)), 2: ((4, 2), (7,))}[contracted]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, *inner)).astype(np.float32)
    x[0, 0] *= 100
    return x, rng.normal(size=(*inner, *outer)).astype(np.float32), rng.normal(size=(2, 8, *outer)).astype(np.float32)


@pytest.mark.parametrize("matmul, values, gradients", [("int8", "int8", "int8"), ("fp8", "e4m3", "e5m2")])
@pytest.mark.parametrize("contracted", [1, 2])
def test_both_directions_equal_rounding_by_hand(contracted, matmul, values, gradients):
    x, weight, dy = _inputs(contracted)
    y, transpose = jax.vjp(lambda x, weight: quantized_tensordot(x, weight, contracted, matmul), x, weight)
    dx, dweight = transpose(dy)
    flat_x, flat_weight = x.reshape(16, -1), weight.reshape(x[0, 0].size, -1)
    flat_dy = dy.reshape(16, -1)
    expected = _rounded(flat_x, values) @ _rounded(flat_weight.T, values).T
    size = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(y.reshape(16, -1) / size, expected / size, atol=1e-5)
    expected = _rounded(flat_dy, gradients) @ _rounded(flat_weight, values).T
    np.testing.assert_allclose(dx.reshape(16, -1), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dweight.reshape(flat_weight.shape), flat_x.T @ flat_dy, rtol=1e-4, atol=1e-4)
    assert y.shape == (2, 8, *weight.shape[contracted:]) and dx.shape == x.shape and dweight.shape == weight.shape
    # And it is not the plain product.
    assert np.abs(y - project(x, weight, contracted)).max() > 1e-3


def test_types_are_those_of_the_inputs():
    x, weight, dy = (jnp.asarray(each, jnp.bfloat16) for each in _inputs(1))
    y, transpose = jax.vjp(lambda x, weight: project(x, weight, matmul="int8"), x, weight)
    assert {y.dtype, *(each.dtype for each in transpose(dy))} == {jnp.dtype(jnp.bfloat16)}


def test_split_over_devices_it_is_the_same():
    """Largest values and sums of integers do not depend on an order."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = lambda each, *spec: jax.device_put(each, NamedSharding(mesh, PartitionSpec(*spec)))
    x, weight, dy = _inputs(2)

    def both(x, weight, dy):
        y, transpose = jax.vjp(lambda x, weight: quantized_tensordot(x, weight, 2, "int8"), x, weight)
        return y, transpose(dy)[0]

    whole = jax.jit(both)(x, weight, dy)
    split = jax.jit(both)(place(x, "data", "fsdp", "tensor"), place(weight, "tensor", "fsdp"), place(dy, "data", "fsdp"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, split)


def _products(jaxpr):
    """Types of the operands of every product in it, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            yield equation.primitive.name, str(equation.invars[0].aval.dtype)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


@pytest.mark.parametrize("matmul, of_values", [("int8", {"int8"}), ("fp8", {"float8_e4m3fn"})])
def test_exactly_the_projections_are_quantised(matmul, of_values):
    """Not the router, the experts, attention's products and gate, nor the logits."""
    functions = functional(lambda rngs: Decoder(MODEL, ComputeConfig(matmul=matmul), rngs=rngs))

    def logits(params, buffers, tokens):
        model = functions.bind(params, buffers)
        return model.logits(model(tokens).hidden)

    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    jaxpr = jax.make_jaxpr(logits)(functions.abstract_params, functions.abstract_buffers, tokens).jaxpr
    types = [dtype for _, dtype in _products(jaxpr)]
    assert sum(dtype in of_values for dtype in types) == PROJECTIONS
    assert set(types) == of_values | {"float32"}


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_of_a_model_are_near_the_plain_ones_under_rematerialisation_too(remat):
    config = dataclasses.replace(MODEL, moe=None, embed_dim=32, mlp_dim=64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)

    def gradient(compute):
        functions = functional(lambda rngs: Decoder(config, compute, rngs=rngs))
        params, buffers = functions.init(jax.random.key(0))

        def loss(params):
            model = functions.bind(params, buffers)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens).hidden), axis=-1))

        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])

    plain, eight = gradient(ComputeConfig()), gradient(ComputeConfig(matmul="int8"))
    again = gradient(ComputeConfig(matmul="int8", remat=remat))
    assert 1e-4 < np.linalg.norm(eight - plain) / np.linalg.norm(plain) < 0.1
    np.testing.assert_allclose(again, eight, rtol=1e-4, atol=1e-6 * np.abs(eight).max())


def test_without_qwix_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ModuleNotFoundError, match="int8 and fp8 matmuls need qwix, which is not installed; run: pip"):
        quantized_tensordot(jnp.ones((1, 2, 3)), jnp.ones((3, 4)), 1, "int8")


def test_tpu_compiler_multiplies_integers():
    """Forwards and for the gradient by x; the gradient by the weight stays in bfloat16."""
    pytest.importorskip("libtpu")
    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices("v5e:2x2")[0])
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)

    def both(x, weight, dy):
        y, transpose = jax.vjp(lambda x, weight: project(x, weight, matmul="int8"), x, weight)
        return y, transpose(dy)

    text = aot.compile_for(both, (array(1, 512, 256), array(256, 512), array(1, 512, 512))).as_text()
    results = [line.split(" = ")[1].split("[")[0] for line in text.splitlines() if " convolution(" in line]
    assert sorted(results) == ["bf16", "s32", "s32"] or sorted(results) == ["f32", "s32", "s32"]
