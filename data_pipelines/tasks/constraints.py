"""Constraints on a text that a program can check, with the names, arguments and verdicts of IFEval.

Zhou et al. 2023, arXiv 2311.07911; `instruction_following_eval` in google-research. Its evaluator splits sentences and words by
NLTK and asks langdetect for the language. Here both splits are rules of a few lines, and a text in capitals or without any may be
in any language; `language:response_language` is left out. Every check takes time in proportion to the length of the text.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.tasks.answers import MOST_CHARACTERS, read_json

# The run of marks that may end a sentence, with what closes behind it. Possessive, and begun once a run: see the module.
_SENTENCE_END = re.compile(r"""(?<![.!?])[.!?]++["'”’)\]*_]*+(?=\s|$)""")
_ABBREVIATIONS = {
    "dr", "mr", "mrs", "ms", "prof", "st", "jr", "sr", "vs", "inc", "ltd", "co", "p.s", "p.p.s", "e.g", "i.e", "etc", "u.s",
}  # fmt: skip
_LONGEST_ABBREVIATION = 6
# A word for capitals: hyphens, dots and slashes join, an apostrophe separates (as in NLTK's "I" + "'m").
_CAPITALS_WORD = re.compile(r"[^\W_]+(?:[-./&][^\W_]+)*")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE_OPENINGS = ("```json", "```Json", "```JSON", "```")


def follows(kind: str, kwargs: Mapping[str, Any], response: str) -> bool:
    """Whether a response keeps to one constraint, strictly in IFEval's sense: the whole text, as it is.

    Args:
      kind: a name in `CHECKS`. kwargs: IFEval's arguments of it.

    Raises:
      ValueError: there is no such constraint.
    """
    if kind not in CHECKS:
        raise ValueError(f"expected a constraint among {', '.join(sorted(CHECKS))}; got {kind!r}")
    return 0 < len(response) <= MOST_CHARACTERS and bool(response.strip()) and CHECKS[kind](response, **kwargs)


def _compared(count: int, relation: str, limit: int) -> bool:
    """relation: "less than" or "at least", the two that IFEval has."""
    return count < limit if relation == "less than" else count >= limit


def count_sentences(text: str) -> int:
    """How many sentences a text has: up to ., ! or ? before space or the end, but not up to the dot of an abbreviation or an
    initial, nor up to dots after which the text goes on in lowercase.
    """
    sentences, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        before = text[max(0, end.start() - _LONGEST_ABBREVIATION) : end.start()].split()
        word = before[-1].lstrip("(\"'") if before and not text[end.start() - 1].isspace() else ""
        following = text[end.end() : end.end() + 2].lstrip()
        initial = len(word) == 1 and word.isupper() and word != "I"
        shortened = end[0][:1] == "." and end[0][:2] != ".." and (word.lower() in _ABBREVIATIONS or initial)
        goes_on = end[0].startswith("..") and following[:1].islower()
        if not shortened and not goes_on:
            sentences, start = sentences + 1, end.end()
    return sentences + bool(text[start:].strip())


def _sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _compared(count_sentences(text), relation, num_sentences)


def _words(text: str, *, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", text)), relation, num_words)


def _paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Between *** marks; an empty one may be at either end only."""
    pieces = [piece.strip() for piece in re.split(r"\s?\*\*\*\s?", text)]
    count = len(pieces) - (not pieces[0]) - (len(pieces) > 1 and not pieces[-1])
    return all(pieces[1:-1]) and count == num_paragraphs


def _nth_paragraph(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Between empty lines. The word ends before a mark of punctuation."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not (words := paragraphs[nth_paragraph - 1].split(maxsplit=1)):
        return False
    word = re.match(r"""[^.,?!'"]*""", words[0].lstrip("'").lstrip('"'))[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def _existence(text: str, *, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def _frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def _capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _compared(sum(word.isupper() for word in _CAPITALS_WORD.findall(text)), capital_relation, capital_frequency)


def _placeholders(text: str, *, num_placeholders: int) -> bool:
    """[so], on one line."""
    count = 0
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            count, start = count + 1, line.find("[", end)
    return count >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _bullets(text: str, *, num_bullets: int) -> bool:
    """Lines that begin with one * or with -."""
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^[^\S\n]*-", text, re.MULTILINE)) == num_bullets


def _highlights(text: str, *, num_highlights: int) -> bool:
    """*so* or **so**, on one line."""
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _title(text: str) -> bool:
    """<<so>>, on one line: from its first << to its last >>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start <= end - 3 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _json(text: str) -> bool:
    text = text.strip()
    for opening in _FENCE_OPENINGS:
        text = text.removeprefix(opening)
    try:
        read_json(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _two_responses(text: str) -> bool:
    pieces = [piece.strip() for piece in text.split("******")]
    given = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text: any(option in text for option in _CONSTRAINED),
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letters,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
}
