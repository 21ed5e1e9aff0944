"""Structured extraction: a document and a JSON schema in, a JSON object out, scored field by field."""

import functools
import json
import random
from typing import Any

from data_pipelines.tasks.answers import json_text, read_json
from data_pipelines.tasks.documents import KINDS, SCHEMAS
from data_pipelines.tasks.task import Problem, Scores, Split, draw

_REQUEST = """Extract the data of this document as one JSON object that keeps to the schema. Copy text as it is written; \
what the document does not say is null. Answer with the JSON only.

Schema:
{schema}

Document:
{document}"""


class Extraction:
    """Invoices, support tickets and case notes. Difficulties: 1 all fields are there, plainly; 2 some are missing, and other
    things look like them; 3 longer lists, and more that looks like them.
    """

    name = "extraction"
    max_difficulty = 3

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. The content is the record: however a document is worded, its data are of one split."""

        def make(rng: random.Random) -> tuple[Problem, Any]:
            kind = rng.choice(tuple(KINDS))
            document = KINDS[kind](rng, difficulty)
            schema = json.dumps(SCHEMAS[kind], ensure_ascii=False)
            problem = Problem(
                messages=[{"role": "user", "content": _REQUEST.format(schema=schema, document=document.text)}],
                reference={"record": document.record, "kind": kind},
                solution=json.dumps(document.record, ensure_ascii=False),
            )
            return problem, [kind, document.record]

        return draw(self, seed, difficulty, split, make)

    def score(self, response: str, reference: dict[str, Any]) -> Scores:
        """Parts of an extraction.

        correct: every field is the reference's, and the schema holds. json: it can be read. schema: it keeps to the schema.
        fields: twice the number of right values over that of all values here and there, so that those that are missing, wrong or
        made up count alike (Dice); nulls are values. Text is compared without spaces around it, numbers by value.
        """
        try:
            found = read_json(json_text(response))
        except ValueError:
            return {"correct": 0.0, "json": 0.0, "schema": 0.0, "fields": 0.0}
        valid = float(_keeps_to(found, reference["kind"]))
        expected = reference["record"]
        values = _count(found) + _count(expected)
        fields = 2 * agreement(found, expected) / values if values else 1.0
        return {"correct": float(valid and fields == 1), "json": 1.0, "schema": valid, "fields": fields}


def agreement(found: Any, expected: Any) -> int:
    """How many values of `expected` are at the same place in `found`.

    Values are texts, numbers, booleans, null and empty lists and objects. The items of two lists are paired in their order as is
    best for the count, so that one that is left out does not make all after it wrong.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and expected and found:
        return sum(agreement(found[key], value) for key, value in expected.items() if key in found)
    if isinstance(expected, list) and isinstance(found, list) and expected and found:
        best = [0] * (len(expected) + 1)  # by how many of the expected items have been passed
        for item in found:
            before = best
            best = [0]
            for at, wanted in enumerate(expected):
                best.append(max(best[at], before[at + 1], before[at] + agreement(item, wanted)))
        return best[-1]
    return int(_same(found, expected))


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, str) and isinstance(found, str):
        return found.split() == expected.split()
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (found, expected))
    return found == expected and (numbers or type(found) is type(expected))


def _count(value: Any) -> int:
    """How many values there are in a value of JSON, as `agreement` counts them."""
    if isinstance(value, dict | list) and value:
        return sum(map(_count, value.values() if isinstance(value, dict) else value))
    return 1


def _keeps_to(value: Any, kind: str) -> bool:
    return _validator(kind).is_valid(value)


@functools.cache
def _validator(kind: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(SCHEMAS[kind])
