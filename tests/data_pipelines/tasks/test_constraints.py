"""Constraints keep to the verdicts of IFEval's own evaluator, and the texts to write under them can be written."""

import collections
import json

import pytest

from data_pipelines.tasks.constraints import CHECKS, count_sentences, follows
from data_pipelines.tasks.instructions import KINDS, Instructions

TASK = Instructions()
FIRST_WORD = "length_constraints:nth_paragraph_first_word"
LEFT_OUT = {"language:response_language"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def loose_variants(response: str) -> list[str]:
    """Zhou et al. 2023, section 2.2: without the first line, the last, both, and all of them without asterisks."""
    rows = response.split("\n")
    texts = [response, *("\n".join(rows[cut]).strip() for cut in (slice(1, None), slice(-1), slice(1, -1)))]
    return texts + [text.replace("*", "") for text in texts]


@pytest.fixture(scope="module")
def verdicts(published_data):
    """(kind, official verdict, ours) of every instruction, strict and loose, on the responses and on those of the next prompt."""
    folder = published_data / "ifeval"
    prompts = lines(folder / "input_data_even.jsonl")
    responses = {row["key"]: row["response"] for row in lines(folder / "gpt4_responses_even.jsonl")}
    keys = list(responses)
    following = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    found = []
    for name in ("gpt4", "shifted"):
        official = {row["key"]: row for row in lines(folder / f"official_verdicts_{name}_even.jsonl")}
        for prompt in prompts:
            row = official[prompt["key"]]
            response = responses[prompt["key"] if name == "gpt4" else following[prompt["key"]]]
            for at, (kind, kwargs) in enumerate(zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True)):
                if kind in LEFT_OUT or kind in row["seed_dependent"]:
                    continue
                loose = any(follows(kind, kwargs, text) for text in loose_variants(response))
                found += [(kind, row["strict"][at], follows(kind, kwargs, response)), (kind, row["loose"][at], loose)]
    return found


def test_every_kind_of_ifeval_but_the_language_is_covered(verdicts):
    assert {kind for kind, _, _ in verdicts} == set(CHECKS)
    assert {kind for kind, official, _ in verdicts if official} == set(CHECKS), "a kind that nobody kept proves little"


def test_verdicts_are_the_official_ones(verdicts):
    """All but those on two responses that keep to their case and that langdetect takes for another language than English."""
    wrong = collections.Counter(kind for kind, official, ours in verdicts if official != ours)
    assert wrong == {"change_case:english_lowercase": 2, "change_case:english_capital": 2}
    assert not any(official for _, official, ours in verdicts if official != ours)
    assert len(verdicts) == 1468


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("One.", 1), ("One. Two! Three?", 3), ("One", 1), ("One... Two.", 2), ("What?! No.", 2),
        ("Dr. Lee came. He sat.", 2), ("It costs 3.50 now.", 1), ('He said "No." Then he left.', 2), ("J. S. Bach wrote it.", 1),
        ("See e.g. the first one.", 1), ("So it is (mostly.) Yes.", 2), ("One.\n\nTwo.", 2), ("It was I. She left.", 2),
        (". . .", 3), ("wait. and see", 2),
        ("wait... and see", 1), ("Wait... And see", 2), ("it is at o. And so on.", 2), ("This is it, etc. and so on", 1),
    ],
)  # fmt: skip
def test_sentences(text, count):
    assert count_sentences(text) == count


KEPT = {
    "change_case:capital_word_frequency": ({"capital_frequency": 2, "capital_relation": "at least"}, "NO, I-80.", "No, I do."),
    "change_case:english_capital": ({}, "ALL OF IT.", "ALL Of IT."),
    "change_case:english_lowercase": ({}, "all of it.", "all of It."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "say it.\nIt.", "First: Say it.\nIt."),
    "combination:two_responses": ({}, "One.\n******\nTwo.", "One.\n******\nOne."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b]", "[[a] and [b\n]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "So.\nP. S. More.", "So.\nPS More."),
    "detectable_format:constrained_response": ({}, "My answer is no.", "My answer is No."),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": [1]} so'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Part", "num_sections": 2}, "Part 1 a\nPart2 b", "Part 1 a\nPart b"
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n  - b", "* a\n** b"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    "detectable_format:title": ({}, "<<a>>\nb", "<< >>\nb"),
    "keywords:existence": ({"keywords": ["sea", "c++"]}, "A season of C++.", "A season of C+."),
    "keywords:forbidden_words": ({"forbidden_words": ["sea"]}, "A season.", "The Sea."),
    "keywords:frequency": ({"keyword": "sea", "frequency": 2, "relation": "less than"}, "The sea.", "The Sea, the season."),
    "keywords:letter_frequency": ({"letter": "a", "let_frequency": 3, "let_relation": "at least"}, "A banana", "a bat"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "here"}, "So.\n\n\"Here's more.", "So.\n\nHereby more."
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "***\nA\n***\nB", "A\n***\n\n***\nB"),
    "length_constraints:number_sentences": ({"num_sentences": 2, "relation": "less than"}, "Dr. Lee left.", "So. It is."),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "well-known it", "wellknown it"),
    "punctuation:no_comma": ({}, "a; b", "a, b"),
    "startend:end_checker": ({"end_phrase": "That is all."}, 'So. "That is ALL."', "That is all. Yes."),
    "startend:quotation": ({}, ' "a" ', '"a" b'),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKS)
def test_each_constraint_is_kept_and_broken_by_near_misses(kind):
    kwargs, kept, broken = KEPT[kind]
    assert follows(kind, kwargs, kept) and not follows(kind, kwargs, broken)
    assert not follows(kind, kwargs, "") and not follows(kind, kwargs, " \n")


@pytest.mark.parametrize(
    ("kind", "kwargs", "text", "kept"),
    [
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "A *** B", True),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "A\n***\nB\n***\n", True),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "A\n\nB", True),
        (FIRST_WORD, {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "A"}, "a b\n\nc", True),
        (FIRST_WORD, {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"}, "A\n\nB\n\nC", False),
        (FIRST_WORD, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "b"}, "A\n\n\n\nB", False),
        ("combination:two_responses", {}, "A****** B******", True),
        ("combination:two_responses", {}, "A\n******\nB\n******\nC", False),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "A. p. p. s", True),
        ("detectable_content:postscript", {"postscript_marker": "PS:"}, "A. Ps: b", True),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**a**", False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a\nb*", False),
        ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "\n\n * a\n\t* b\n-c", True),
        ("detectable_format:title", {}, "<<<>>", False),
        ("detectable_format:title", {}, "so <<a>> it <<b>> is", True),
        ("detectable_format:title", {}, "<<a\nb>>", False),
        ("detectable_format:json_format", {}, "[" * 10_000, False),
        ("keywords:existence", {"keywords": ["a", "b"]}, "A", False),
        ("keywords:frequency", {"keyword": " a ", "frequency": 3, "relation": "at least"}, "Banana", True),
        ("startend:quotation", {}, '"', False),
    ],
)  # fmt: skip
def test_edges_of_constraints(kind, kwargs, text, kept):
    """Each as Google's code has it."""
    assert follows(kind, kwargs, text) is kept


@pytest.mark.parametrize("kind", CHECKS)
def test_no_constraint_takes_time_in_the_square_of_the_length(kind):
    """As long as a response may be: one that did would take minutes."""
    pieces = (".", ". a", "p. p", "[", "[\n", "<<", ">>", "*", "* a", "*\n", " ", "\n", "\t", "Part 1", "-", '"', "A", "\ud800")
    for piece in pieces:
        follows(kind, KEPT[kind][0], piece * (99_000 // len(piece)) + "x")
    assert not follows(kind, KEPT[kind][0], KEPT[kind][1] + " " * 100_000)


def test_an_unknown_constraint_is_refused():
    with pytest.raises(ValueError, match="expected a constraint among change_case:.*; got 'language:response_language'"):
        follows("language:response_language", {"language": "en"}, "Text.")


SAMPLES = [
    (level, TASK.sample(seed, level, split)) for level in range(1, 6) for seed in range(80) for split in ("train", "held_out")
]


def test_problems_have_their_number_of_constraints_and_all_kinds_come():
    for level, problem in SAMPLES:
        kinds = [one["kind"] for one in problem.reference]
        assert len(set(kinds)) == len(kinds) == level
    assert {one["kind"] for _, problem in SAMPLES for one in problem.reference} == set(KINDS)
    assert set(CHECKS) - set(KINDS) == {"detectable_format:constrained_response"}, "it is an answer, and no text"


def test_one_text_does_not_keep_every_constraint():
    """The shortest and dullest texts are seldom correct where there are several constraints."""
    for text in ("A.", "Good.", "It is so. " * 8, "* a\n* b\n* c"):
        for level in (3, 4, 5):
            correct = [TASK.score(text, problem.reference)["correct"] for at, problem in SAMPLES if at == level]
            assert sum(correct) / len(correct) < 0.1


def test_a_broken_constraint_is_named_and_counted():
    reference = [{"kind": "punctuation:no_comma", "kwargs": {}}, {"kind": "startend:quotation", "kwargs": {}}]
    assert TASK.score('"a b"', reference) == {"correct": 1, "followed": 1, "punctuation:no_comma": 1, "startend:quotation": 1}
    assert TASK.score('"a, b"', reference) == {"correct": 0, "followed": 0.5, "punctuation:no_comma": 0, "startend:quotation": 1}


def test_constraints_of_a_topic_are_of_one_split_in_any_order():
    asked = {"train": set(), "held_out": set()}
    for split, found in asked.items():
        for level in (1, 2):
            for seed in range(250):
                problem = TASK.sample(seed, level, split)
                topic = problem.messages[-1]["content"].partition(".")[0]
                found.add((topic, tuple(sorted(json.dumps(one, sort_keys=True) for one in problem.reference))))
    assert not asked["train"] & asked["held_out"]
