"""A small model, requests, and what answers must be: those of full forward passes over their own tokens."""

import dataclasses
import functools

import jax
import numpy as np
import scipy.special

from lfm_jax.generation import Engine, EngineConfig, Request, SamplingConfig
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=32, layer_types=("conv", "full_attention", "sliding_attention", "conv"), num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=48, sliding_window=5, conv_width=4, context_length=128,
)  # fmt: skip
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=24, num_dense_layers=1)
MOE = dataclasses.replace(CONFIG, moe=EXPERTS, layer_types=("conv", "full_attention"))
LENGTHS = (3, 1, 6, 30, 17, 3)
NEW = 12
GREEDY = SamplingConfig(max_new_tokens=NEW, temperature=0)
ALL = EngineConfig()
SMALL = EngineConfig(slots=2, prefill_chunk=8, prefill_rows=2, steps=5)


@functools.cache
def weights(config=CONFIG, dtype="float32"):
    functions = functional(lambda rngs: Decoder(config, ComputeConfig(dtype=dtype), rngs=rngs))
    params, buffers = functions.init(jax.random.key(0))
    # Away from initialization, where the logits of a tied model merely repeat the last token.
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return functions, config, params, buffers


@functools.cache
def last_logits(config=CONFIG):
    functions, _, params, buffers = weights(config)

    @jax.jit
    def logits(tokens, length):
        model = functions.bind(params, buffers)
        hidden = jax.lax.dynamic_slice_in_dim(model(tokens).hidden, length - 1, 1, axis=1)
        return model.logits(hidden)[0, 0]

    return logits


def forward(config=CONFIG):
    return lambda tokens, length: jax.nn.log_softmax(last_logits(config)(tokens, length))


@functools.cache
def by_full_forwards(prompt, count=NEW, config=CONFIG, penalty=1.0):
    """Greedy tokens and their log-probabilities; what is behind a token cannot change it."""
    tokens, found = list(prompt), []
    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.array(last_logits(config)(padded, len(tokens)))
        log_probs = scipy.special.log_softmax(logits)
        for seen in set(tokens):
            logits[seen] = logits[seen] / penalty if logits[seen] > 0 else logits[seen] * penalty
        tokens.append(int(np.argmax(logits)))
        found.append(float(log_probs[tokens[-1]]))
    return tokens[len(prompt) :], found


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(map(int, rng.integers(1, 40, length))) for length in LENGTHS]


def engine(settings=ALL, config=CONFIG, **options):
    return Engine(*weights(config), settings, **options)


def greedy(prompt, new_tokens, penalty=1.0):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=new_tokens, repetition_penalty=penalty)
    return Request(prompt=prompt, sampling=sampling)


def requests(**changes):
    return [Request(prompt=prompt, sampling=GREEDY, **changes) for prompt in prompts()]


def check(answers, asked, config=CONFIG, atol=2e-5):
    """Against full forward passes; log-probabilities within float32 rounding over a few layers, more of it in long answers."""
    for answer, request in zip(answers, asked, strict=True):
        sampling = request.sampling
        tokens, log_probs = by_full_forwards(request.prompt, sampling.max_new_tokens, config, sampling.repetition_penalty)
        assert answer.tokens == tokens and answer.finish_reason == "length"
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=atol)


def words_of(tokens):
    return "".join(f"<{token}>" for token in tokens)
