"""Matrices rounded to what a file holds, against the files: GGUF's own reader, and torchao."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from lfm_jax.generation import Engine, EngineConfig
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.models.rounding import Rounding, rounded, rounding_in, summed_axes
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import LossConfig, init_state, make_train_step, next_token_objective, place_batch

# Heads of 8: blocks go over four of them. The head and a mixture of experts are matrices of their own.
UNTIED = ModelConfig(
    vocab_size=640, tokenizer_vocab_size=600, embed_dim=64, layer_types=("conv", "full_attention"), num_heads=8, num_kv_heads=4,
    head_dim=8, mlp_dim=96, tie_embeddings=False,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=32, num_dense_layers=1),
)  # fmt: skip
TIED = dataclasses.replace(UNTIED, tie_embeddings=True, moe=None, num_heads=2, num_kv_heads=1, head_dim=32)
DEEP = dataclasses.replace(TIED, layer_types=("conv", "full_attention") * 2)
CONFIGS = {"untied": UNTIED, "tied": TIED}


def _functions(config, file_format="none", **compute):
    return functional(lambda rngs: Decoder(config, ComputeConfig(file_format=file_format, **compute), rngs=rngs))


def _params(config):
    """Random ones; a block of zeros and one whose extremes are as far from 0 on both sides are among them."""
    params, buffers = _functions(config).init(jax.random.key(0))
    projection = params["layers"][0]["operator"]["in_proj"]
    projection = projection.at[:32, 0, 0].set(0.0).at[:32, 1, 0].set(0.01).at[3, 1, 0].set(-0.5).at[7, 1, 0].set(0.5)
    params["layers"][0]["operator"]["in_proj"] = projection.at[:32, 2, 0].set(0.01).at[7, 2, 0].set(-0.5).at[3, 2, 0].set(0.5)
    return params, buffers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(TokenizerConfig(vocab_size=600), [Document(inspect.getsource(inspect), "inspect")], folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_q4_0_is_what_a_gguf_file_holds(name, tmp_path, tokenizer):
    """The file in Q4_0, read by the package gguf, is the file in F32 of the rounded parameters."""
    gguf = pytest.importorskip("gguf")
    from lfm_jax.interop.gguf_file import export_gguf

    config = CONFIGS[name]
    params, buffers = _params(config)
    write = lambda params, kind: export_gguf(config, params, buffers, tmp_path / kind, tokenizer=tokenizer, type=kind)
    write(params, "Q4_0")
    write(jax.jit(_functions(config, "q4_0").cast)(params), "F32")
    files = {kind: gguf.GGUFReader(tmp_path / kind).tensors for kind in ("Q4_0", "F32")}
    types = set()
    for theirs, ours in zip(files["Q4_0"], files["F32"], strict=True):
        assert theirs.name == ours.name
        types.add(theirs.tensor_type.name)
        np.testing.assert_array_equal(gguf.quants.dequantize(theirs.data, theirs.tensor_type), ours.data, theirs.name)
    assert types == {"F32", "Q4_0", "Q8_0"}


@pytest.mark.parametrize("name", CONFIGS)
def test_8da4w_is_what_an_executorch_program_holds(name, tmp_path):
    """torchao's weights in the module that such a file is made of are those of the rounded parameters; of those farthest below 0,
    which are 7.5 steps away, some are one step off."""
    pytest.importorskip("torchao")
    from lfm_jax.interop import executorch_file, export_folder
    from lfm_jax.interop.torch_model import load_torch_model

    config = CONFIGS[name]
    params, buffers = _params(config)
    load = lambda params, folder: load_torch_model(export_folder(config, params, buffers, tmp_path / folder, tokenizer=None))
    exact = load(params, "exact")
    theirs, exact = executorch_file._quantized(exact), dict(exact.named_modules())
    ours = dict(load(jax.jit(_functions(config, "8da4w").cast)(params), "rounded").named_modules())
    quantized = 0
    for path, module in theirs.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or path not in ours and path != "lm_head":
            continue
        source = "embed" if path == "lm_head" and name == "tied" else path
        rounds = hasattr(weight, "qdata")
        wanted = weight.dequantize() if rounds else weight
        found, wanted, master = (each.detach().numpy() for each in (ours[source].weight, wanted, exact[source].weight))
        if rounds:
            quantized += 1
            found, wanted, master = (each.reshape(-1, 32) for each in (found, wanted, master))
            least = (master == master.min(axis=1, keepdims=True)) & (-master == np.abs(master).max(axis=1, keepdims=True))
            step = np.abs(master).max(axis=1, keepdims=True) / 7.5
            assert (np.abs(found - wanted) <= 1.01 * step)[least].all(), path
            found = np.where(least, wanted, found)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0, err_msg=path)
    assert quantized == {"untied": 2 + 4 + 3 + 4 * 3 + 1, "tied": 2 + 4 + 2 * 3 + 1}[name]
    if name == "untied":
        table = theirs.embed.rows.float() * theirs.embed.scale
        np.testing.assert_allclose(table.numpy(), ours["embed"].weight.detach().numpy(), rtol=1e-6)


def test_gradients_go_straight_through():
    weight, towards = (jax.random.normal(jax.random.key(seed), (64, 6)) for seed in range(2))
    for steps in ("q4_0", "q8_0", "int4"):
        found = jax.grad(lambda weight, steps=steps: jnp.sum(rounded(weight, Rounding(steps, (0,))) * towards))(weight)
        np.testing.assert_array_equal(found, towards)
        assert np.abs(rounded(weight, Rounding(steps, (0,))) - weight).max() > 1e-3


def test_a_block_has_as_many_values_as_bits_allow():
    weight = jax.random.normal(jax.random.key(0), (32, 500))
    for steps, most in (("q4_0", 16), ("int4", 16), ("q8_0", 255)):
        columns = np.asarray(rounded(weight, Rounding(steps, (0,)))).T
        assert max(len(set(column.tolist())) for column in columns) <= most


def _batch(mesh, rows=4, seq=16):
    tokens = np.random.default_rng(0).integers(0, 96, (rows, seq + 1)).astype(np.int32)
    ones = np.ones((rows, seq), np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq)).copy()
    return place_batch(
        {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "positions": positions,
            "loss_mask": ones.astype(np.float32),
        },
        mesh,
    )  # fmt: skip


@functools.cache
def _gradient_at_rounded_parameters():
    """Parameters, the loss at them, and loss and gradient where they are rounded, without any of the training step."""
    plain, objective = _functions(DEEP), next_token_objective(LossConfig())
    params = jax.device_get(init_state(plain, optax.sgd(0.1), make_mesh(MeshConfig(), jax.devices()[:1]), seed=0).params)
    batch = jax.device_get(_batch(make_mesh(MeshConfig(), jax.devices()[:1])))

    @jax.jit
    def both(params):
        def loss(params):
            sums = objective(plain.bind(params, {}), batch, jax.random.key(0))
            return sums.loss / sums.weight

        return jax.value_and_grad(loss)(params)

    return params, both(params)[0], *both(jax.jit(_functions(DEEP, "q4_0").cast)(params))


@pytest.mark.parametrize(
    "mesh, compute", [(None, {}), (MeshConfig(fsdp=4, tensor=2), {"scan_layers": True, "remat": "full"})], ids=["one", "eight"]
)
def test_a_step_moves_exact_parameters_by_the_gradient_at_rounded_ones(mesh, compute):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else make_mesh(mesh)
    functions, optimizer = _functions(DEEP, "q4_0", **compute), optax.sgd(0.1)
    before, at_exact, value, gradient = _gradient_at_rounded_parameters()
    step = make_train_step(functions, optimizer, next_token_objective(LossConfig()), mesh, seed=0)
    after, metrics = step(init_state(functions, optimizer, mesh, seed=0), _batch(mesh))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, before, gradient)
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6), after.params, expected)
    assert abs(at_exact - value) > 1e-4


@pytest.mark.parametrize("file_format", ["q4_0", "8da4w"])
def test_what_is_rounded(file_format):
    """Neither router, norms, taps and biases, nor (ExecuTorch's file) attention's gates."""
    config = dataclasses.replace(UNTIED, attention_gate=True, conv_bias=True)
    functions = _functions(config, file_format)
    paths = jax.tree_util.tree_leaves_with_path(functions.roundings, is_leaf=lambda node: isinstance(node, Rounding))
    found = {jax.tree_util.keystr(path).split("'")[-2]: rounding.steps for path, rounding in paths}
    matrices = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "gate", "up", "down")
    expected = {"q4_0": dict.fromkeys([*matrices, "gate_proj"], "q4_0") | dict.fromkeys(["embedding", "lm_head"], "q8_0"),
                "8da4w": dict.fromkeys([*matrices, "lm_head"], "int4") | {"embedding": "int8"}}  # fmt: skip
    assert found == expected[file_format]
    assert jax.tree.leaves(_functions(config).roundings) == []


def test_sizes_that_do_not_divide():
    narrow = dataclasses.replace(TIED, mlp_dim=80)
    with pytest.raises(ValueError, match="q4_0 has blocks of 32 weights, but down has 80 inputs; take 8da4w, or another width"):
        _functions(narrow, "q4_0")
    assert rounding_in("8da4w", "down", ("mlp", "embed"), (80, 64), tied=True) is None
    heads = rounding_in("q4_0", "out_proj", ("heads", None, "embed"), (8, 8, 64), tied=True)
    assert heads == Rounding("q4_0", (0, 1))
    assert summed_axes((None, "channels")) is None


def test_weights_are_not_rounded_twice():
    functions = _functions(TIED, "q4_0")
    params, buffers = functions.init(jax.random.key(0))
    with pytest.raises(ValueError, match="compute.file_format rounds the matrices already; leave it out, or take weights=float"):
        Engine(functions, TIED, params, buffers, EngineConfig(weights="int8"))
