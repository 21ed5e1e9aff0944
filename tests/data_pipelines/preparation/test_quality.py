"""The rules for prose: each against a text made for it, the n-gram figures against plain counting."""

import collections

import numpy as np
import pytest

from data_pipelines import DocumentsConfig, read_documents
from data_pipelines.preparation.quality import QualityConfig, Rule, judge, rules
from data_pipelines.preparation.quality import _figures as figures_of
from data_pipelines.preparation.word_hashes import WordHashes

VOCABULARY = [f"{first}{second}" for first in ("lorem", "ipsum", "dolor", "amet") for second in "abcdefghijklmnopqrstuvwxyz"]


def prose(count=120, seed=0):
    """Different words, with two stop words, ten to a line."""
    words = list(np.random.default_rng(seed).permutation(VOCABULARY * 2)[: count - 2]) + ["the", "of"]
    return "\n".join(" ".join(words[at : at + 10]) for at in range(0, count, 10))


def broken(text, **settings):
    return judge(text, QualityConfig(**settings), WordHashes())


def lines(text):
    return text.split("\n")


BROKEN = {
    "words": (prose(40), 40),
    "word_characters": (" ".join(["I", "am", "of", "the"] + list("abcdefghijklmnopqrstuvwxyz") * 2), 60 / 56),
    "hash_signs_per_word": (prose().replace(" ", " #", 13), 13 / 120),
    "ellipses_per_word": (prose().replace(" ", "\u2026 ", 7).replace(" ", "... ", 6), 13 / 120),
    "bullet_lines": ("\n".join("- " + line if at else "* " + line for at, line in enumerate(lines(prose()))), 1.0),
    "ellipsis_lines": ("\n".join(line + "..." if at % 3 == 0 else line for at, line in enumerate(lines(prose()))), 4 / 12),
    "words_with_letter": (prose() + " 12345" * 31, 120 / 151),
    "stop_words": (prose().replace("the", "xthe"), 1),
    "duplicate_lines": ("\n".join(lines(prose()) + ["so it is"] * 7), 6 / 19),
    "duplicate_line_characters": (prose() + "\n" + "\n".join(lines(prose())[:5]), None),
    "duplicate_paragraphs": ("\n\n".join([f"{at} x" for at in (1, 2, 3, 1, 2, 1)] + [prose()]), 3 / 7),
    "top_2_gram_characters": (prose().replace("\n", " longestword andanother\n"), None),
    "duplicate_5_gram_characters": (prose(110, seed=1) + "\n x " + prose(110, seed=1).replace("\n", " ")[:170], None),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_text_that_breaks_a_rule(rule):
    text, value = BROKEN[rule]
    verdict = broken(text)
    assert verdict is not None and verdict.rule == rule
    assert value is None or verdict.value == pytest.approx(value)
    assert rules(QualityConfig())[rule].describe(verdict.value).startswith(rule.replace("_", " "))


def test_prose_breaks_none():
    assert broken(prose()) is None


def test_emphasis_and_dashes_are_no_bullets():
    """As in a printed play: **Helena** How do you do?"""
    marked = [f"**{line}" if at % 2 else f"-{line}" for at, line in enumerate(lines(prose()))]
    assert broken("\n".join(marked)) is None
    assert broken("\n".join(f"\u2022{line}" for line in lines(prose()))).rule == "bullet_lines"


def test_too_many_words_and_too_long_ones():
    assert broken(prose(), max_words=119) == ("words", 120)
    assert broken(prose(), max_word_characters=5.5).rule == "word_characters"


def test_every_limit_has_its_rule():
    """A text at the limit stays, one beyond it goes: tried by moving the limit to either side of the text's own figure."""
    text = prose() + "\n- # \u2026 7 \u2026\n" + "\n".join(lines(prose())[:2]) + "\n\nthe end\n\nthe end\n"
    found = dict(figures_of(text, QualityConfig(), WordHashes()))
    assert list(found) == list(rules(QualityConfig()))
    loose = {
        "min_words": 0, "min_word_characters": 0.0, "max_symbol_ratio": 9.0, "max_bullet_lines": 1.0, "max_ellipsis_lines": 1.0,
        "min_words_with_letter": 0.0, "min_stop_words": 0, "max_duplicate_lines": 1.0, "max_duplicate_paragraphs": 1.0,
        "max_duplicate_line_characters": 1.0, "max_duplicate_paragraph_characters": 1.0, "max_top_ngrams": (1.0,) * 3,
        "max_duplicate_ngrams": (1.0,) * 6,
    }  # fmt: skip
    assert broken(text, **loose) is None
    upper = {
        "bullet_lines": "max_bullet_lines", "ellipsis_lines": "max_ellipsis_lines", "duplicate_lines": "max_duplicate_lines",
        "duplicate_line_characters": "max_duplicate_line_characters", "duplicate_paragraphs": "max_duplicate_paragraphs",
        "duplicate_paragraph_characters": "max_duplicate_paragraph_characters", "ellipses_per_word": "max_symbol_ratio",
    }  # fmt: skip
    for rule, field in upper.items():
        assert 0 < found[rule] < 1
        assert broken(text, **{**loose, field: found[rule]}) is None
        assert broken(text, **{**loose, field: found[rule] * 0.999}).rule == rule
    for field, rule in (("min_words_with_letter", "words_with_letter"), ("min_stop_words", "stop_words")):
        assert broken(text, **{**loose, field: found[rule]}) is None
        assert broken(text, **{**loose, field: found[rule] + 1}).rule == rule
    for field, first in (("max_top_ngrams", 2), ("max_duplicate_ngrams", 5)):
        for at in range(len(loose[field])):
            kind = "top" if first == 2 else "duplicate"
            rule = f"{kind}_{first + at}_gram_characters"
            limits = list(loose[field])
            limits[at] = found[rule]
            assert found[rule] > 0 and broken(text, **{**loose, field: tuple(limits)}) is None
            limits[at] *= 0.999
            assert broken(text, **{**loose, field: tuple(limits)}).rule == rule


def test_ngram_figures_are_those_of_plain_counting():
    generator = np.random.default_rng(3)
    for trial in range(20):
        words = [str(word) for word in generator.choice(["a", "bb", "ccc", "dddd", "e" * 9], 60 if trial else 3)]
        found = dict(figures_of(" ".join(words), QualityConfig(), WordHashes()))
        total = sum(map(len, words))
        for n in range(2, 11):
            grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
            if n < 5:
                counts = collections.Counter(grams)
                most = max(counts.values(), default=0)
                longest = max((len("".join(gram)) for gram, count in counts.items() if count == most), default=0)
                assert found[f"top_{n}_gram_characters"] == pytest.approx(most * longest / total if most > 1 else 0)
                continue
            covered, seen = set(), set()
            for at, gram in enumerate(grams):
                covered.update(range(at, at + n) if gram in seen else ())
                seen.add(gram)
            assert found[f"duplicate_{n}_gram_characters"] == pytest.approx(sum(len(words[at]) for at in covered) / total)


@pytest.mark.parametrize("text", ["", " \n\n ", "\u2026", "word", "#", "\n"])
def test_next_to_nothing_is_too_short_and_no_error(text):
    assert broken(text).rule == "words"
    list(figures_of(text, QualityConfig(), WordHashes()))


def test_a_rule_says_on_which_side_it_is():
    rule = Rule("words", 50, 100_000)
    assert rule.describe(3.0) == "words 3, below 50" and rule.describe(123_456.0) == "words 1.235e+05, above 100000"
    assert Rule("bullet_lines", None, 0.9).describe(1.0) == "bullet lines 1, above 0.9"


def test_the_least_must_not_be_above_the_most():
    with pytest.raises(ValueError, match="min_words must be from 0 to max_words, got 60 and 50"):
        QualityConfig(min_words=60, max_words=50)
    with pytest.raises(ValueError, match="min_word_characters must be from 0 to max_word_characters, got -1"):
        QualityConfig(min_word_characters=-1)


def test_real_prose_stays_and_source_code_goes(published_data):
    books = DocumentsConfig(source=str(published_data / "books" / "validation.jsonl.zst"), held_out_share=1.0)
    for book in read_documents(books, "held_out"):
        assert broken(book.text[:60_000]) is None, book.name
    code = [document for document, _ in zip(read_documents(DocumentsConfig(source="stdlib"), "train"), range(40), strict=False)]
    assert sum(broken(document.text) is not None for document in code) > 8
