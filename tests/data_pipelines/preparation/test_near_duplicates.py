"""Near duplicates against all pairs, and the banding against its formula."""

import itertools

import datasketch
import numpy as np
import pytest

from data_pipelines.preparation import near_duplicates
from data_pipelines.preparation.exact_duplicates import text_digest
from data_pipelines.preparation.minhash import agreement
from data_pipelines.preparation.near_duplicates import (
    NearDuplicatesConfig,
    band_keys,
    candidate_probability,
    choose_bands,
    find_clusters,
    signatures_of,
)
from data_pipelines.preparation.word_hashes import WordHashes, plain_words


@pytest.mark.parametrize("threshold, permutations", [(0.5, 128), (0.7, 256), (0.8, 128), (0.9, 64)])
def test_the_bands_are_datasketchs(threshold, permutations):
    theirs = datasketch.MinHashLSH(threshold, permutations, weights=(0.1, 0.9))
    assert choose_bands(threshold, permutations) == (theirs.b, theirs.r)


def test_a_certain_threshold_has_bands_too():
    bands, rows = choose_bands(1.0, 32)
    assert 1 <= bands * rows <= 32


def test_candidates_come_with_the_probability_of_the_formula():
    """Signatures with independent entries that agree with a known probability: 4,000 pairs at each, within four deviations."""
    generator = np.random.default_rng(0)
    bands, rows, count = 14, 9, 4000
    for similarity in (0.5, 0.7, 0.8, 0.9):
        first = generator.integers(0, 1 << 32, (count, bands * rows + 2), dtype=np.uint32)
        second = np.where(generator.random(first.shape) < similarity, first, ~first)
        same = (band_keys(first, bands, rows) == band_keys(second, bands, rows)).any(axis=0).mean()
        expected = candidate_probability(similarity, bands, rows)
        assert abs(same - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)
    assert candidate_probability(0.8, 14, 9) == pytest.approx(1 - (1 - 0.8**9) ** 14)


def test_the_same_entries_in_another_band_are_another_key():
    signature = np.tile(np.arange(9, dtype=np.uint32), (1, 2))
    shuffled = signature[:, ::-1]
    keys = [band_keys(own, 2, 9) for own in (signature, shuffled)]
    assert keys[0].shape == (2, 1) and (keys[0] != keys[1]).all()


def corpus(seed=0, originals=60):
    """Texts of 300 words, and after each of them copies with ever more words changed; (texts, shingle sets)."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(originals):
        words = generator.integers(0, 5000, 300)
        texts.append(words)
        for changes in (1, 2, 4, 8, 20):
            copy = words.copy()
            copy[generator.choice(300, changes, replace=False)] = generator.integers(0, 5000, changes)
            texts.append(copy)
    order = generator.permutation(len(texts))
    texts = [" ".join(f"w{word}" for word in texts[at]) for at in order]
    return texts, [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in map(str.split, texts)]


def measured(texts, config):
    hashes = WordHashes()
    digests = np.frombuffer(b"".join(map(text_digest, texts)), "<u8").reshape(-1, 2)
    signatures = signatures_of([hashes(plain_words(text)) for text in texts], digests, config)
    return signatures, band_keys(signatures, *config.bands)


def components(count, edges):
    """The first document of each document's component, by brute force."""
    first = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other in edges:
            least = min(first[one], first[other])
            changed |= first[one] != least or first[other] != least
            first[one] = first[other] = least
    return first


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_clusters_are_those_of_all_candidate_pairs(implementation):
    texts, _ = corpus()
    config = NearDuplicatesConfig(implementation=implementation)
    signatures, keys = measured(texts, config)
    pairs = itertools.combinations(range(len(texts)), 2)
    candidates = [pair for pair in pairs if (keys[:, pair[0]] == keys[:, pair[1]]).any()]
    edges = [(one, other) for one, other in candidates if agreement(signatures[one], signatures[other]) >= config.threshold]
    found = find_clusters(np.arange(len(texts)), len(texts), keys, signatures.__getitem__, config.threshold)
    assert 100 < len(edges) < len(candidates)
    assert found.kept.tolist() == components(len(texts), edges)
    for document, kept in enumerate(found.kept):
        assert found.similarity[document] == np.float32(agreement(signatures[document], signatures[kept]))


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_recall_and_precision_against_all_pairs_of_true_similarities(implementation):
    """What must be found is: pairs well above the threshold, as often as the formula says; well below it nothing is."""
    texts, sets = corpus(seed=1, originals=25)
    config = NearDuplicatesConfig(implementation=implementation)
    signatures, keys = measured(texts, config)
    found = find_clusters(np.arange(len(texts)), len(texts), keys, signatures.__getitem__, config.threshold)
    recalled, expected, wrong = [], [], []
    for one, other in itertools.combinations(range(len(texts)), 2):
        true = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
        together = found.kept[one] == found.kept[other]
        if true >= 0.9:
            recalled.append(together)
            expected.append(candidate_probability(true, *config.bands))
        wrong.append(together and true < 0.55)
    deviation = np.sqrt(sum(chance * (1 - chance) for chance in expected))
    assert len(recalled) > 60
    assert sum(recalled) >= sum(expected) - 4 * deviation and np.mean(recalled) > 0.97
    # 0.55 is over six standard deviations from the threshold of 0.8; a chain goes two steps down at most here.
    assert not any(wrong)


def test_only_the_documents_looked_at_are_clustered():
    texts = ["one two three four five six seven"] * 4
    signatures, keys = measured(texts, NearDuplicatesConfig())
    found = find_clusters(np.array([1, 3]), 4, keys, signatures.__getitem__, 0.8)
    assert found.kept.tolist() == [0, 1, 2, 1]


def test_short_and_wordless_documents():
    """One with few words is compared by all of them together, one with none by its text."""
    texts = ["one two", "one, two!", "one", "two one", "?!", "!?", " ?! ", "one two three four five", "One two three four five."]
    signatures, keys = measured(texts, NearDuplicatesConfig())
    found = find_clusters(np.arange(len(texts)), len(texts), keys, signatures.__getitem__, 0.8)
    assert found.kept.tolist() == [0, 0, 2, 3, 4, 5, 4, 7, 7]


def test_a_bucket_of_many_different_documents_takes_bounded_work(monkeypatch):
    """All keys alike, nothing similar: `_MOST_LEADERS` rounds, not one for each document."""
    monkeypatch.setattr(near_duplicates, "_MOST_LEADERS", 5)
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (300, 16), dtype=np.uint32)
    asked = []

    def rows(documents):
        asked.append(len(documents))
        return signatures[documents]

    found = find_clusters(np.arange(300), 300, [np.zeros(300, np.uint64)], rows, 0.5)
    assert asked == [300, 299, 298, 297, 296] and found.kept.tolist() == list(range(300))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        ({"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        ({"ngram_words": 0}, "ngram_words and permutations must be positive, got 0 and 128"),
        ({"permutations": 0}, "ngram_words and permutations must be positive, got 5 and 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NearDuplicatesConfig(**settings)
