"""Sampling: against repeated full forwards, alone and in a batch, and the distribution it draws from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.generation import SamplingConfig, generate
from lfm_jax.generation.sample import _choose
from lfm_jax.models import Decoder, ModelConfig, functional

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48,
)  # fmt: skip
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 2, 30, 12]]
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def weights():
    functions = functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
    params, buffers = functions.init(jax.random.key(0))
    # Away from initialization, where the logits of a tied model merely repeat the last token.
    params = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    return functions, params, buffers


def _generate(weights, prompts, sampling, config=CONFIG, **options):
    functions, params, buffers = weights
    return generate(functions, config, params, buffers, prompts, sampling, **options)


def _greedy_by_full_forwards(weights, prompt, count):
    functions, params, buffers = weights
    bound, tokens = functions.bind(params, buffers), list(prompt)
    for _ in range(count):
        logits = bound.logits(bound(jnp.asarray([tokens])).hidden[:, -1])
        tokens.append(int(jnp.argmax(logits)))
    return tokens[len(prompt) :]


def test_greedy_batch_of_unequal_prompts_equals_repeated_full_forwards(weights):
    expected = [_greedy_by_full_forwards(weights, prompt, 8) for prompt in PROMPTS]
    assert _generate(weights, PROMPTS, GREEDY) == expected


def test_generation_ends_with_the_stop_token(weights):
    whole = _generate(weights, PROMPTS, GREEDY)
    stop = whole[0][3]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert _generate(weights, PROMPTS, GREEDY, stop_ids=(stop,)) == expected


def test_same_seed_same_text_and_another_seed_another(weights):
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0, top_p=1.0)
    first = _generate(weights, PROMPTS, sampling)
    assert first == _generate(weights, PROMPTS, sampling)
    assert first != _generate(weights, PROMPTS, dataclasses.replace(sampling, seed=1))


def test_padded_vocab_is_never_sampled(weights):
    padded = dataclasses.replace(CONFIG, tokenizer_vocab_size=11)
    sampling = SamplingConfig(max_new_tokens=30, temperature=5.0, top_p=1.0)
    assert max(max(row) for row in _generate(weights, PROMPTS, sampling, padded)) <= 10
    assert max(max(row) for row in _generate(weights, PROMPTS, dataclasses.replace(sampling, temperature=0), padded)) <= 10


def test_draws_follow_the_tempered_nucleus():
    """20,000 draws against probabilities computed by hand; 4 standard deviations of a frequency are below 0.015."""
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    tempered = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    nucleus = tempered * [1, 1, 0, 0]  # 0.56 is short of 0.78, the second token crosses it; untempered it would be the third
    config = dataclasses.replace(CONFIG, vocab_size=4)
    sampling = SamplingConfig(temperature=0.8, top_p=0.78)
    draws = _choose(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (20_000, 4)), jnp.int32(0), config, sampling)
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 20_000, nucleus / nucleus.sum(), atol=0.015)


def test_every_row_and_every_step_draws_anew():
    logits, sampling = jnp.zeros((1_000, 40)), SamplingConfig(temperature=1.0, top_p=1.0)
    first, second = (np.asarray(_choose(logits, jnp.int32(step), CONFIG, sampling)) for step in (0, 1))
    assert len(set(first)) == 40
    assert np.mean(first == second) == pytest.approx(1 / 40, abs=0.02)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "0 prompts"), ([[1], []], "needs at least one token"), ([[40]], r"must be in 0..39, got 40..40")],
)
def test_bad_prompts_are_refused(weights, prompts, message):
    with pytest.raises(ValueError, match=message):
        _generate(weights, prompts, GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
    ],
)
def test_bad_sampling_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
