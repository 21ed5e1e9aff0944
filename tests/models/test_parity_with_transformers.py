"""The decoder against transformers' LFM2, LFM2-MoE and LFM3 in float32, weights carried over by the real export and import.

Norms, biases and expert biases are random and logits have unit scale, so that a swapped name shows.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lfm_jax.interop import export_folder, import_folder
from lfm_jax.models import Decoder, FunctionalModel, ModelConfig, MoEConfig, RopeConfig, functional, init_cache

pytestmark = pytest.mark.usefixtures("optimized_programs")

SEQ = 20
LOGIT_TOLERANCE = 2e-4  # absolute, for logits of unit scale
GRADIENT_TOLERANCE = 1e-3  # |ours - theirs| / |theirs|, Euclidean norms, each tensor for itself

DENSE = ModelConfig(
    vocab_size=97, embed_dim=48, layer_types=("conv", "full_attention", "conv", "full_attention"), num_heads=6, num_kv_heads=2,
    head_dim=8, mlp_dim=80, conv_bias=True,
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE, layer_types=("conv", "full_attention", "conv"), conv_bias=False, full_rope=RopeConfig(theta=5e6),
    moe=MoEConfig(num_experts=8, experts_per_token=3, mlp_dim=24, num_dense_layers=1, scaling_factor=1.7),
)  # fmt: skip
LFM3 = dataclasses.replace(
    DENSE, layer_types=("conv", "sliding_attention", "full_attention", "sliding_attention"), conv_width=7, conv_bias=False,
    head_dim=16, sliding_window=5, sandwich_norms=True, attention_gate=True, full_rope=RopeConfig(fraction=0.5),
)  # fmt: skip
CONFIGS = {
    "dense_biases_tied": DENSE,
    "dense_untied": dataclasses.replace(DENSE, conv_bias=False, tie_embeddings=False, head_dim=16, norm_eps=1e-3),
    "moe_normalized": MOE,
    "moe_unnormalized": dataclasses.replace(
        MOE, tie_embeddings=False, moe=dataclasses.replace(MOE.moe, normalize_weights=False, scaling_factor=0.6)
    ),
    "moe_without_bias": dataclasses.replace(MOE, conv_width=4, moe=dataclasses.replace(MOE.moe, expert_bias=False)),
    "lfm3": LFM3,
    # 0.7 of five pairs is 3.5: which pairs rotate is a matter of rounding.
    "lfm3_bare": dataclasses.replace(
        LFM3, head_dim=10, full_rope=RopeConfig(theta=100.0, fraction=0.7), sandwich_norms=False,
        attention_gate=False, conv_bias=True, tie_embeddings=False,
    ),
}  # fmt: skip


class Ours(NamedTuple):
    """Our side of a pair; forward: (params, buffers, tokens) -> logits, jitted."""

    config: ModelConfig
    functions: FunctionalModel
    params: dict
    buffers: dict
    forward: Callable


def _random_weights(config):
    """(functions, params, buffers): matrices as initialized, everything else random around its usual value."""
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    params, buffers = functions.init(jax.random.key(0))
    generator = np.random.default_rng(1)

    def redraw(path, leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "embedding":
            return noise * config.embed_dim**-0.5
        return 0.4 * noise if name.endswith("bias") else leaf

    return functions, *(jax.tree_util.tree_map_with_path(redraw, tree) for tree in (params, buffers))


def _tokens(config, batch=2):
    """Without id 0: transformers lets no gradient into the padding token's embedding."""
    return np.random.default_rng(2).integers(1, config.vocab_size, (batch, SEQ)).astype(np.int32)


def _load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(ours, transformers' model with the same weights)."""
    config = CONFIGS[request.param]
    functions, params, buffers = _random_weights(config)
    folder = export_folder(config, params, buffers, tmp_path_factory.mktemp("export") / "hf")
    return Ours(config, functions, params, buffers, _forward(functions)), _load(folder)


def _forward(functions):
    @jax.jit
    def forward(params, buffers, tokens):
        model = functions.bind(params, buffers)
        return model.logits(model(tokens).hidden)

    return forward


def _their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def test_full_forward(pair):
    ours, theirs = pair
    tokens = _tokens(ours.config)
    expected = _their_logits(theirs, tokens)
    assert 0.5 < expected.std() < 2
    logits = ours.forward(ours.params, ours.buffers, tokens)
    assert logits.shape == (2, SEQ, ours.config.vocab_size)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_cached_decode(pair):
    """A prompt of 7, then single steps, on both sides with their own caches."""
    (config, functions, params, buffers, _), theirs = pair
    tokens, prompt = _tokens(config), 7

    @jax.jit
    def step(params, buffers, tokens, cache):
        model = functions.bind(params, buffers)
        output = model(tokens, cache=cache)
        return model.logits(output.hidden), output.cache

    cache, past = init_cache(config, 2, SEQ, jnp.float32), None
    for start, end in [(0, prompt)] + [(index, index + 1) for index in range(prompt, SEQ)]:
        logits, cache = step(params, buffers, tokens[:, start:end], cache)
        with torch.no_grad():
            output = theirs(torch.from_numpy(tokens[:, start:end]).long(), past_key_values=past, use_cache=True)
        past = output.past_key_values
        np.testing.assert_allclose(logits, output.logits.numpy(), rtol=0, atol=LOGIT_TOLERANCE, err_msg=f"position {start}")


def test_gradients_of_the_mean_next_token_loss(pair, tmp_path):
    """transformers' gradients are saved as if they were weights, and come back through the importer under our names."""
    ours, theirs = pair
    tokens = _tokens(ours.config)

    def loss(params):
        log_probs = jax.nn.log_softmax(ours.forward(params, ours.buffers, tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss))(ours.params)
    labels = torch.from_numpy(tokens).long()
    their_loss = theirs(labels, labels=labels, use_cache=False).loss
    np.testing.assert_allclose(value, their_loss.item(), rtol=1e-5)
    theirs.zero_grad()
    their_loss.backward()
    weights = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[name])

    def compare(path, gradient, expected):
        error = np.linalg.norm(np.ravel(gradient - expected)) / np.linalg.norm(np.ravel(expected))
        assert error <= GRADIENT_TOLERANCE, (path, error)

    jax.tree_util.tree_map_with_path(compare, gradients, import_folder(tmp_path).params)


def test_their_random_weights_import(pair, tmp_path):
    """A checkpoint that transformers initialized and saved gives its logits here, and its configuration is ours."""
    ours, theirs = pair
    torch.manual_seed(3)
    model = type(theirs)(theirs.config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                noise = torch.randn_like(tensor)
                vector = tensor.ndim == 1
                tensor.copy_(0.4 * noise + float("norm" in name) if vector else noise * tensor.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    imported = import_folder(tmp_path)
    assert imported.config == ours.config
    tokens = _tokens(ours.config)
    logits = ours.forward(imported.params, imported.buffers, tokens)
    np.testing.assert_allclose(logits, _their_logits(model, tokens), rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("change", ["bias", "scaling", "normalization"])
def test_lfm2moe_router_sigmoid_bias_selects_only_scaling(change, tmp_path):
    """Each part of the router matters at these weights: without it the logits are far from transformers'."""
    functions, params, buffers = _random_weights(MOE)
    expected = _their_logits(_load(export_folder(MOE, params, buffers, tmp_path / "hf")), _tokens(MOE))
    altered = {
        "bias": MOE.moe,
        "scaling": dataclasses.replace(MOE.moe, scaling_factor=1.0),
        "normalization": dataclasses.replace(MOE.moe, normalize_weights=False),
    }[change]
    if change == "bias":
        buffers = jax.tree.map(np.zeros_like, buffers)
    functions = functional(lambda rngs: Decoder(dataclasses.replace(MOE, moe=altered), rngs=rngs))
    logits = _forward(functions)(params, buffers, _tokens(MOE))
    assert np.abs(logits - expected).max() > 0.05
