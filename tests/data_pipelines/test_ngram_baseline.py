"""Count models against dictionaries that follow the formula by the letter."""

import collections
import inspect
import json
import math
import textwrap

import pytest

from data_pipelines import Document, TokenizerConfig, ngram_baseline, ngram_bits_per_byte, train_tokenizer, write_token_shards

TEXTS = [part for module in (json, textwrap) for part in inspect.getsource(module).split("\n\n") if part]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = [Document(text, "") for text in TEXTS]
    return train_tokenizer(TokenizerConfig(vocab_size=500), documents, tmp_path_factory.mktemp("workdir") / "tokenizer")


def _written(texts, tokenizer, folder):
    return write_token_shards([Document(text, "") for text in texts], tokenizer, folder)


def _discount(counts):
    once, twice = (sum(count == times for count in counts) + 0.5 for times in (1, 2))
    return once / (once + 2 * twice)


def _models(texts, tokenizer):
    """p(w) and p(w | v) of Chen & Goodman's equation, from dictionaries."""
    tokens, pairs = collections.Counter(), collections.Counter()
    for text in texts:
        ids = tokenizer.encode(text)
        tokens.update([*ids, 2])
        pairs.update(zip([1, *ids], [*ids, 2], strict=True))
    contexts, followers = collections.Counter(), collections.Counter()
    for (context, _), count in pairs.items():
        contexts[context] += count
        followers[context] += 1
    total, d1, d2 = sum(tokens.values()), _discount(tokens.values()), _discount(pairs.values())

    def unigram(token):
        return (max(tokens[token] - d1, 0) + d1 * len(tokens) / tokenizer.vocab_size) / total

    def bigram(context, token):
        if not contexts[context]:
            return unigram(token)
        seen = max(pairs[context, token] - d2, 0)
        return (seen + d2 * followers[context] * unigram(token)) / contexts[context]

    return unigram, bigram


@pytest.mark.parametrize("chunk", [1 << 22, 50])
def test_bits_are_those_of_the_formula(chunk, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(ngram_baseline, "_CHUNK_TOKENS", chunk)
    train, held_out = TEXTS[::2], [*TEXTS[1::2], "\u4f60\u597d: bytes that training has never seen"]
    unigram, bigram = _models(train, tokenizer)
    bits = [0.0, 0.0]
    for text in held_out:
        ids = tokenizer.encode(text)
        for context, token in zip([1, *ids], [*ids, 2], strict=True):
            bits[0] -= math.log2(unigram(token))
            bits[1] -= math.log2(bigram(context, token))
    size = len("".join(held_out).encode())
    shards = _written(train, tokenizer, tmp_path / "train"), _written(held_out, tokenizer, tmp_path / "held_out")
    found = ngram_bits_per_byte(*shards, tokenizer)
    assert found == pytest.approx({"unigram_bits_per_byte": bits[0] / size, "bigram_bits_per_byte": bits[1] / size}, rel=1e-12)
    assert found["bigram_bits_per_byte"] < found["unigram_bits_per_byte"]


def test_probabilities_sum_to_one(tokenizer):
    """Of the formula, for a context that was seen and one that was not: it is a model and not a score."""
    unigram, bigram = _models(TEXTS[::2], tokenizer)
    ids = range(tokenizer.vocab_size)
    assert math.fsum(map(unigram, ids)) == pytest.approx(1, abs=1e-12)
    for context in (1, tokenizer.encode("a")[0], 20):
        assert math.fsum(bigram(context, token) for token in ids) == pytest.approx(1, abs=1e-12)


def test_a_text_without_rare_tokens_has_a_finite_value(tokenizer, tmp_path):
    """No token is seen once, and the held-out text has others."""
    train = _written(["aaaa bbbb " * 50] * 2, tokenizer, tmp_path / "train")
    held_out = _written(["zzzz \u00e9"], tokenizer, tmp_path / "held_out")
    assert all(math.isfinite(bits) for bits in ngram_bits_per_byte(train, held_out, tokenizer).values())


def test_of_a_large_text_an_even_share_is_counted(tokenizer, tmp_path):
    train = _written(TEXTS, tokenizer, tmp_path / "train")
    held_out = _written(TEXTS[:3], tokenizer, tmp_path / "held_out")
    third = _written(TEXTS[::3], tokenizer, tmp_path / "third")
    most = math.ceil(train.tokens / 3)
    assert ngram_bits_per_byte(train, held_out, tokenizer, most_tokens=most) == ngram_bits_per_byte(third, held_out, tokenizer)
