"""Words and sequences of words as 64-bit numbers: what near duplicates and contamination are found by."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

# Of a large text most words are few; the rare ones are hashed anew when the table is emptied.
_MOST_WORDS = 1 << 20
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def plain_words(text: str) -> list[str]:
    """The words in lower case and without punctuation: runs of letters, digits and underscores (Unicode)."""
    return _WORD.findall(text.lower())


class WordHashes:
    """Hashes of words, the same on every machine: the first 8 bytes of BLAKE2b of the word in UTF-8. Keeps the frequent ones."""

    def __init__(self):
        self._known = _Known()

    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """[words] uint64."""
        if len(self._known) > _MOST_WORDS:
            self._known.clear()
        return np.fromiter(map(self._known.__getitem__, words), np.uint64, len(words))


class _Known(dict):
    def __missing__(self, word: str) -> int:
        self[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        return self[word]


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 values over all 64 bits, one to one: the last steps of SplitMix64 (Steele, Lea & Flood 2014, figure 14)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngram_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """[words - length + 1] uint64: a hash of every run of `length` words, in order; none where there are fewer words.

    Args:
      words: [words] uint64, see `WordHashes`.
    """
    count = len(words) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = words[:count].copy()
    for offset in range(1, length):
        total = total * _FACTOR + words[offset : offset + count]
    return mix(total)
