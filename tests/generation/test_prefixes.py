"""Kept conversations: which one a prompt goes on from, and how many stay."""

import jax.numpy as jnp
import pytest

from lfm_jax.generation.prefixes import Prefixes
from lfm_jax.models import DecoderCache, ModelConfig, init_cache

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
)
CACHE = init_cache(CONFIG, 1, 16, jnp.float32)
BYTES = 4 + 4 * (2 * 32 + 2 * 16 * 16)


def test_the_longest_that_is_all_in_the_prompt_is_found():
    prefixes = Prefixes(CONFIG, 10 * BYTES)
    for tokens in ([1], [1, 2, 3], [1, 2, 3, 4], [9]):
        prefixes.keep(tokens, CACHE)
    assert prefixes.longest([1, 2, 3, 4, 5])[0] == 4
    assert prefixes.longest([1, 2, 3, 7])[0] == 3
    assert prefixes.longest([7, 1]) is None


def test_a_prefix_that_goes_on_otherwise_is_a_miss():
    """Its keys would serve for two tokens, but the convolution's window after two tokens is gone."""
    prefixes = Prefixes(CONFIG, 10 * BYTES)
    prefixes.keep([1, 2, 3, 4], CACHE)
    assert prefixes.longest([1, 2, 9, 9, 9]) is None


def test_a_prompt_that_was_read_whole_is_a_miss():
    """Nothing would be read, and the hidden state of the last token is not kept."""
    prefixes = Prefixes(CONFIG, 10 * BYTES)
    prefixes.keep([1, 2], CACHE)
    assert prefixes.longest([1, 2]) is None


@pytest.mark.parametrize(("index", "kind"), [(0, "conv"), (1, "full_attention")])
def test_a_cache_without_a_state_is_refused(index, kind):
    layers = list(CACHE.layers)
    layers[index] = layers[index]._replace(**dict.fromkeys(layers[index]._fields))
    for damaged in (layers, layers[:index] + [None] + layers[index + 1 :]):
        with pytest.raises(ValueError, match=rf"block {index} \({kind}\) has no state"):
            Prefixes(CONFIG, 10 * BYTES).keep([1], DecoderCache(CACHE.lengths, tuple(damaged)))


def test_the_least_recently_used_goes_first():
    prefixes = Prefixes(CONFIG, 2 * BYTES + 1)
    prefixes.keep([1], CACHE)
    prefixes.keep([2], CACHE)
    prefixes.longest([1, 5])
    prefixes.keep([3], CACHE)
    assert len(prefixes) == 2 and prefixes.bytes == 2 * BYTES
    assert [prefixes.longest([token, 5]) is not None for token in (1, 2, 3)] == [True, False, True]


def test_what_is_larger_than_all_room_is_not_kept():
    prefixes = Prefixes(CONFIG, BYTES - 1)
    prefixes.keep([1], CACHE)
    assert len(prefixes) == 0 == prefixes.bytes
