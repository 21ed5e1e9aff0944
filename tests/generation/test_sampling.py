"""Choosing tokens: against transformers' logits processors, and the distribution that draws follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.generation import SamplingConfig
from lfm_jax.generation.sampling import _draw, choose, needs_of, processed, settings_of

EVERYTHING = SamplingConfig(temperature=1.0, top_p=1.0)
VOCAB = 1_000


def _choose(logits, configs, drawn_before, known=None):
    """By the settings of each row; drawn_before: of each row, or of all."""
    before = jnp.broadcast_to(jnp.asarray(drawn_before, jnp.int32), (len(configs),))
    return np.asarray(choose(logits, settings_of(configs), before, None, needs_of(configs), known or logits.shape[1])[0])


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=0.7, top_p=1.0),
        SamplingConfig(temperature=1.3, top_k=7, top_p=1.0),
        SamplingConfig(temperature=0.8, top_p=0.9),
        SamplingConfig(temperature=1.0, top_p=1e-6),
        SamplingConfig(temperature=1.0, top_p=1.0, min_p=0.1),
        SamplingConfig(temperature=0.9, top_k=50, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        SamplingConfig(temperature=0, repetition_penalty=1.3),
    ],
)
def test_logits_are_processed_as_transformers_does(config):
    import torch
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2, size=(3, VOCAB)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (3, 200))
    seen = np.zeros((3, VOCAB), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    steps = [theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    if config.temperature:
        steps.append(theirs.TemperatureLogitsWarper(config.temperature))
        steps += [theirs.TopKLogitsWarper(config.top_k)] if config.top_k else []
        steps += [theirs.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
        steps += [theirs.MinPLogitsWarper(config.min_p)] if config.min_p else []
    expected = theirs.LogitsProcessorList(steps)(torch.tensor(tokens), torch.tensor(logits)).numpy()
    configs = [config] * 3
    ours = processed(jnp.asarray(logits), settings_of(configs), jnp.asarray(seen), needs_of(configs))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)  # the infinite ones are in the same places


def test_rows_keep_their_own_settings():
    logits = jax.random.normal(jax.random.key(0), (4, VOCAB))
    configs = [
        SamplingConfig(temperature=0), SamplingConfig(temperature=2.0, top_k=3, top_p=1.0), EVERYTHING,
        SamplingConfig(temperature=0.5, top_p=0.5, min_p=0.2),
    ]  # fmt: skip
    together = processed(logits, settings_of(configs), None, needs_of(configs))
    for row, config in enumerate(configs):
        alone = processed(logits[row : row + 1], settings_of([config]), None, needs_of([config]))
        np.testing.assert_array_equal(together[row], alone[0])


def test_equally_likely_tokens_stay_or_go_together():
    logits = jnp.log(jnp.asarray([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for config, kept in [(dataclasses.replace(EVERYTHING, top_k=2), 3), (dataclasses.replace(EVERYTHING, top_p=0.5), 3)]:
        assert np.isfinite(processed(logits, settings_of([config]), None, needs_of([config]))).sum() == kept


def test_draws_follow_the_tempered_nucleus():
    """20,000 draws against probabilities computed by hand; 4 standard deviations of a frequency are below 0.015."""
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    tempered = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
    nucleus = tempered * [1, 1, 0, 0]  # 0.56 is short of 0.78, the second token crosses it; untempered it would be the third
    rows = [SamplingConfig(temperature=0.8, top_p=0.78, seed=seed) for seed in range(20_000)]
    draws = _choose(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (20_000, 4)), rows, 0)
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / 20_000, nucleus / nucleus.sum(), atol=0.015)


def test_draws_over_many_tokens_follow_their_probabilities():
    """Over several blocks of the search, each with weight; chi-squared of 999 degrees of freedom is below 1,200 (p = 1e-5)."""
    logits = jax.random.normal(jax.random.key(1), (1, VOCAB))
    rows = [dataclasses.replace(EVERYTHING, seed=seed) for seed in range(100_000)]
    draws = _choose(jnp.broadcast_to(logits, (100_000, VOCAB)), rows, 0)
    expected = np.asarray(jax.nn.softmax(logits[0])) * 100_000
    assert ((np.bincount(draws, minlength=VOCAB) - expected) ** 2 / expected).sum() < 1_200


def test_a_token_without_probability_is_never_drawn():
    """Even where the uniform number is 0 or next to 1, and the first and last blocks of the vocabulary are empty."""
    uniform = jnp.asarray([0.0, 1e-30, 0.3, 1 - 2**-24, 1.0])
    logits = jnp.full((5, 1_100), -jnp.inf).at[:, 400:403].set(0.0).at[:, 401].set(-jnp.inf)
    assert list(np.asarray(_draw(logits, uniform))) == [400, 400, 400, 402, 402]


def test_every_seed_and_every_step_draws_anew():
    logits = jnp.zeros((1_000, 40))
    rows = [dataclasses.replace(EVERYTHING, seed=seed) for seed in range(1_000)]
    first, second = _choose(logits, rows, 0), _choose(logits, rows, 1)
    assert len(set(first)) == 40
    assert np.mean(first == second) == pytest.approx(1 / 40, abs=0.02)
    np.testing.assert_array_equal(first, _choose(logits, rows, 0))


def test_padded_vocab_is_never_chosen():
    logits = jnp.broadcast_to(jnp.arange(40.0), (500, 40))
    rows = [SamplingConfig(temperature=50.0, top_p=1.0, seed=seed) for seed in range(499)] + [SamplingConfig(temperature=0)]
    chosen = _choose(logits, rows, 0, known=11)
    assert chosen.max() == 10 == chosen[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1"),
        ({"temperature": float("nan")}, "temperature must not be negative, got nan"),
        ({"greedy_as": 0.0}, "greedy_as must be a temperature above 0, got 0"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"seed": -1}, r"seed must be in 0\.\.4294967295, got -1"),
    ],
)
def test_bad_sampling_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
