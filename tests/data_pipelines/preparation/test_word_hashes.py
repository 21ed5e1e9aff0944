"""Words and runs of words as numbers."""

import hashlib

import numpy as np

from data_pipelines.preparation import word_hashes
from data_pipelines.preparation.word_hashes import WordHashes, mix, ngram_hashes, plain_words


def test_words_have_no_case_and_no_punctuation():
    assert plain_words("It's \u00c9t\u00e9, 3.14 -- snake_case!") == ["it", "s", "\u00e9t\u00e9", "3", "14", "snake_case"]


def test_a_word_is_hashed_by_blake2b_also_after_the_table_was_emptied(monkeypatch):
    monkeypatch.setattr(word_hashes, "_MOST_WORDS", 2)
    hashes = WordHashes()
    words = ["a", "b", "caf\u00e9", "a", "a"]
    expected = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in words]
    assert hashes(words).tolist() == hashes(words).tolist() == expected
    assert len(hashes._known) == 3


def test_mix_is_splitmix64():
    """The first values of the generator with seed 0, as published with it: mix of multiples of the golden ratio."""
    states = np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 4, dtype=np.uint64)
    assert [f"{value:x}" for value in mix(states)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "6c45d188009454f"]


def test_ngrams_are_equal_where_their_words_are():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 3, 500).astype(np.uint64)
    for length in (1, 2, 5):
        numbers = ngram_hashes(words, length)
        runs = [tuple(words[at : at + length].tolist()) for at in range(len(words) - length + 1)]
        assert len(numbers) == len(runs)
        assert len(dict(zip(runs, numbers.tolist(), strict=True))) == len(set(numbers.tolist())) == len(set(runs))
        assert len(set(zip(runs, numbers.tolist(), strict=True))) == len(set(runs))
    assert len(ngram_hashes(words[:4], 5)) == 0
