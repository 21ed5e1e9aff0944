"""The loop detector against a look at the whole text after every token."""

import random

import pytest

from lfm_jax.generation import LoopConfig, LoopDetector


def _loops(text, config):
    """By the definition: the end is one sequence of at most `period` tokens, `repeats` times over, `tokens` tokens in all."""
    for period in range(1, config.period + 1):
        length = max(period * config.repeats, config.tokens)
        end = text[-length:]
        if len(end) == length and all(end[index] == end[index - period] for index in range(period, length)):
            return True
    return False


@pytest.mark.parametrize("config", [LoopConfig(period=6, repeats=3, tokens=8), LoopConfig(period=3, repeats=4, tokens=2)])
def test_it_says_after_each_token_what_the_whole_text_says(config):
    chosen, found = random.Random(0), 0
    for _ in range(200):
        text, detector = [], LoopDetector(config)
        for _ in range(60):
            # Runs of a few tokens, some of which repeat.
            again = len(text) > 5 and chosen.random() < 0.85
            text.append(text[-chosen.choice((1, 2, 3, 5)) if chosen.random() < 0.02 else -3] if again else chosen.randrange(3))
            looped = detector.push(text[-1])
            assert looped == _loops(text, config)
            found += looped
    assert found > 100


def test_what_is_counted_up_is_no_loop():
    detector = LoopDetector(LoopConfig())
    assert not any(detector.push(token) for number in range(500) for token in (7, 8, number + 100, 9))


@pytest.mark.parametrize("settings", [{"period": 0}, {"repeats": 1}, {"tokens": 1}])
def test_a_loop_must_repeat(settings):
    with pytest.raises(ValueError, match="a loop has a period of at least 1, 2 repeats and 2 tokens"):
        LoopConfig(**settings)
