"""Answers out of a model's text: the final answer, a number, a value of JSON. Nothing is evaluated, whatever the text.

All of it takes time in proportion to the length of the text: no pattern here can be made to look at the same character often.
"""

import json
import re
from fractions import Fraction
from typing import Any

from data_pipelines.tasks.task import Scores

# Of a response. The longest solution of a task has a tenth of it; one that is longer is read as one without an answer.
MOST_CHARACTERS = 100_000
# Of a number, with its separators: beyond it, reading and comparing would take long.
_MOST_NUMBER_CHARACTERS = 100
# Of arrays and objects of JSON in each other. Schemas of tasks have three.
_MOST_DEPTH = 64
_ANSWER_LINE = re.compile(r"^[ \t*#>]*(?:final )?answer[ \t*]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"({_INTEGER})?(\.[0-9]+)?")
_FRACTION = re.compile(rf"(?:({_INTEGER}) )?({_INTEGER}) ?/ ?({_INTEGER})")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9,]+)\}\{([0-9,]+)\}")
_BOXED = "\\boxed{"
_FENCE = "```"


def final_answer(response: str) -> str | None:
    """The text after the last "Answer:" that begins a line, or in the last \\boxed{}, whichever begins later.

    Marks of Markdown around it and a full stop at its end are taken off. None where there is neither, and of a response of more
    than `MOST_CHARACTERS`.
    """
    if len(response) > MOST_CHARACTERS:
        return None
    found, at = None, -1
    for line in _ANSWER_LINE.finditer(response):
        found, at = line[1].lstrip(" \t*").rstrip(" \t\r*."), line.start(1)
    start = response.rfind(_BOXED)
    if start > at:
        boxed = _until_closed(response, start + len(_BOXED))
        found = found if boxed is None else boxed.strip()
    return found


def _until_closed(text: str, start: int) -> str | None:
    """What is before the brace that closes the one before `start`; None if none does."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    return None


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None if it is anything else.

    Integers with or without thousands separators (at every third digit or nowhere), decimals, fractions and mixed numbers
    ("2 1/2"), with a sign, a currency in front or a percent sign behind (hundredths); LaTeX's \\frac, \\$, \\% and {,} as well.
    No units, no exponents, no words.
    """
    if len(text) > _MOST_NUMBER_CHARACTERS:
        return None
    text = text.strip().strip("$").replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\u2212", "-")
    text = _LATEX_FRACTION.sub(r"\1/\2", text).strip()
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    text = text[1:] if text[:1] in ("$", "€", "£") else text
    parts = 100 if text.endswith("%") else 1
    text = text.removesuffix("%").strip() if parts == 100 else text
    if decimal := _DECIMAL.fullmatch(text):
        if not text:
            return None
        return sign * Fraction(f"{(decimal[1] or '0').replace(',', '')}{decimal[2] or ''}") / parts
    if fraction := _FRACTION.fullmatch(text):
        whole, above, below = (int((part or "0").replace(",", "")) for part in fraction.groups())
        return sign * (whole + Fraction(above, below)) / parts if below else None
    return None


def score_number(response: str, reference: str) -> Scores:
    """Parts of a response whose answer is one number.

    correct: its final answer is the reference's number. format: its last line is "Answer: N" and nothing else, N a number.
    """
    answer = final_answer(response)
    found = None if answer is None else number(answer)
    last_line = response[-1000:].rstrip().rpartition("\n")[2]
    plain = found is not None and last_line.startswith("Answer: ") and number(last_line.removeprefix("Answer: ")) is not None
    return {"correct": float(found is not None and found == number(reference)), "format": float(plain)}


def json_text(response: str) -> str:
    """The part of a response that should be JSON: its last block between fences of Markdown, or all of it."""
    pieces = response.split(_FENCE)
    if len(pieces) < 3:
        return response
    block = pieces[-2] if len(pieces) % 2 else pieces[-3]  # an odd number of fences: the last one opens what nothing closes
    language, newline, rest = block.partition("\n")
    return rest if newline and (not language.strip() or language.strip().isalpha()) else block


def read_json(text: str) -> Any:
    """The value that a text of JSON is, by RFC 8259 and stricter where that leaves a choice.

    Raises:
      ValueError: it is not JSON, has NaN or an infinity, a name twice in one object, or is longer, deeper or has longer numbers
        than any answer has.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"expected JSON of at most {MOST_CHARACTERS} characters, got {len(text)}")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"expected JSON of at most {_MOST_DEPTH} levels, got far more") from error
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"expected JSON of at most {_MOST_DEPTH} levels, got more")
    return value


def _inside(outer: dict | list) -> list:
    return list(outer.values()) if isinstance(outer, dict) else outer


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected JSON, got {name}, which it does not have")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("expected each name once in an object of JSON, got one twice")
    return found
