"""What a record of text must be, and what is said of one that is not."""

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

# Of the fields of a record, in a message: a record may have a million.
_NAMES = 20
_NAMES_CHARACTERS = 400


class Fields(NamedTuple):
    """What is read of a record. text, difficulty: fields' names (no difficulty: None). max_bytes: of a text or line."""

    text: str
    difficulty: str | None
    max_bytes: int


class Record(NamedTuple):
    """A good record: line or row, counted from 1; its text, neither empty nor too long; its difficulty, finite."""

    index: int
    text: str
    difficulty: float | None


class BadRecord(Exception):
    """A record that cannot be read, while those after it can.

    reason: "no_utf8", "no_json", "no_object", "no_field", "no_text" (null or no string), "empty", "too_long" or "no_difficulty".
    content: the record, or as much of it as was read.
    """

    def __init__(self, reason: str, message: str, content: bytes):
        """message: what was expected, what came, and what to do."""
        super().__init__(message)
        self.reason = reason
        self.content = content


def parse_json(line: bytes, fields: Fields) -> tuple[str, float | None]:
    """Text and difficulty of a line that is a JSON object."""
    if len(line) > fields.max_bytes:
        raise BadRecord("too_long", f"the line is longer than {fields.max_bytes} bytes; split the record", line)
    decoded = _decode(line)
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise BadRecord("no_json", f"no JSON ({error}); repair or remove the line", line) from error
    if not isinstance(record, dict):
        message = f"expected a JSON object with the field {fields.text!r}, got {type(record).__name__}"
        raise BadRecord("no_object", message, line)
    for field, setting in ((fields.text, "text_field"), (fields.difficulty, "difficulty_field")):
        if field is not None and field not in record:
            raise BadRecord("no_field", no_field(field, record, "field", setting), line)
    difficulty = None if fields.difficulty is None else _checked_difficulty(record[fields.difficulty], fields, line)
    text = _checked_text(record[fields.text], fields, line)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON
        message = f"{fields.text!r} is no UTF-8 ({error.reason}); repair or remove the record"
        raise BadRecord("no_utf8", message, line) from error
    return text, difficulty


def parse_whole(content: bytes, fields: Fields) -> tuple[str, None]:
    """The text of a file that is one text."""
    if len(content) > fields.max_bytes:
        message = f"more than {fields.max_bytes} bytes are one text; split the file, or write a .jsonl of its parts"
        raise BadRecord("too_long", message, content)
    return _checked_text(_decode(content), fields, content), None


def parse_values(values: tuple[Any, Any], fields: Fields) -> tuple[str, float | None]:
    """Text and difficulty of a row. values: the text as bytes, or what there is in its place; the difficulty."""
    text, difficulty = values
    content = text if isinstance(text, bytes) else b""
    if isinstance(text, bytes):
        if len(text) > fields.max_bytes:
            raise BadRecord("too_long", f"the text is longer than {fields.max_bytes} bytes; split the record", content)
        text = _decode(text)
    if fields.difficulty is not None:
        difficulty = _checked_difficulty(difficulty, fields, content)
    return _checked_text(text, fields, content), difficulty


def no_field(field: str, found: Iterable[str], kind: str, setting: str) -> str:
    """The message that there is no field or column (kind) of that name. setting: what names it."""
    names = ", ".join(map(repr, itertools.islice(found, _NAMES)))[:_NAMES_CHARACTERS] or "none at all"
    whose = "the text's" if setting == "text_field" else "the difficulty's"
    return f"there is no {kind} {field!r}, but {names}; set {setting} to {whose}"


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        message = f"no UTF-8 ({error.reason} at byte {error.start}); convert or remove the record"
        raise BadRecord("no_utf8", message, content) from error


def _checked_text(text: Any, fields: Fields, record: bytes) -> str:
    """The text, if it is one that is not empty."""
    if not isinstance(text, str):
        message = f"{fields.text!r} is {type(text).__name__}, not text; set text_field to the field with the text"
        raise BadRecord("no_text", message, record)
    if not text:
        raise BadRecord("empty", "the text is empty; remove the record", record)
    return text


def _checked_difficulty(difficulty: Any, fields: Fields, record: bytes) -> float:
    """The difficulty, if it is a finite number."""
    number = isinstance(difficulty, int | float) and not isinstance(difficulty, bool)
    try:
        finite = number and math.isfinite(float(difficulty))
    except OverflowError:  # an integer of three hundred digits
        finite = False
    if not finite:
        message = f"{fields.difficulty!r} is {difficulty!r:.40}, not a finite number; repair it, or unset difficulty_field"
        raise BadRecord("no_difficulty", message, record)
    return float(difficulty)
