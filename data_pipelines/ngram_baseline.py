"""Count models over the same tokens: what a language model must beat."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.tokenization.token_shards import TokenShards
from data_pipelines.tokenization.tokenizer import Tokenizer

# Tokens whose pairs are sorted at a time.
_CHUNK_TOKENS = 1 << 22


class _Counts(NamedTuple):
    """Sorted distinct codes and how often each was seen."""

    codes: np.ndarray
    counts: np.ndarray


def ngram_bits_per_byte(
    train: TokenShards, held_out: TokenShards, tokenizer: Tokenizer, *, most_tokens: int = 1 << 26
) -> dict[str, float]:
    """Bits per byte of the held-out text under a unigram and a bigram model of the training text.

    Both see what a language model sees: each document is [bos, *ids] followed by [*ids, eos]. Probabilities are discounted counts
    interpolated with the next lower order (Chen & Goodman 1998, equation 17, after Ney, Essen & Kneser 1994):

        p(w | v) = (max(c(v, w) - D2, 0) + D2 n(v) p(w)) / c(v),    p(w) = (max(c(w) - D1, 0) + D1 n / V) / c

    with c the counts of training, n(v) the number of different tokens seen after v, n that of different tokens, V the number of
    ids, and p(w | v) = p(w) where v was never seen. The discounts are estimated on the training counts as t1 / (t1 + 2 t2), t1
    and t2 the numbers of entries seen once and twice; half an entry is added to t1 and t2, so that they exist for any text.

    Args:
      most_tokens: of a larger training text, documents spread evenly over it are counted, up to about this many tokens.
    Returns:
      unigram_bits_per_byte and bigram_bits_per_byte: total bits of all targets over the bytes of the text in UTF-8.
    """
    vocab_size = tokenizer.vocab_size
    stride = max(1, math.ceil(train.tokens / most_tokens))
    seen = _count_pairs(train, range(0, len(train), stride), tokenizer)
    wanted = _count_pairs(held_out, range(len(held_out)), tokenizer)

    token_counts = np.bincount(seen.codes % vocab_size, seen.counts, minlength=vocab_size)
    context_counts = np.bincount(seen.codes // vocab_size, seen.counts, minlength=vocab_size)
    followers = np.bincount(seen.codes // vocab_size, minlength=vocab_size)
    discount = _discount(token_counts)
    unigram = np.maximum(token_counts - discount, 0) + discount * np.count_nonzero(token_counts) / vocab_size
    unigram /= token_counts.sum()

    contexts, tokens = np.divmod(wanted.codes, vocab_size)
    discount = _discount(seen.counts)
    numerator = np.maximum(_look_up(seen, wanted.codes) - discount, 0) + discount * followers[contexts] * unigram[tokens]
    known = context_counts[contexts] > 0
    bigram = np.where(known, numerator / np.where(known, context_counts[contexts], 1), unigram[tokens])
    bits = {name: -(wanted.counts @ np.log2(p)) for name, p in (("unigram", unigram[tokens]), ("bigram", bigram))}
    return {f"{name}_bits_per_byte": float(total) / held_out.text_bytes for name, total in bits.items()}


def _count_pairs(shards: TokenShards, documents: range, tokenizer: Tokenizer) -> _Counts:
    """How often each target follows each token; the code of a pair is token * vocab_size + target."""
    total = _Counts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for tokens in _marked(shards, documents, tokenizer):
        codes = tokens[:-1] * tokenizer.vocab_size + tokens[1:]
        # Between two documents there is no pair: the end of one does not predict the beginning of the next.
        codes, counts = np.unique(codes[tokens[1:] != tokenizer.bos_id], return_counts=True)
        total = _add(total, _Counts(codes, counts))
    return total


def _marked(shards: TokenShards, documents: range, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """[bos, *ids, eos] of the documents, int64, several at a time."""
    parts, size = [], 0
    for document in documents:
        parts += [[tokenizer.bos_id], shards[document], [tokenizer.eos_id]]
        size += len(parts[-2])
        if size >= _CHUNK_TOKENS:
            yield np.concatenate(parts).astype(np.int64)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts).astype(np.int64)


def _add(first: _Counts, second: _Counts) -> _Counts:
    codes, where = np.unique(np.concatenate([first.codes, second.codes]), return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, where, np.concatenate([first.counts, second.counts]))
    return _Counts(codes, counts)


def _look_up(counts: _Counts, codes: np.ndarray) -> np.ndarray:
    """The count of each code; 0 where it was never seen."""
    where = np.minimum(np.searchsorted(counts.codes, codes), len(counts.codes) - 1)
    return np.where(counts.codes[where] == codes, counts.counts[where], 0)


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1) + 0.5, np.count_nonzero(counts == 2) + 0.5
    return once / (once + 2 * twice)
