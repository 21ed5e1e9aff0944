"""The hybrid in plain PyTorch, judged by our own logits and by transformers'."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from lfm_jax.interop import export_folder
from lfm_jax.interop.torch_model import initial_state, load_torch_model, state_names
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional, init_cache

LFM2 = ModelConfig(
    vocab_size=80, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48,
)  # fmt: skip
LFM3 = dataclasses.replace(
    LFM2, layer_types=("conv", "sliding_attention", "full_attention"), conv_width=7, conv_bias=True, sliding_window=4,
    sandwich_norms=True, attention_gate=True, full_rope=RopeConfig(fraction=0.5), tie_embeddings=False,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=1)
CONFIGS = {
    "lfm2": LFM2,
    "lfm2_padded": dataclasses.replace(LFM2, tokenizer_vocab_size=70, tie_embeddings=False, conv_bias=True),
    "lfm2_moe": dataclasses.replace(LFM2, moe=MOE),
    "lfm2_moe_otherwise": dataclasses.replace(
        LFM2, tie_embeddings=False,
        moe=dataclasses.replace(MOE, num_dense_layers=0, normalize_weights=False, scaling_factor=2.5, expert_bias=False),
    ),
    "lfm3": LFM3,
    "lfm3_ungated": dataclasses.replace(LFM3, attention_gate=False, tie_embeddings=True, conv_bias=False),
    "convolutions": dataclasses.replace(LFM2, layer_types=("conv", "conv"), conv_width=2),
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 80, (2, 20))


def _weights(config):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    generator = np.random.default_rng(0)

    def draw(leaf):
        return generator.normal(size=leaf.shape).astype(np.float32) * 2 * max(leaf.shape) ** -0.5

    return functions, *(jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))


def _whole(model, tokens=TOKENS):
    return model(torch.from_numpy(tokens), initial_state(model.config, *tokens.shape))[0].numpy()


def _in_pieces(model, lengths, capacity):
    state, pieces, start = initial_state(model.config, 2, capacity), [], 0
    for length in lengths:
        logits, state = model(torch.from_numpy(TOKENS[:, start : start + length]), state)
        pieces.append(logits.numpy())
        start += length
    assert state[0].tolist() == [start]
    return np.concatenate(pieces, axis=1)


@pytest.fixture(params=CONFIGS, scope="module")
def exported(request, tmp_path_factory):
    """(our functions and arrays, the folder, the PyTorch model of it)"""
    config = CONFIGS[request.param]
    functions, params, buffers = _weights(config)
    folder = export_folder(config, params, buffers, tmp_path_factory.mktemp("torch") / "hf")
    return (functions, params, buffers), folder, load_torch_model(folder)


def test_logits_are_ours_and_those_of_transformers(exported):
    (functions, params, buffers), folder, model = exported

    def forward(params, buffers):
        bound = functions.bind(params, buffers)
        return bound.logits(bound(jnp.asarray(TOKENS, jnp.int32)).hidden)

    found = _whole(model)
    assert np.abs(found).max() > 0.5
    np.testing.assert_allclose(found, jax.jit(forward)(params, buffers), atol=2e-5)
    if "full_attention" not in model.config.layer_types:
        return  # transformers counts the tokens of its cache in an attention layer
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        np.testing.assert_allclose(found, theirs(torch.from_numpy(TOKENS)).logits.numpy(), atol=2e-5)


@pytest.mark.parametrize("lengths", [[7] + [1] * 13, [1] * 20, [2, 3, 5, 10]], ids=["decode", "one_by_one", "chunks"])
def test_pieces_equal_the_whole(lengths, exported):
    """Across the sliding window and the convolution's width, in a state with more room than is used."""
    model = exported[-1]
    np.testing.assert_allclose(_in_pieces(model, lengths, 50), _whole(model), atol=1e-5)


def test_a_state_has_a_name_for_each_tensor(exported):
    config = exported[-1].config
    shapes = {"window": (3, config.conv_width - 1, 32), "keys": (3, 2, 9, 8), "values": (3, 2, 9, 8), "length": (1,)}
    named = dict(zip(state_names(config), initial_state(config, 3, 9), strict=True))
    assert all(tensor.shape == shapes[name.rpartition(".")[2]] for name, tensor in named.items())
    layers = [int(number) for name in named for number in re.findall(r"layers\.(\d+)\.(?:window|keys)", name)]
    assert layers == list(range(config.num_layers))


@pytest.mark.parametrize("position", [4095, 131_071])
def test_rotations_hold_far_out(position, tmp_path):
    """A state of that length whose keys are zeros, here and in our own cache."""
    config = dataclasses.replace(LFM3, layer_types=("sliding_attention", "full_attention"), context_length=262_144)
    functions, params, buffers = _weights(config)
    model = load_torch_model(export_folder(config, params, buffers, tmp_path / "hf"))
    capacity = position + 3
    length, *rest = initial_state(config, 2, capacity)
    found, _ = model(torch.from_numpy(TOKENS[:, :3]), (length + position, *rest))

    def forward(params, buffers):
        bound = functions.bind(params, buffers)
        cache = init_cache(config, 2, capacity, jnp.float32)._replace(lengths=jnp.full(2, position, jnp.int32))
        return bound.logits(bound(jnp.asarray(TOKENS[:, :3], jnp.int32), cache=cache).hidden)

    np.testing.assert_allclose(found, jax.jit(forward)(params, buffers), atol=2e-4)


def test_a_state_without_room_is_refused(tmp_path):
    _, params, buffers = _weights(LFM2)
    model = load_torch_model(export_folder(LFM2, params, buffers, tmp_path / "hf"))
    with pytest.raises(ValueError, match="a sequence would have 20 tokens, and its state has room for 19"):
        model(torch.from_numpy(TOKENS), initial_state(LFM2, 2, 19))


def test_a_bfloat16_export_is_read_as_its_rounded_weights(tmp_path):
    _, params, buffers = _weights(LFM3)
    folder = export_folder(LFM3, params, buffers, tmp_path / "hf", dtype="bfloat16")
    expected = torch.from_numpy(params["layers"][0]["mlp"]["gate"]).bfloat16().float().T
    assert torch.equal(load_torch_model(folder).layers[0]["mlp"]["gate"].weight, expected)


def test_the_model_is_for_inference(exported):
    model = exported[-1]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_missing_weights_are_named(tmp_path):
    _, params, buffers = _weights(LFM2)
    folder = export_folder(LFM2, params, buffers, tmp_path / "hf")
    (folder / "MANIFEST.sha256").unlink()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.feed_forward.w1.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tensor 'model.layers.1.feed_forward.w1.weight' is missing"):
        load_torch_model(folder)


def test_without_pytorch_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    with pytest.raises(ModuleNotFoundError, match=r"PyTorch is not installed; run: pip install .*\[export\]"):
        load_torch_model(tmp_path)
