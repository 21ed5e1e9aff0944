"""Extraction: documents say what their records have and no more, and answers are scored value by value."""

import copy
import itertools
import json
import random
import re

import jsonschema
import pytest

from data_pipelines.tasks.documents import KINDS, SCHEMAS
from data_pipelines.tasks.extraction import Extraction, agreement
from data_pipelines.tasks.task import split_of

TASK = Extraction()
SAMPLES = [TASK.sample(seed, level, split) for level in (1, 2, 3) for seed in range(80) for split in ("train", "held_out")]


def values(record):
    """(path, value) of every scalar."""
    if isinstance(record, dict):
        return [((key, *path), leaf) for key, inner in record.items() for path, leaf in values(inner)]
    if isinstance(record, list):
        return [((at, *path), leaf) for at, inner in enumerate(record) for path, leaf in values(inner)]
    return [((), record)]


def test_schemas_are_schemas_and_records_keep_to_them():
    assert SCHEMAS.keys() == KINDS.keys()
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for problem in SAMPLES:
        schema = SCHEMAS[problem.reference["kind"]]
        jsonschema.Draft202012Validator(schema).validate(problem.reference["record"])
        assert json.dumps(schema) in problem.messages[-1]["content"]


MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]
MARKS = {"EUR": "€", "GBP": "£", "USD": "$"}
WORDS = {1: "once", 2: "twice", 3: "three times"}


def written(path, value):
    """The ways in which a document may have a value."""
    if path[-1] in ("date", "due_date"):
        year, month, day = map(int, value.split("-"))
        name = MONTHS[month - 1]
        return [value, f"{day} {name} {year}", f"{name} {day}, {year}", f"{day:02}.{month:02}.{year}"]
    if path[-1] in ("unit_price", "total"):
        return [f"{value:,.2f}"]
    if path[-1] == "currency":
        return [MARKS[value]]
    if path[-1] == "sex":
        return ["woman", "female"] if value == "female" else ["man", "male"]
    if path[-1] == "times_a_day":
        return [f"{WORDS[value]} a day"]
    if path[-1] == "duration_days":
        return [f"for {value} days", f"for {value // 7} weeks"]
    return [str(value)]


def test_a_document_says_all_that_its_record_has():
    for problem in SAMPLES:
        text = problem.messages[-1]["content"].partition("Document:\n")[2]
        for path, value in values(problem.reference["record"]):
            if value is not None and path[-1] != "priority":
                assert any(form in text for form in written(path, value)), (path, value, text)


def test_what_is_missing_is_not_in_the_document():
    telling = {
        "due_date": r"pay by|Due on|Payable until", "email": "@", "order_number": "[Oo]rder",
        "duration_days": r"\bfor \d+ (days|weeks)",
        "heart_rate": "Today:[^.]*pulse", "systolic": "blood pressure", "follow_up_days": "again in",
    }  # fmt: skip
    missing = dict.fromkeys(telling, 0)
    for problem in SAMPLES:
        text = problem.messages[-1]["content"].partition("Document:\n")[2]
        for path, value in values(problem.reference["record"]):
            if path[-1] in telling:
                assert (re.search(telling[path[-1]], text) is None) == (value is None), (path, text)
                missing[path[-1]] += value is None
    assert all(missing.values())
    easy = [TASK.sample(seed, 1).reference["record"] for seed in range(40)]
    assert not any(value is None for record in easy for _, value in values(record))


def test_an_invoice_adds_up():
    discounts = 0
    for problem in SAMPLES:
        record = problem.reference["record"]
        if problem.reference["kind"] != "invoice":
            continue
        cents = sum(round(item["unit_price"] * 100) * item["quantity"] for item in record["items"])
        discount = re.search(r"Discount -.([\d,.]+)", problem.messages[-1]["content"])
        taken = round(float(discount[1].replace(",", "")) * 100) if discount else 0
        assert cents - taken == round(record["total"] * 100)
        discounts += taken > 0
    assert discounts


def test_the_record_alone_decides_the_split():
    for at, problem in enumerate(SAMPLES):
        record = [problem.reference["kind"], problem.reference["record"]]
        assert split_of(record) == ("train", "held_out")[at % 2]


INVOICE = next(problem.reference for problem in SAMPLES if len(problem.reference["record"].get("items", ())) > 2)


def score(change, kind=json.dumps):
    record = copy.deepcopy(INVOICE["record"])
    changed = change(record)
    return TASK.score(kind(record if changed is None else changed), INVOICE)


def leaves(record=INVOICE["record"]):
    return len(values(record))


def test_near_misses_cost_what_is_wrong():
    count = leaves()
    item = len(INVOICE["record"]["items"][0])
    assert score(lambda r: r.update(seller="Another"))["fields"] == pytest.approx(1 - 1 / count)
    assert score(lambda r: r.update(seller="Another")) | {"fields": 0} == {"correct": 0, "json": 1, "schema": 1, "fields": 0}
    missing = score(lambda r: r.pop("currency") and None)
    assert missing == {"correct": 0, "json": 1, "schema": 0, "fields": pytest.approx(2 * (count - 1) / (2 * count - 1))}
    more = score(lambda r: r.update(note="paid"))
    assert more == {"correct": 0, "json": 1, "schema": 0, "fields": pytest.approx(2 * count / (2 * count + 1))}
    first = score(lambda r: r["items"].pop(0) and None)
    assert first["fields"] == pytest.approx(2 * (count - item) / (2 * count - item)), "all items after it would be wrong"
    assert first["correct"] == 0 and first["schema"] == 1
    assert score(lambda r: r["items"].append(r["items"][0]))["fields"] == pytest.approx(2 * count / (2 * count + item))
    assert score(lambda r: r["items"].clear())["correct"] == 0
    assert score(lambda r: r.update(total=r["total"] + 0.01))["correct"] == 0
    assert score(lambda r: r.update(total=str(r["total"])))["schema"] == 0
    spaced = score(lambda r: r.update(date=f"{r['date']} "))
    assert spaced == {"correct": 0, "json": 1, "schema": 0, "fields": 1}, "equal as text, but no date of the schema"
    assert score(lambda r: [r]) == {"correct": 0, "json": 1, "schema": 0, "fields": 0}
    for nothing in ("null", "1", '"text"', "[]", "{}"):
        scores = TASK.score(nothing, INVOICE)
        assert scores == {"correct": 0, "json": 1, "schema": 0, "fields": 0}


def test_what_makes_no_difference():
    right = {"correct": 1, "json": 1, "schema": 1, "fields": 1}
    assert score(lambda r: None) == right
    assert score(lambda r: None, lambda r: json.dumps(r, indent=4, sort_keys=True)) == right
    assert score(lambda r: None, lambda r: f"Here it is:\n```json\n{json.dumps(r, ensure_ascii=False)}\n```") == right
    assert score(lambda r: r.update(seller=f" {r['seller'].replace(' ', '  ')} ")) == right
    assert score(lambda r: r["items"][0].update(quantity=float(r["items"][0]["quantity"]))) == right


def test_types_of_values_are_told_apart():
    different = [None, True, False, 2, 0, 1, "", "1", "null", [], {}, [None], {"a": None}, 1.5]
    for a, b in itertools.product(different, repeat=2):
        assert agreement(a, b) == int(json.dumps(a) == json.dumps(b)), (a, b)
    assert agreement(1.0, 1) == agreement(1, 1.0) == 1


def pairings(found, expected):
    """The best agreement of two lists of scalars' records, over every pairing in order."""
    best = 0
    for size in range(min(len(found), len(expected)) + 1):
        for a in itertools.combinations(found, size):
            for b in itertools.combinations(expected, size):
                best = max(best, sum(sum(x[key] == y[key] for key in y) for x, y in zip(a, b, strict=True)))
    return best


def test_lists_are_paired_as_is_best():
    rng = random.Random(0)
    for _ in range(200):
        found, expected = ([{"a": rng.randrange(3), "b": rng.randrange(3)} for _ in range(rng.randrange(5))] for _ in range(2))
        if found and expected:
            assert agreement(found, expected) == pairings(found, expected)


def test_correct_means_that_it_is_the_record():
    """Of changed answers, the ones that are called correct are those that another reading of them finds equal."""
    rng = random.Random(1)
    correct = 0
    for problem in SAMPLES:
        for _ in range(10):
            text = problem.solution
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(("", " ", "0", "x", '"', "\\n", text[at].upper())) + text[at + 1 :]
            try:
                same = json.loads(re.sub(r"\s+", " ", text)) == problem.reference["record"]
            except ValueError:
                same = False
            scored = TASK.score(text, problem.reference)["correct"]
            if "\\n" not in text and '" ' not in text and ' "' not in text:
                assert scored == same, text
            correct += scored
    assert correct
