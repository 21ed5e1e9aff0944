"""Loops by both rules and by the detector, against looks at whole texts; beside the rules that others have published."""

import collections
import itertools
import json
import random
import sysconfig
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from conftest import ROOT

from data_pipelines import Document, TokenizerConfig, train_tokenizer
from lfm_jax.generation import FinishReason, LoopConfig, LoopDetector
from lfm_jax.generation.loops import INNER, TAIL, Loop, classify, inner_loop, tail_loop

SMALL = [
    LoopConfig(period=6, repeats=3, tokens=8), LoopConfig(period=3, repeats=4, tokens=2),
    LoopConfig(period=9, repeats=2, tokens=0), LoopConfig(period=1, repeats=2, tokens=5),
]  # fmt: skip


def _repeats(text, period):
    return all(text[index] == text[index - period] for index in range(period, len(text)))


def _tail_period(text, config):
    """By the definition: the end is one sequence of at most `period` tokens, `repeats` times over, `tokens` tokens in all."""
    for period in range(1, config.period + 1):
        length = max(period * config.repeats, config.tokens)
        if length <= len(text) and _repeats(text[len(text) - length :], period):
            return period
    return None


def _whole_stretch(text, end, period):
    """All around the last `period` tokens before `end` that repeats."""
    start = end - period
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return Loop(start, end, period)


def _texts(count, length, seed=0):
    """Random ones of few tokens, a part of which repeats what came a few tokens before."""
    draws = random.Random(seed)
    for _ in range(count):
        alphabet, period = draws.choice((1, 2, 3, 5)), draws.choice((1, 2, 3, 5, 8))
        faithful = draws.choice((0.0, 0.9, 0.97, 1.0))
        text = []
        for _ in range(draws.randrange(length)):
            again = len(text) >= period and draws.random() < faithful
            text.append(text[-period] if again else draws.randrange(alphabet))
        yield text


@pytest.mark.parametrize("config", SMALL)
def test_the_rules_and_the_detector_say_what_the_definition_says(config):
    """At every prefix of thousands of texts: verdict, period and bounds; and the first inner loop is where the detector stops."""
    found = collections.Counter()
    for text in _texts(400, 48):
        detector, first = LoopDetector(config), None
        for end in range(len(text) + 1):
            period = _tail_period(text[:end], config)
            expected = None if period is None else _whole_stretch(text[:end], end, period)
            assert tail_loop(text[:end], config) == expected
            assert end == 0 or detector.push(text[end - 1]) == (expected is not None)
            first = first or (expected and _whole_stretch(text, end, period))
            found["prefixes", expected is not None] += 1
        assert inner_loop(text, config) == first
        found["texts", first is not None] += 1
    assert min(found.values()) > 20 and len(found) == 4


def test_a_long_loop_after_a_long_text_is_found_whole():
    """Periods far beyond what brute force can look at, up to the largest; one more token, or one changed, and it is none."""
    draws = np.random.default_rng(0)
    text, pattern = draws.integers(50_000, size=20_000), draws.integers(50_000, size=512)
    whole = np.concatenate([text, np.tile(pattern, 4)])
    assert tail_loop(whole) == inner_loop(whole) == Loop(20_000, 20_000 + 4 * 512, 512)
    assert tail_loop(whole[:-1]) is None and inner_loop(whole[:-1]) is None
    escaped = np.concatenate([whole, text[:5]])
    assert tail_loop(escaped) is None and inner_loop(escaped) == Loop(20_000, 20_000 + 4 * 512, 512)
    assert tail_loop(np.tile(draws.integers(50_000, size=513), 9)) is None
    whole[-600] += 1
    assert tail_loop(whole) is None


def test_an_answer_has_one_verdict():
    tail, inner, none = [5, *[1, 2] * 8], [*[1, 2] * 32, 5], list(range(40))
    assert classify(tail, "length") == classify(tail, "stop") == "tail_loop"
    assert classify(inner, "length") == classify(inner, "stop") == "inner_loop"
    assert (classify(none, "length"), classify(none, "stop"), classify([], "stop")) == ("limit", "ended", "ended")
    assert classify(none, "loop") == "tail_loop"  # by whatever the sampler took for one
    assert classify(tail, "length", INNER) == "limit" and classify([*tail, 6], "stop") == "ended"
    assert classify([*tail, 6], "stop", inner=TAIL) == "inner_loop"
    for reason in ("cancelled", "no such reason"):
        with pytest.raises(ValueError, match=f"has finish_reason stop, length or loop, got '{reason}'"):
            classify(none, reason)
    assert {*get_args(FinishReason)} == {"stop", "length", "loop", "cancelled"}


@pytest.mark.parametrize("settings", [{"period": 0}, {"repeats": 1}, {"tokens": -1}])
def test_a_loop_must_repeat(settings):
    with pytest.raises(ValueError, match="a loop has a period of at least 1, 2 repeats or more and no negative number of tokens"):
        LoopConfig(**settings)


def _vllm(text, max_pattern_size, min_count):
    """From its description: the last p * count tokens are the same p tokens over and over, for the first p that fits."""
    for size in range(1, max_pattern_size + 1):
        blocks = [text[len(text) - (nth + 1) * size : len(text) - nth * size] for nth in range(min_count)]
        if size * min_count <= len(text) and all(block == blocks[0] for block in blocks):
            return size
    return None


def _holtzman(text):
    """A last phrase of 2 tokens or more stands there 3 times."""
    sizes = range(2, len(text) // 3 + 1)
    return any(text[-size:] == text[-2 * size : -size] == text[-3 * size : -2 * size] for size in sizes)


def _liquid(text):
    """A span of up to 1,024 characters stands 4 times in a row, 60 characters in all; by a search with the span's first copy."""
    for start, period in itertools.product(range(len(text)), range(1, min(1024, len(text)) + 1)):
        span = text[start : start + period]
        copies = -(-max(4 * period, 60) // period)
        if text.startswith((span * copies)[: max(4 * period, 60)], start):
            return True
    return False


def test_without_a_least_number_of_tokens_the_tail_rule_is_that_of_vllm():
    found = 0
    for text, period, count in itertools.product(_texts(120, 60, seed=1), range(1, 9), (2, 3, 4)):
        loop = tail_loop(text, LoopConfig(period=period, repeats=count, tokens=0))
        assert (loop and loop.period) == _vllm(text, period, count)
        found += loop is not None
    assert 300 < found < 2500


def test_the_rules_of_holtzman_and_of_liquid_are_these_with_other_numbers():
    found = collections.Counter()
    for text in _texts(300, 200, seed=2):
        looped = tail_loop(text, LoopConfig(period=66, repeats=3, tokens=6)) is not None
        assert looped == _holtzman(text)
        found[looped] += 1
    assert min(found.values()) > 50
    span = "the cat sat on the mat"
    for text in (span * 3 + "!", span * 4, f"So {span * 4}.", span * 4 + "!", "-" * 59 + "!", "-" * 60, "abc " * 14, "abc " * 15):
        looped = inner_loop([ord(character) for character in text], LoopConfig(period=1024, repeats=4, tokens=60)) is not None
        assert looped == _liquid(text) == (text.rstrip("!").strip("So .") in (span * 4, "-" * 60, ("abc " * 15).strip()))


def test_thirty_tokens_twenty_times_are_another_rule():
    """Of arXiv 2512.12895: a loop that has lasted meets it, one that has just begun does not; what repeats apart is no loop."""

    def most(text):
        return max(collections.Counter(tuple(text[at : at + 30]) for at in range(len(text) - 29)).values())

    period = list(range(40))
    assert most(period * 21) >= 20 and tail_loop(period * 21)
    assert most(period * 5) < 20 and tail_loop(period * 5)
    apart = [token for number in range(25) for token in (*period, 1000 + number)]
    assert most(apart) >= 20 and inner_loop(apart) is None


@pytest.fixture(scope="module")
def tokenizer_and_texts(tmp_path_factory):
    """Code of the standard library and our own Markdown with its tables, and a small tokenizer of these."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [*sorted(library.glob("[h-u]*.py")), *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path.name: path.read_text(errors="replace") for path in paths}
    documents = [Document(text, name) for name, text in texts.items()]
    config = TokenizerConfig(vocab_size=2048, train_bytes=1 << 19)
    return train_tokenizer(config, documents, tmp_path_factory.mktemp("loops") / "tokenizer"), texts


def test_code_and_tables_do_not_loop(tokenizer_and_texts):
    """Anywhere, and where they happen to end; that the inner rule needs 64 tokens and not 16 shows here."""
    tokenizer, texts = tokenizer_and_texts
    ids = [np.array(each, np.int32) for each in tokenizer.encode_batch(list(texts.values()))]
    assert sum(map(len, ids)) > 500_000
    assert [name for name, each in zip(texts, ids, strict=True) if inner_loop(each)] == []
    assert [each for each in ids if inner_loop(each[:20_000], TAIL)]
    draws = np.random.default_rng(0)
    ends = [each[: draws.integers(len(each))] for each in ids for _ in range(5)]
    assert sum(tail_loop(end) is not None for end in ends) <= 1


def test_lists_tables_and_data_do_not_loop_and_what_is_stuck_does(tokenizer_and_texts):
    tokenizer, _ = tokenizer_and_texts
    numbers = range(1, 41)
    regular = {
        "numbered list": "".join(f"{number}. Take the next one.\n" for number in numbers),
        "table": "| n | square | even |\n|---|---|---|\n" + "".join(f"| {n} | {n * n} | {n % 2 == 0} |\n" for n in numbers),
        "wide table": "|" + " --- |" * 12 + "\n|" + " 0 |" * 12 + "\n|" + " x |" * 12 + "\n",
        "JSON": json.dumps([{"id": n, "name": f"item {n}", "price": 1.5 * n, "tags": []} for n in numbers], indent=1),
        "matrix": "\n".join(" ".join("1" if row == column else "0" for column in range(8)) for row in range(8)),
        "code": "".join(f"    if kind == {n}:\n        return table[{n}]\n" for n in numbers),
        "verse": "Row, row, row your boat\n" * 2 + "Merrily, merrily, merrily, merrily,\nLife is but a dream.\n",
    }  # fmt: skip
    assert {name for name, text in regular.items() if inner_loop(tokenizer.encode(text))} == set()
    assert {name for name, text in regular.items() if tail_loop(tokenizer.encode(text))} == set()
    for stuck in (" Wait, let me check that again.", "So the answer is 12. But that is not right, because 12 < 13.\n", "0"):
        tokens = tokenizer.encode("We first count them." + stuck * 80)
        assert tail_loop(tokens) and inner_loop(tokens) and classify(tokens, "length") == "tail_loop"
