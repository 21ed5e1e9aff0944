"""The source does draw what it says, and its entropy is what it says: against a loop in plain Python, and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.stats

from data_pipelines.sources.known_entropy import KnownEntropyConfig, KnownEntropySource

SMALL = {"symbols": 7, "first_id": 3, "order_weights": (0.3, 0.2, 0.2), "topic_weight": 0.1, "end": 0.2, "longest": 9}


def source(**settings):
    return KnownEntropySource(KnownEntropyConfig(**SMALL | settings))


def mixed(number):
    """SplitMix64's next output for a state, in Python's integers (Steele, Lea and Flood 2014, figure 17)."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def next_probabilities(config, before):
    """By the description of the mixture, symbol by symbol."""
    shares = [1 / rank**config.zipf for rank in range(1, config.symbols + 1)]
    ends = [round(2**16 * sum(shares[: rank + 1]) / sum(shares)) for rank in range(config.symbols)]
    levels = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    left = 1 - sum(config.order_weights) - config.topic_weight
    found = [left * level / 2**16 for level in levels]
    of_orders = [tuple(reversed(([0] * order + before)[-order:])) for order in range(1, len(config.order_weights) + 1)]
    contexts = [*of_orders, ((before or [0])[-1], (before or [0])[0])]  # the last in the lowest byte
    part = 0
    for context, weight in zip(contexts, (*config.order_weights, config.topic_weight), strict=True):
        key = sum(symbol << 8 * place for place, symbol in enumerate(context))
        for share in config.favourites:
            part += 1
            level = mixed(key ^ mixed(config.seed << 16 | part)) >> 48
            found[next(symbol for symbol, end in enumerate(ends) if level < end)] += weight * share
    return found


def test_probabilities_are_those_of_the_mixture():
    for settings in ({}, {"seed": 5, "favourites": (1.0,)}, {"order_weights": (0.5,), "zipf": 0.7}):
        known = source(**settings)
        for document in itertools.islice(known.documents(seed=1, tokens=200), 12):
            found = known.probabilities(document)
            wanted = [next_probabilities(known.config, document[:place].tolist()) for place in range(len(document) + 1)]
            np.testing.assert_allclose(found, wanted, rtol=1e-12)
            np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)


def test_what_is_drawn_has_these_probabilities():
    """Chi-square of the symbols that follow the commonest beginnings, of all lengths up to three."""
    known = source()
    documents = list(known.documents(seed=3, tokens=300_000))
    for length in range(4):
        following: dict[bytes, list[int]] = {}
        for document in documents:
            if len(document) > length:
                following.setdefault(document[:length].tobytes(), []).append(int(document[length]) - known.config.first_id)
        beginning, symbols = max(following.items(), key=lambda item: len(item[1]))
        expected = len(symbols) * np.array(next_probabilities(known.config, list(beginning)))
        observed = np.bincount(symbols, minlength=known.config.symbols)
        assert len(symbols) > 500 and scipy.stats.chisquare(observed, expected).pvalue > 0.001


def test_log_loss_is_that_of_the_documents_and_its_mean_the_entropy():
    known = source(symbols=60, longest=40)
    documents = list(known.documents(seed=0, tokens=60_000))
    found = known.certainty(documents)
    assert len(found.log_loss) == sum(len(document) + 1 for document in documents)
    off = found.log_loss - found.entropy
    assert abs(off.mean()) < 4 * off.std() / len(off) ** 0.5
    config, document = known.config, documents[0].tolist()
    p = [next_probabilities(config, document[:place])[symbol - config.first_id] for place, symbol in enumerate(document)]
    by_hand = -np.log(p).sum() - (len(document) - 1) * np.log(1 - config.end) - np.log(config.end)
    assert known.certainty([documents[0]]).log_loss.sum() == pytest.approx(by_hand, rel=1e-12)


def test_without_favourites_the_entropy_is_that_of_the_zipf_law_and_of_the_end():
    known = source(symbols=50, order_weights=(0.0,), topic_weight=0.0)
    of_symbol = scipy.stats.entropy(1 / np.arange(1, 51))
    end = known.config.end
    document = np.array([3, 4, 5], np.uint8)
    inside = (1 - end) * of_symbol + scipy.stats.entropy([end, 1 - end])
    np.testing.assert_allclose(known.certainty([document]).entropy, [of_symbol, inside, inside, inside], rtol=1e-5)


def test_the_longest_document_must_end():
    known = source(end=1e-9)
    document = next(known.documents(seed=0, tokens=9))
    assert len(document) == known.config.longest
    found = known.certainty([document])
    assert found.log_loss[-1] == found.entropy[-1] == 0 and (found.entropy[:-1] > 0).all()


def test_documents_depend_on_the_seeds_alone_and_have_as_many_symbols_as_wanted():
    draw = lambda seed, tokens, **settings: list(source(**settings).documents(seed, tokens))
    first, again = draw(1, 5000), draw(1, 4000)
    assert sum(map(len, first)) == 5000 and sum(map(len, again)) == 4000
    assert all((a == b).all() for a, b in zip(again[:-1], first, strict=False))
    assert draw(2, 50)[0].tolist() != first[0].tolist()
    ids = np.concatenate(first)
    assert ids.min() == 3 and ids.max() == 9
    lengths = np.array(list(map(len, first[:-1])))
    assert lengths.min() == 1 and lengths.max() == 9
    assert lengths.mean() == pytest.approx((1 - 0.8**9) / 0.2, rel=0.1)


def test_favourites_of_another_seed_are_others():
    document = np.array([3, 4, 5, 6], np.uint8)
    assert not np.allclose(source(seed=1).probabilities(document), source(seed=2).probabilities(document))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symbols": 254}, "ids must be in 1 to 255, two at least, got 254 from 3 on"),
        ({"first_id": 0}, "ids must be in 1 to 255"),
        ({"order_weights": ()}, "order_weights must be of 1 to 7 orders, got 0"),
        ({"order_weights": (0.5, 0.5)}, "must leave a share to the Zipf law"),
        ({"topic_weight": -0.1}, "must not be negative"),
        ({"favourites": (0.5, 0.4)}, r"favourites must be above 0 and add up to 1, got \(0.5, 0.4\)"),
        ({"end": 1.0}, r"end must be in \(0, 1\) and longest at least 1, got 1.0"),
        ({"zipf": 30.0}, "zipf=30.0: the rarest of 7 symbols has less than 1 / 65536; lower it"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        source(**settings)
