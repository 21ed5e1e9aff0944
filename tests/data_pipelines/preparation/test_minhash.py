"""Signatures: both implementations against true similarities and against the package datasketch."""

import math
import sys

import datasketch
import numpy as np
import pytest

from data_pipelines.preparation.minhash import agreement, minhash_signatures
from lfm_jax.configuration import ConfigError

PERMUTATIONS, SIZE = 128, 400
SIMILARITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97)


def pairs(generator, similarity, count):
    """Pairs of sets of SIZE random numbers whose Jaccard similarity is next to the one given, and what it is."""
    shared = round(2 * SIZE * similarity / (1 + similarity))
    for _ in range(count):
        numbers = generator.integers(0, 1 << 64, 2 * SIZE - shared, dtype=np.uint64)
        yield numbers[:SIZE], numbers[len(numbers) - SIZE :], shared / (2 * SIZE - shared)


def signatures(sets, implementation, seed=0):
    return minhash_signatures(np.concatenate(sets), np.cumsum([len(own) for own in sets]), PERMUTATIONS, seed, implementation)


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_estimate_is_as_good_as_the_theory_says(implementation, similarity):
    """Mean and spread of 200 estimates: sqrt(J (1 - J) / permutations), with room for four standard errors."""
    found = list(pairs(np.random.default_rng(1), similarity, 200))
    rows = signatures([own for first, second, _ in found for own in (first, second)], implementation)
    estimates = np.array([agreement(rows[at], rows[at + 1]) for at in range(0, len(rows), 2)])
    true = found[0][2]
    expected = math.sqrt(true * (1 - true) / PERMUTATIONS)
    # The hash functions are the same for all pairs, so their luck is too: a share of the spread stays in the mean.
    assert abs(estimates.mean() - true) < 4 * expected / math.sqrt(200) + 0.006
    assert expected * 0.75 - 1e-9 <= estimates.std() <= expected * 1.25


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_datasketch_estimates_the_same(implementation):
    """Each is off by its own error; the difference of the two estimates has the sum of the two variances."""
    found = [pair for similarity in SIMILARITIES[1:] for pair in pairs(np.random.default_rng(2), similarity, 12)]
    rows = signatures([own for first, second, _ in found for own in (first, second)], implementation)
    scores = []
    for at, (first, second, true) in enumerate(found):
        theirs = [datasketch.MinHash(PERMUTATIONS, seed=3, hashfunc=lambda value: value & 0xFFFFFFFF) for _ in range(2)]
        for minhash, own in zip(theirs, (first, second), strict=True):
            minhash.update_batch(own.tolist())
        ours = agreement(rows[2 * at], rows[2 * at + 1])
        scores.append((ours - theirs[0].jaccard(theirs[1])) / math.sqrt(2 * true * (1 - true) / PERMUTATIONS))
    assert abs(np.mean(scores)) < 0.5 and 0.7 < np.std(scores) < 1.4


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_a_signature_depends_on_the_set_and_the_seed_alone(implementation):
    generator = np.random.default_rng(4)
    first, second = (generator.integers(0, 1 << 64, size, dtype=np.uint64) for size in (7, 900))
    alone = signatures([second], implementation)
    together = signatures([first, second, second[::-1], np.tile(second, 2)], implementation)
    assert (together[1:] == alone).all() and not (together[0] == alone).any()
    assert agreement(alone, signatures([second], implementation, seed=1)) < 0.1
    assert together.shape == (4, PERMUTATIONS) and together.dtype == np.uint32
    assert minhash_signatures(first[:0], np.zeros(0, np.int64), 16, 0, implementation).shape == (0, 16)


def test_the_signatures_are_the_ones_of_always():
    """Written down: workdirs of an interrupted run hold them."""
    own = [np.arange(1, 6, dtype=np.uint64)]
    assert signatures(own, "numpy")[0, :3].tolist() == [360558867, 48199392, 973224682]
    assert signatures(own, "rensa")[0, :3].tolist() == [3278328842, 3259546726, 3267267198]


def test_without_rensa_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match="rensa, .* is not installed: pip install rensa, or set near_duplicates.implementation"):
        signatures([np.ones(1, np.uint64)], "rensa")
    assert signatures([np.ones(1, np.uint64)], "numpy").shape == (1, PERMUTATIONS)
