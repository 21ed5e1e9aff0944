"""Exact duplicates against a dictionary."""

import numpy as np

from data_pipelines.preparation.exact_duplicates import first_of_equal, normalised, text_digest


def test_what_is_the_same_text():
    assert normalised("  Caf\u0065\u0301 \n\n\tau  lait\r\n") == "Caf\u00e9 au lait"
    assert text_digest("a  b\n") == text_digest(" a b") != text_digest("ab")
    assert text_digest("A b") != text_digest("a b")


def test_the_digest_is_the_one_of_always():
    """What `printf 'a b' | b2sum -l 128` says; workdirs of an interrupted run hold it."""
    assert text_digest("a\nb").hex() == "acc9227cc02e5f5c13e74125bce89499"


def test_first_of_equal_is_what_a_dictionary_finds():
    generator = np.random.default_rng(0)
    # Few different values in either half: equal in one of them is not equal.
    digests = generator.integers(0, 20, (2000, 2), dtype=np.uint64) << np.uint64(60)
    firsts: dict = {}
    expected = [firsts.setdefault(tuple(digest), index) for index, digest in enumerate(digests.tolist())]
    assert 20 < len(firsts) < 2000
    assert first_of_equal(digests).tolist() == expected
    assert first_of_equal(digests[:0]).tolist() == []
    assert first_of_equal(digests[:1]).tolist() == [0]
