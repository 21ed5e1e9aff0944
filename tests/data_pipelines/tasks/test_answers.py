"""Answers are read as what they are: numbers exactly, JSON strictly, and nothing where there is nothing."""

import json
import random
from fractions import Fraction

import pytest

from data_pipelines.tasks.answers import final_answer, json_text, number, read_json, score_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-42", -42), ("+42", 42), ("\u221242", -42), (" 42 ", 42), ("007", 7), ("0", 0), ("-0", 0),
        ("1,234", 1234), ("1,234,567", 1234567), ("1{,}234", 1234), ("1234567", 1234567),
        ("3.25", Fraction(13, 4)), (".5", Fraction(1, 2)), ("-0.1", Fraction(-1, 10)), ("1,234.50", Fraction(2469, 2)),
        ("5.0", 5),
        ("3/4", Fraction(3, 4)), ("-3/4", Fraction(-3, 4)), ("6 / 8", Fraction(3, 4)), ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)), ("\\frac{1}{2}", Fraction(1, 2)), ("-\\dfrac{1}{2}", Fraction(-1, 2)),
        ("50%", Fraction(1, 2)), ("12.5 %", Fraction(1, 8)), ("50\\%", Fraction(1, 2)),
        ("$5", 5), ("-$5", -5), ("$1,000.25", Fraction(400100, 400)), ("\\$5", 5), ("$42$", 42), ("€3", 3), ("£3", 3),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "-", "$", "%", ",", "1,23", "12,34,567", "1234,567", "0,123", ",123", "1,2345", "1..2", "1.2.3", "5.",
        "--5", "+-5", "- 5", "1e5", "0x1f", "1_000", "nan", "inf", "∞", "½", "٣", "\uff11", "5 apples", "x=5", "5 or 6", "1/0",
        "1/", "/2", "1/2/3", "1.5/2", "1 2", "(5)", "5%%", "\\frac{1}{0}", "\\frac{a}{b}", "9" * 101, "five", "5\n6", "\ud800",
        "5\x00",
    ],
)  # fmt: skip
def test_what_is_no_number(text):
    assert number(text) is None


def test_written_numbers_are_read_back():
    rng = random.Random(0)
    for _ in range(2000):
        above, places = rng.randrange(-(10 ** rng.randrange(1, 20)), 10 ** rng.randrange(1, 20)), rng.randrange(0, 6)
        value = Fraction(above, 10**places)
        sign, (whole, rest) = "-" * (above < 0), divmod(abs(above), 10**places)
        decimals = f".{rest:0{places}}" if places else ""
        assert number(f"{sign}{whole:,}{decimals}") == number(f"{sign}{whole}{decimals}") == value
        assert number(f"{above}/{10**places}") == value


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so it is 5.\nAnswer: 5", "5"),
        ("Answer: 5.", "5"),
        ("Answer: 4\nNo.\nAnswer: 5\n", "5"),
        ("**Answer:** 5", "5"),
        ("**Answer: 5**", "5"),
        ("# Final answer: 5", "5"),
        ("ANSWER:5\r\n", "5"),
        ("the Answer: 5", None),
        ("My answer: 5", None),
        ("Answer 5", None),
        ("Answer:", ""),
        ("5", None),
        ("it is \\boxed{5}", "5"),
        ("it is \\boxed{\\frac{1}{2}} and", "\\frac{1}{2}"),
        ("\\boxed{4} but \\boxed{ 5 }", "5"),
        ("Answer: \\boxed{5}", "5"),
        ("\\boxed{4}\nAnswer: 5", "5"),
        ("Answer: 5\nthat is \\boxed{6", "5"),
        ("\\boxed{6", None),
        ("Answer: .5", ".5"),
        ("", None),
    ],
)
def test_the_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "correct", "form"),
    [
        ("48 / 2 = 24\nAnswer: 24", 1, 1),
        ("Answer: 24.0", 1, 1),
        ("Answer: 24\n\n", 1, 1),
        ("Answer: 25", 0, 1),
        ("Answer: 24 clips", 0, 0),
        ("Answer: 24 or 25", 0, 0),
        ("Answer: 24\nI hope that this helps.", 1, 0),
        ("**Answer:** 24", 1, 0),
        ("\\boxed{24}", 1, 0),
        ("24", 0, 0),
        ("Answer: -24", 0, 1),
        ("Answer: 240", 0, 1),
        ("Answer: 2 4", 0, 0),
        ("Answer: 24%", 0, 1),
        ("x" * 100_000 + "\nAnswer: 24", 0, 0),
    ],
)
def test_a_response_that_is_a_number(response, correct, form):
    assert score_number(response, "24") == {"correct": correct, "format": form}


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ('```json\n{"a": 1}\n```', '{"a": 1}\n'),
        ('```\n{"a": 1}\n```', '{"a": 1}\n'),
        ('Here:\n```JSON\n{"a": 1}\n```\nDone.', '{"a": 1}\n'),
        ("```json\n1\n```\nbetter:\n```json\n2\n```", "2\n"),
        ("```json\n1\n```\nand ```", "1\n"),
        ("```1```", "1"),
        ("```json\n1", "```json\n1"),
    ],
)
def test_the_json_of_a_response(response, text):
    assert json_text(response) == text


def test_json_is_read_as_the_library_does():
    rng = random.Random(0)

    def value(depth):
        leaf = lambda: rng.choice([None, True, False, rng.randrange(-99, 99), rng.random(), "", "ä\n\"\\", "\u2028"])
        kind = rng.randrange(3) if depth else 0
        if kind == 1:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {f"k{at}": value(depth - 1) for at in range(rng.randrange(4))} if kind else leaf()

    for _ in range(300):
        expected = value(5)
        assert read_json(json.dumps(expected)) == expected
        assert read_json(json.dumps(expected, ensure_ascii=False, indent=2)) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ('{"a": 1', "Expecting"),
        ('{"a": 1} and more', "Extra data"),
        ("NaN", "expected JSON, got NaN, which it does not have"),
        ('{"a": -Infinity}', "expected JSON, got -Infinity"),
        ('{"a": 1, "a": 2}', "expected each name once in an object of JSON, got one twice"),
        ("[" * 64 + "1" + "]" * 64, None),
        ("[" * 65 + "1" + "]" * 65, "expected JSON of at most 64 levels, got more"),
        ("[" * 10_000 + "]" * 10_000, "expected JSON of at most 64 levels, got far more"),
        ("9" * 10_000, "Exceeds the limit"),
        ('"' + "a" * 100_000 + '"', "expected JSON of at most 100000 characters, got 100002"),
    ],
)
def test_what_is_no_json(text, problem):
    if problem is None:
        read_json(text)
        return
    with pytest.raises(ValueError, match=problem):
        read_json(text)
