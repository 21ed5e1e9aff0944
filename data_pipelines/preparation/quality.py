"""Rules of thumb for prose: what is too short, too odd or too repetitive to learn from, with the figure that says so.

All are from Rae et al. 2021 (Scaling Language Models: Methods, Analysis & Insights from Training Gopher), appendix A1.1 and table
A1, and made for English prose: source code, verse and other languages break them, so that they can be left out as one.
"""

import dataclasses
import string
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines.preparation.word_hashes import WordHashes, ngram_hashes

# The paper does not list them. A hyphen or an asterisk is one before a space; before a word it is a dash or Markdown's emphasis.
_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u2219", "\u25cf", "* ", "- ")
_ELLIPSES = ("...", "\u2026")
_FIRST_TOP, _FIRST_DUPLICATE = 2, 5  # words of the shortest n-gram in table A1


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Limits of the rules; the defaults are the paper's. Words are what white space separates, lines those that are not blank,
    paragraphs what blank lines separate; a share is of 1.

    min_words, max_words: of a document. min_word_characters, max_word_characters: mean length of its words.
    max_symbol_ratio: hash signs, and ellipses, for each word. max_bullet_lines: share of lines that begin with a bullet.
    max_ellipsis_lines: share that end with an ellipsis. min_words_with_letter: share of words with a letter. min_stop_words: how
    many different ones of stop_words there must be.
    max_duplicate_lines, max_duplicate_paragraphs: share of those that have occurred before; max_duplicate_line_characters,
    max_duplicate_paragraph_characters: the share of characters in them. max_top_ngrams: share of the characters in words that the
    commonest 2-gram, 3-gram, ... takes. max_duplicate_ngrams: share that is in 5-grams, 6-grams, ... that have occurred before, a
    character counted once.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_characters: float = 3.0
    max_word_characters: float = 10.0
    max_symbol_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_words_with_letter: float = 0.8
    min_stop_words: int = 2
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __post_init__(self):
        for name in ("words", "word_characters"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not 0 <= least <= most:
                raise ValueError(f"min_{name} must be from 0 to max_{name}, got {least} and {most}")


class Verdict(NamedTuple):
    """Why a document is poor. rule: one of `rules(config)`. value: what the document has, on the wrong side of the limit."""

    rule: str
    value: float


class Rule(NamedTuple):
    """least, most: the limits of its figure; None: there is none on this side."""

    name: str
    least: float | None
    most: float | None

    def describe(self, value: float) -> str:
        """In words, for the list of what was removed."""
        side, limit = ("above", self.most) if self.least is None or value >= self.least else ("below", self.least)
        return f"{self.name.replace('_', ' ')} {value:.4g}, {side} {limit:g}"


def rules(config: QualityConfig) -> dict[str, Rule]:
    """All rules by name, in the order in which they are tried."""
    found = [
        Rule("words", config.min_words, config.max_words),
        Rule("word_characters", config.min_word_characters, config.max_word_characters),
        Rule("hash_signs_per_word", None, config.max_symbol_ratio),
        Rule("ellipses_per_word", None, config.max_symbol_ratio),
        Rule("bullet_lines", None, config.max_bullet_lines),
        Rule("ellipsis_lines", None, config.max_ellipsis_lines),
        Rule("words_with_letter", config.min_words_with_letter, None),
        Rule("stop_words", config.min_stop_words, None),
        Rule("duplicate_lines", None, config.max_duplicate_lines),
        Rule("duplicate_line_characters", None, config.max_duplicate_line_characters),
        Rule("duplicate_paragraphs", None, config.max_duplicate_paragraphs),
        Rule("duplicate_paragraph_characters", None, config.max_duplicate_paragraph_characters),
    ]
    found += [Rule(f"top_{n}_gram_characters", None, most) for n, most in enumerate(config.max_top_ngrams, _FIRST_TOP)]
    found += [
        Rule(f"duplicate_{n}_gram_characters", None, most) for n, most in enumerate(config.max_duplicate_ngrams, _FIRST_DUPLICATE)
    ]
    return {rule.name: rule for rule in found}


def judge(text: str, config: QualityConfig, hashes: WordHashes) -> Verdict | None:
    """The first rule that the text breaks; None where it keeps them all. Later rules, which take longer, are not tried then."""
    limits = rules(config)
    for name, value in _figures(text, config, hashes):
        rule = limits[name]
        if rule.least is not None and value < rule.least or rule.most is not None and value > rule.most:
            return Verdict(name, float(value))
    return None


def _figures(text: str, config: QualityConfig, hashes: WordHashes) -> Iterator[tuple[str, float]]:
    words = text.split()
    count = max(1, len(words))
    yield "words", len(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    characters = max(1, int(lengths.sum()))
    yield "word_characters", lengths.sum() / count
    yield "hash_signs_per_word", text.count("#") / count
    yield "ellipses_per_word", sum(map(text.count, _ELLIPSES)) / count
    yield from _line_figures(text)
    yield "words_with_letter", sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) / count
    plain = {word.strip(string.punctuation).lower() for word in set(words)}
    yield "stop_words", len(plain.intersection(config.stop_words))
    yield from _repeated_parts("line", text.split("\n"))
    yield from _repeated_parts("paragraph", _paragraphs(text))
    numbers = hashes(words)
    for n in range(_FIRST_TOP, _FIRST_TOP + len(config.max_top_ngrams)):
        yield f"top_{n}_gram_characters", _top_characters(ngram_hashes(numbers, n), lengths, n) / characters
    repeated = 1.0
    for n in range(_FIRST_DUPLICATE, _FIRST_DUPLICATE + len(config.max_duplicate_ngrams)):
        # Where no n-gram comes again, no longer one does.
        repeated = repeated and _duplicate_characters(ngram_hashes(numbers, n), lengths, n) / characters
        yield f"duplicate_{n}_gram_characters", repeated


def _line_figures(text: str) -> Iterator[tuple[str, float]]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    count = max(1, len(lines))
    yield "bullet_lines", sum(line.startswith(_BULLETS) for line in lines) / count
    yield "ellipsis_lines", sum(line.endswith(_ELLIPSES) for line in lines) / count


def _paragraphs(text: str) -> list[str]:
    lines = (line if line.strip() else "" for line in text.split("\n"))
    return "\n".join(lines).split("\n\n")


def _repeated_parts(kind: str, parts: list[str]) -> Iterator[tuple[str, float]]:
    """Shares of the parts, and of their characters, that are in a part which has occurred before."""
    parts = [part for part in map(str.strip, parts) if part]
    different = set(parts)
    characters, different_characters = sum(map(len, parts)), sum(map(len, different))
    yield f"duplicate_{kind}s", 1 - len(different) / max(1, len(parts)) if parts else 0.0
    yield f"duplicate_{kind}_characters", 1 - different_characters / characters if characters else 0.0


def _top_characters(ngrams: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Characters of all occurrences of the commonest n-gram, the longest where there are several; 0 if all occur once."""
    if not len(ngrams):
        return 0.0
    _, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
    most = counts.max()
    return 0.0 if most == 1 else float(most * max(lengths[at : at + n].sum() for at in first[counts == most]))


def _duplicate_characters(ngrams: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Characters of the words that are in an n-gram which has occurred before."""
    again = np.ones(len(ngrams), bool)
    again[np.unique(ngrams, return_index=True)[1]] = False
    edges = np.zeros(len(lengths) + 1, np.int64)
    starts = np.flatnonzero(again)
    edges[starts] += 1
    np.subtract.at(edges, starts + n, 1)
    return float(lengths[np.cumsum(edges[:-1]) > 0].sum())
