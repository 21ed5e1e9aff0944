"""K-quants through llama-cpp-python, judged by llama.cpp's server (xllamacpp) and by activations that are computed here.

The package is compiled when it is installed; where it is not, its errors are tested alone.
"""

import dataclasses
import importlib.util
import inspect
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from experiments.llama_cpp import run_llama_cpp
from lfm_jax.interop.gguf_file import export_gguf
from lfm_jax.interop.gguf_header import read_gguf_header
from lfm_jax.interop.gguf_quantize import KINDS, measure_importance, quantize_gguf
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, functional

installed = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
CONFIG = ModelConfig(
    vocab_size=600, embed_dim=256, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256
)
MOE = dataclasses.replace(CONFIG, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=256, num_dense_layers=1))
ROWS = [[1, *np.random.default_rng(seed).integers(15, 600, length).tolist()] for seed, length in enumerate((20, 7, 33))]


def _weights(config):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draws = np.random.default_rng(0)

    def draw(leaf):
        # A few rows of each matrix are much larger than the others, as in trained models.
        spread = np.exp(draws.normal(size=leaf.shape[:1] + (1,) * (len(leaf.shape) - 1)))
        return (draws.normal(size=leaf.shape) * spread * 256**-0.5).astype(np.float32)

    return functions, *(jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters")
    tokenizer = folder / "trained"
    train_tokenizer(TokenizerConfig(vocab_size=600), [Document(inspect.getsource(inspect), "inspect")], tokenizer)
    export = lambda config, type: export_gguf(
        config, *_weights(config)[1:], folder / f"{config.moe is None}-{type}.gguf", tokenizer=tokenizer, type=type
    )
    return {"dense": export(CONFIG, "F32"), "moe": export(MOE, "F32"), "quantised": export(CONFIG, "Q8_0")}


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs(kind, masters, tmp_path):
    file = quantize_gguf(masters["dense"], tmp_path / "model.gguf", kind)
    types = {tensor.name: tensor.type for tensor in read_gguf_header(file).tensors}
    assert types["blk.0.shortconv.conv.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert {type.partition("_")[0] for type in types.values()} <= {"F32", "Q2", "Q3", "Q4", "Q5", "Q6", "Q8", "IQ4"}
    source = read_gguf_header(masters["dense"]).metadata
    metadata = read_gguf_header(file).metadata
    assert all(np.array_equal(metadata[key], source[key]) for key in source if not key.startswith("general."))
    (new,) = run_llama_cpp(file, prompts=[[1, 20]], new_tokens=5).continuations
    assert len(new) == 5


def _weighted_error(file, master, importance):
    """Of all matrices of Q2_K together: squared differences, each column's times what it matters for."""
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(master).tensors}
    total = 0.0
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q2_K:
            difference = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - exact[tensor.name]
            total += np.sum(np.square(difference) * importance[tensor.name][..., None, :])
    return total


@installed
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_importance_brings_the_file_nearer_to_its_master(name, masters, tmp_path):
    """The weighted error of the matrices is what it lowers. The log-probabilities follow, but where a rounded router's inputs
    choose other experts."""
    importance = measure_importance(masters[name], ROWS)
    exact = np.concatenate(run_llama_cpp(masters[name], scored=ROWS).log_probs)
    weighted, errors = {}, {}
    for label, given in (("alike", None), ("measured", importance)):
        file = quantize_gguf(masters[name], tmp_path / f"{label}.gguf", "Q2_K", importance=given)
        weighted[label] = _weighted_error(file, masters[name], importance)
        found = np.concatenate(run_llama_cpp(file, scored=ROWS).log_probs)
        errors[label] = np.square(found - exact).mean()
    assert 0 < weighted["measured"] < 0.95 * weighted["alike"]
    assert name == "moe" or errors["measured"] < errors["alike"]


@installed
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_importance_is_the_mean_square_of_what_is_multiplied(name, masters):
    """Against those computed here: behind the first norm for the first projection, behind the last for the head."""
    config = CONFIG if name == "dense" else MOE
    functions, params, buffers = _weights(config)
    importance = measure_importance(masters[name], ROWS)
    embedded = np.concatenate([params["embed"]["embedding"][row] for row in ROWS])
    scale = params["layers"][0]["operator_norm"]["scale"]
    normed = embedded / np.sqrt(np.square(embedded).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(importance["blk.0.shortconv.in_proj.weight"], np.square(normed).mean(0), rtol=1e-4)
    hidden = []
    for row in ROWS:
        model = functions.bind(params, buffers)
        hidden.append(np.asarray(model(jnp.asarray([row], jnp.int32)).hidden[0]))
    # The cache of llama.cpp is in float16.
    np.testing.assert_allclose(importance["token_embd.weight"], np.square(np.concatenate(hidden)).mean(0), rtol=1e-2)
    if name == "moe":
        assert importance["blk.1.ffn_down_exps.weight"].shape == (4, 256)
        assert importance["blk.1.ffn_gate_exps.weight"].shape == (4, 256)


@installed
def test_what_is_computed_cannot_be(masters, tmp_path):
    with pytest.raises(ValueError, match="llama.cpp cannot compute a row of 2 ids up to 600"):
        measure_importance(masters["dense"], [[1, 600]])
    (tmp_path / "cut.gguf").write_bytes(masters["dense"].read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut.gguf: llama.cpp cannot load it"):
        measure_importance(tmp_path / "cut.gguf", ROWS)
    with pytest.raises(OSError, match="llama.cpp could not write .*model.gguf as Q4_K_M .code"):
        quantize_gguf(masters["dense"], tmp_path / "missing" / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_bad_requests_are_refused(masters, tmp_path):
    with pytest.raises(ValueError, match="'Q4_K_N' is no kind .*Did you mean 'Q4_K_"):
        quantize_gguf(masters["dense"], tmp_path / "model.gguf", "Q4_K_N")
    with pytest.raises(ValueError, match="token_embd.weight is Q8_0, quantised already"):
        quantize_gguf(masters["quantised"], tmp_path / "model.gguf")
    for values in (np.ones(255), np.full(256, np.nan)):
        with pytest.raises(ValueError, match="the importance of blk.0.ffn_up.weight has .* values, expected are 256 "):
            quantize_gguf(masters["dense"], tmp_path / "model.gguf", importance={"blk.0.ffn_up.weight": values})
    assert not list(tmp_path.iterdir())


def test_without_the_package(masters, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ImportError, match="comes with the package llama-cpp-python; install it"):
        quantize_gguf(masters["dense"], tmp_path / "model.gguf")
    with pytest.raises(ImportError, match="comes with the package llama-cpp-python; install it"):
        measure_importance(masters["dense"], ROWS)


def test_names_of_types_are_those_of_the_package():
    assert all(kind in gguf.LlamaFileType.__members__ or f"MOSTLY_{kind}" in gguf.LlamaFileType.__members__ for kind in KINDS)
