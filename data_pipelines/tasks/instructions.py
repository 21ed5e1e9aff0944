"""Instruction following: short texts to write under several constraints at once, each of which a program checks."""

import itertools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_pipelines.tasks.constraints import follows
from data_pipelines.tasks.instruction_topics import TOPICS
from data_pipelines.tasks.task import Problem, Scores, Split, draw

_SHAPES = {
    "length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word", "combination:two_responses",
    "detectable_format:number_bullet_lists", "detectable_format:multiple_sections", "detectable_format:json_format",
}  # fmt: skip
_CASES = {"change_case:english_capital", "change_case:english_lowercase", "change_case:capital_word_frequency"}
# Each of these says how the whole begins or ends.
_FRAMES = {"startend:quotation", "detectable_format:json_format", "combination:repeat_prompt"}
_ENDS = {"startend:end_checker", "detectable_content:postscript", "detectable_format:json_format"}
# Of each of these sets a problem has at most one member.
_EXCLUSIVE = (
    _SHAPES, _CASES, _FRAMES, _ENDS,
    {"keywords:existence", "keywords:frequency"},
    {"change_case:english_lowercase", "detectable_format:multiple_sections"},
    {"change_case:english_capital", "detectable_format:multiple_sections"},
    {"detectable_format:number_highlighted_sections", "detectable_format:number_bullet_lists"},
    {"detectable_format:json_format", "detectable_format:title"},
)  # fmt: skip
_END_PHRASES = ("That is all.", "Is there anything else I can help with?", "Thank you for reading.", "Now it is your turn.")
# Sentences that bring a word in; different ones, since a solution must not teach to repeat a sentence.
_CARRIERS = ("The word {} belongs here as well.", "Some people would say {} at this point.", "And do not forget {} in the end.")
_FIRST_WORDS = ("today", "often", "perhaps", "first", "later", "here")


class Instructions:
    """Texts about everyday things under 1 to 5 constraints: the difficulty is how many.

    Whether a text is about its topic, and good, no program says: that part is a judge's.
    """

    name = "instructions"
    max_difficulty = 5

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the topic and the constraints with their arguments, in any order."""

        def make(rng: random.Random) -> tuple[Problem, Any]:
            while True:  # most draws have a solution that the writer below finds
                topic = rng.choice(tuple(TOPICS))
                request = f"Write a short text about {topic}."
                constraints = _draw_constraints(rng, difficulty, TOPICS[topic], request)
                solution = write(constraints, topic, rng.sample(TOPICS[topic], len(TOPICS[topic])))
                if solution is not None:
                    break
            order = rng.sample(list(constraints), difficulty)
            asked = " ".join([request, *(_RULES[kind].say(**constraints[kind]) for kind in order)])
            problem = Problem(
                messages=[{"role": "user", "content": asked}],
                reference=[{"kind": kind, "kwargs": constraints[kind]} for kind in order],
                solution=solution,
            )
            return problem, [topic, constraints]

        return draw(self, seed, difficulty, split, make)

    def score(self, response: str, reference: list[dict[str, Any]]) -> Scores:
        """correct: all constraints are kept. followed: the share that is. Beside them each kind by its name."""
        kept = [(one["kind"], float(follows(one["kind"], one["kwargs"], response))) for one in reference]
        shares = [share for _, share in kept]
        return {"correct": min(shares), "followed": sum(shares) / len(shares), **dict(kept)}


class _Rule(NamedTuple):
    """draw: arguments, from (rng, the words of a topic, the request). say: the constraint in words."""

    draw: Callable[[random.Random, list[str], str], dict[str, Any]]
    say: Callable[..., str]


def _relation(rng: random.Random) -> str:
    return rng.choice(("less than", "at least"))


_RULES: dict[str, _Rule] = {
    "change_case:capital_word_frequency": _Rule(
        lambda rng, words, request: {"capital_frequency": rng.randrange(2, 7), "capital_relation": _relation(rng)},
        lambda capital_frequency, capital_relation: (
            f"Words in all capital letters should appear {capital_relation} {capital_frequency} times."
        ),
    ),
    "change_case:english_capital": _Rule(lambda *_: {}, lambda: "Use capital letters only."),
    "change_case:english_lowercase": _Rule(lambda *_: {}, lambda: "Use lowercase letters only."),
    "combination:repeat_prompt": _Rule(
        lambda rng, words, request: {"prompt_to_repeat": request},
        lambda prompt_to_repeat: f'Begin with the words "{prompt_to_repeat}", unchanged, and then write the text.',
    ),
    "combination:two_responses": _Rule(
        lambda *_: {}, lambda: "Give two different texts, with six asterisks (******) between them and nowhere else."
    ),
    "detectable_content:number_placeholders": _Rule(
        lambda rng, words, request: {"num_placeholders": rng.randrange(1, 5)},
        lambda num_placeholders: f"Have at least {num_placeholders} placeholders in square brackets, such as [address].",
    ),
    "detectable_content:postscript": _Rule(
        lambda rng, words, request: {"postscript_marker": rng.choice(("P.S.", "P.P.S"))},
        lambda postscript_marker: f'Add a postscript at the end, begun with "{postscript_marker}".',
    ),
    "detectable_format:json_format": _Rule(lambda *_: {}, lambda: "The whole answer must be JSON."),
    "detectable_format:multiple_sections": _Rule(
        lambda rng, words, request: {"section_spliter": rng.choice(("Section", "Part")), "num_sections": rng.randrange(2, 5)},
        lambda section_spliter, num_sections: (
            f"Have {num_sections} sections, each begun by {section_spliter} and its number, as in {section_spliter} 1."
        ),
    ),
    "detectable_format:number_bullet_lists": _Rule(
        lambda rng, words, request: {"num_bullets": rng.randrange(2, 6)},
        lambda num_bullets: f'Have exactly {num_bullets} bullet points of Markdown, lines that begin with "* ".',
    ),
    "detectable_format:number_highlighted_sections": _Rule(
        lambda rng, words, request: {"num_highlights": rng.randrange(1, 4)},
        lambda num_highlights: f"Highlight at least {num_highlights} parts of the text with Markdown, as in *this part*.",
    ),
    "detectable_format:title": _Rule(lambda *_: {}, lambda: "Give it a title in double angular brackets, as in <<title>>."),
    "keywords:existence": _Rule(
        lambda rng, words, request: {"keywords": sorted(rng.sample(words, rng.randrange(1, 4)))},
        lambda keywords: f"Use these words: {', '.join(keywords)}.",
    ),
    "keywords:forbidden_words": _Rule(
        lambda rng, words, request: {"forbidden_words": sorted(rng.sample(words, rng.randrange(1, 4)))},
        lambda forbidden_words: f"Do not use these words: {', '.join(forbidden_words)}.",
    ),
    "keywords:frequency": _Rule(
        lambda rng, words, request: {"keyword": rng.choice(words), "frequency": rng.randrange(1, 4), "relation": _relation(rng)},
        lambda keyword, frequency, relation: f"The word {keyword} should appear {relation} {frequency} times.",
    ),
    "keywords:letter_frequency": _Rule(
        lambda rng, words, request: (
            {"letter": rng.choice("bfgkpvwy"), "let_frequency": rng.randrange(2, 9), "let_relation": _relation(rng)}
        ),
        lambda letter, let_frequency, let_relation: f"The letter {letter} should appear {let_relation} {let_frequency} times.",
    ),
    "length_constraints:nth_paragraph_first_word": _Rule(
        lambda rng, words, request: (
            {"num_paragraphs": (count := rng.randrange(2, 5)), "nth_paragraph": rng.randrange(1, count + 1),
             "first_word": rng.choice(_FIRST_WORDS)}
        ),
        lambda num_paragraphs, nth_paragraph, first_word: (
            f"Have {num_paragraphs} paragraphs with an empty line between them and nowhere else; paragraph {nth_paragraph} must "
            f"begin with the word {first_word}."
        ),
    ),
    "length_constraints:number_paragraphs": _Rule(
        lambda rng, words, request: {"num_paragraphs": rng.randrange(2, 6)},
        lambda num_paragraphs: f"Have {num_paragraphs} paragraphs, with the Markdown divider *** between them.",
    ),
    "length_constraints:number_sentences": _Rule(
        lambda rng, words, request: {"num_sentences": rng.randrange(3, 8), "relation": _relation(rng)},
        lambda num_sentences, relation: f"Write {relation} {num_sentences} sentences.",
    ),
    "length_constraints:number_words": _Rule(
        lambda rng, words, request: {"num_words": 5 * rng.randrange(4, 13), "relation": _relation(rng)},
        lambda num_words, relation: f"Write {relation} {num_words} words.",
    ),
    "punctuation:no_comma": _Rule(lambda *_: {}, lambda: "Do not use any commas."),
    "startend:end_checker": _Rule(
        lambda rng, words, request: {"end_phrase": rng.choice(_END_PHRASES)},
        lambda end_phrase: f'End with exactly these words and nothing after them: "{end_phrase}"',
    ),
    "startend:quotation": _Rule(lambda *_: {}, lambda: "Put the whole answer in double quotation marks."),
}  # fmt: skip
KINDS = tuple(sorted(_RULES))


def _draw_constraints(rng: random.Random, count: int, sentences: list[str], request: str) -> dict[str, dict[str, Any]]:
    """Kinds that do not exclude each other, with arguments, by name."""
    kinds: list[str] = []
    while len(kinds) < count:
        kind = rng.choice([kind for kind in KINDS if kind not in kinds])
        if not any(kind in group and group.intersection(kinds) for group in _EXCLUSIVE):
            kinds.append(kind)
    words = sorted({word.strip(".").lower() for sentence in sentences for word in sentence.split() if len(word) > 5})
    return {kind: _RULES[kind].draw(rng, words, request) for kind in sorted(kinds)}


def write(constraints: Mapping[str, Mapping[str, Any]], topic: str, sentences: list[str]) -> str | None:
    """A text of these sentences that keeps to the constraints, of about three of them if it can be; None if none is found."""
    banned = constraints.get("keywords:forbidden_words")
    usable = [one for one in sentences if banned is None or follows("keywords:forbidden_words", banned, one)]
    for count in sorted(range(1, len(usable) + 1), key=lambda count: abs(count - 3)):
        text = _compose(constraints, topic, usable[:count])
        if all(follows(kind, kwargs, text) for kind, kwargs in constraints.items()):
            return text
    return None


def _compose(constraints: Mapping[str, Mapping[str, Any]], topic: str, sentences: list[str]) -> str:
    has = constraints.get
    sentences = list(sentences)
    if (wanted := has("keywords:existence")) is not None:
        sentences += [carrier.format(word) for carrier, word in zip(_CARRIERS, wanted["keywords"], strict=False)]
    if (wanted := has("keywords:frequency")) is not None and wanted["relation"] == "at least":
        sentences += [carrier.format(wanted["keyword"]) for carrier in _CARRIERS[: wanted["frequency"]]]
    if (wanted := has("detectable_content:number_placeholders")) is not None:
        marks = ("[name]", "[address]", "[date]", "[place]")[: wanted["num_placeholders"]]
        sentences.append(f"For more of it ask at {' and '.join(marks)}.")
    if (wanted := has("change_case:capital_word_frequency")) is not None and wanted["capital_relation"] == "at least":
        first = sentences[0].split()
        loud = wanted["capital_frequency"]
        sentences[0] = " ".join([word.upper() for word in first[:loud]] + first[loud:])
    if (wanted := has("detectable_format:number_highlighted_sections")) is not None:
        for at in range(min(wanted["num_highlights"], len(sentences))):
            first_word, _, rest = sentences[at].partition(" ")
            sentences[at] = f"*{first_word}* {rest}"
    text = _shape(constraints, sentences)
    if "detectable_format:title" in constraints:
        text = f"<<{topic.capitalize()}>>\n{text}"
    if (wanted := has("combination:repeat_prompt")) is not None:
        text = f"{wanted['prompt_to_repeat']}\n{text}"
    if (wanted := has("detectable_content:postscript")) is not None:
        text = f"{text}\n{wanted['postscript_marker']} Write to me about it."
    if (wanted := has("startend:end_checker")) is not None:
        text = f"{text}\n{wanted['end_phrase']}"
    if "startend:quotation" in constraints:
        text = f'"{text}"'
    if "change_case:english_capital" in constraints:
        return text.upper()
    return text.lower() if "change_case:english_lowercase" in constraints else text


def _shape(constraints: Mapping[str, Mapping[str, Any]], sentences: list[str]) -> str:
    """The sentences as paragraphs, bullet points, sections, two texts, JSON or, where none of these is wanted, one paragraph."""
    if (wanted := constraints.get("length_constraints:number_paragraphs")) is not None:
        return "\n***\n".join(_parts(sentences, wanted["num_paragraphs"]))
    if (wanted := constraints.get("length_constraints:nth_paragraph_first_word")) is not None:
        paragraphs = _parts(sentences, wanted["num_paragraphs"])
        at = wanted["nth_paragraph"] - 1
        if at < len(paragraphs):
            paragraphs[at] = f"{wanted['first_word'].capitalize()} is a good word to begin with. {paragraphs[at]}"
        return "\n\n".join(paragraphs)
    if (wanted := constraints.get("detectable_format:number_bullet_lists")) is not None:
        return "\n".join(f"* {part}" for part in _parts(sentences, wanted["num_bullets"]))
    if (wanted := constraints.get("detectable_format:multiple_sections")) is not None:
        parts = _parts(sentences, wanted["num_sections"])
        return "\n".join(f"{wanted['section_spliter']} {number}\n{part}" for number, part in enumerate(parts, 1))
    if "combination:two_responses" in constraints:
        return "\n******\n".join(_parts(sentences, 2))
    if "detectable_format:json_format" in constraints:
        return json.dumps({"text": " ".join(sentences)})
    return " ".join(sentences)


def _parts(sentences: list[str], count: int) -> list[str]:
    """As equal as they can be; fewer than `count` if there are fewer sentences."""
    cuts = [len(sentences) * at // count for at in range(count + 1)]
    return [" ".join(sentences[start:end]) for start, end in itertools.pairwise(cuts) if start < end]
