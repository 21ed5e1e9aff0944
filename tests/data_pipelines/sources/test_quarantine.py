"""Bad records put aside: what is written of each, how they are counted, and when they are too many."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import DocumentsConfig, Quarantine, RecordCounts, list_source_files, read_documents, read_source_file
from data_pipelines.sources.records import BadRecord

GOOD = b'{"text": "a", "hard": 1.5}'
# Each bad line with its reason, where the text is in `text` and the difficulty in `hard`.
BAD = {
    b'{"text": "\xff", "hard": 1}': "no_utf8",
    b'{"text": "\\ud800", "hard": 1}': "no_utf8",
    b'{"text": "a", "hard": 1': "no_json",
    b"[" * 100_000: "no_json",
    b'["text"]': "no_object",
    b'{"hard": 1}': "no_field",
    b'{"text": "a"}': "no_field",
    b'{"text": null, "hard": 1}': "no_text",
    b'{"text": 7, "hard": 1}': "no_text",
    b'{"text": "", "hard": 1}': "empty",
    b'{"text": "a", "hard": null}': "no_difficulty",
    b'{"text": "a", "hard": true}': "no_difficulty",
    b'{"text": "a", "hard": NaN}': "no_difficulty",
    b'{"text": "a", "hard": 1' + b"0" * 400 + b"}": "no_difficulty",
    b'{"text": "' + b"x" * 200_000 + b'", "hard": 1}': "too_long",
}


def _config(folder, **settings):
    return DocumentsConfig(source=str(folder), **{"held_out_share": 1.0, **settings})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def test_every_kind_of_bad_record_is_put_aside_and_the_good_ones_come_through(folder, tmp_path):
    (folder / "a.jsonl").write_bytes(b"\n".join(line for bad in BAD for line in (GOOD, bad)) + b"\n\n" + GOOD)
    config = _config(folder, difficulty_field="hard", max_text_bytes=150_000)
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        documents = list(read_documents(config, "held_out", quarantine))
        assert not (tmp_path / "bad.jsonl").exists()
    assert [document.name for document in documents] == [f"a.jsonl:{2 * n + 1}" for n in range(len(BAD))] + ["a.jsonl:32"]
    assert {(document.text, document.difficulty) for document in documents} == {("a", 1.5)}
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(entry["where"], entry["reason"]) for entry in entries] == [
        (f"a.jsonl:{2 * n}", reason) for n, reason in enumerate(BAD.values(), 1)
    ]
    for entry, line in zip(entries, BAD, strict=True):
        assert entry["excerpt"] == line[:200].decode("utf-8", "backslashreplace")
    assert quarantine.counts.seen == 2 * len(BAD) + 1
    assert quarantine.counts.bad == {reason: list(BAD.values()).count(reason) for reason in BAD.values()}
    assert [path.name for path in tmp_path.iterdir() if "bad" in path.name] == ["bad.jsonl"]


@pytest.mark.parametrize("line", [line for line, reason in BAD.items() if reason == "no_difficulty"])
def test_without_a_quarantine_a_bad_difficulty_ends_the_reading(line, folder):
    (folder / "a.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match="a.jsonl:1: 'hard' is .*, not a finite number; repair it, or unset difficulty_field"):
        list(read_documents(_config(folder, difficulty_field="hard"), "held_out"))


def test_a_record_of_a_million_fields_fills_no_quarantine(folder, tmp_path):
    record = {"x" * 1000: 1, **{str(number): 0 for number in range(10_000)}}
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"y": 1}))
    (file,) = list_source_files(_config(folder), "held_out")
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        assert not list(read_source_file(_config(folder), file, "held_out", quarantine))
    assert quarantine.counts.bad == {"no_field": 2}
    assert len((tmp_path / "bad.jsonl").read_text()) < 2000


def test_a_quarantine_says_the_same_wherever_the_source_lies(folder, tmp_path):
    written = []
    for place in ("texts", "moved"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "a.jsonl").write_bytes(b"\n".join([GOOD, *BAD]))
        (tmp_path / place / "b.txt").write_bytes(b"\xff")
        with Quarantine(tmp_path / f"{place}.bad") as quarantine:
            list(read_documents(_config(tmp_path / place), "held_out", quarantine))
        written.append((tmp_path / f"{place}.bad").read_bytes())
    assert written[0] == written[1]
    assert b'"where": "b.txt:1"' in written[0]


def test_each_side_of_the_split_has_its_own_bad_records(folder, tmp_path):
    (folder / "a.jsonl").write_bytes((GOOD + b"\nbad\n") * 100)
    wheres, seen = [], 0
    for split in ("train", "held_out"):
        with Quarantine(tmp_path / "bad.jsonl") as quarantine:
            list(read_documents(_config(folder, held_out_share=0.3), split, quarantine))
        wheres += [json.loads(line)["where"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        seen += quarantine.counts.seen
    assert sorted(wheres) == sorted(f"a.jsonl:{number}" for number in range(2, 201, 2))
    assert seen == 200


def test_a_damaged_file_ends_the_reading_all_the_same(folder, tmp_path):
    (folder / "a.jsonl.gz").write_bytes(b"this is none")
    message = "a.jsonl.gz: damaged or cut off near line 1"
    with pytest.raises(ValueError, match=message), Quarantine(tmp_path / "bad") as quarantine:
        list(read_documents(_config(folder), "held_out", quarantine))
    assert not (tmp_path / "bad").exists()
    assert (tmp_path / ".bad.part").exists()


def test_too_many_bad_records_are_refused(tmp_path):
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        quarantine.counts.seen = 1000
        quarantine.check(0.0)
        quarantine.add("a.jsonl:7", BadRecord("no_json", "no JSON; repair", b"x"))
        quarantine.check(0.001)
        quarantine.add("a.jsonl:9", BadRecord("empty", "the text is empty", b"y"))
        quarantine.check(0.002)
        message = (
            r"2 of 1,000 records are bad, 0.200% where 0.100% may be: empty 1, no_json 1. The first is a.jsonl:7: no JSON; repair"
            r". All are listed in .*{}; repair the source, or allow more"
        )
        with pytest.raises(ValueError, match=message.format(".bad.jsonl.part")) as error:
            quarantine.check(0.001)
        listed = (tmp_path / ".bad.jsonl.part").read_text()
        assert str(tmp_path / ".bad.jsonl.part") in str(error.value) and listed.count("\n") == 2
    with pytest.raises(ValueError, match=message.format("/bad.jsonl")):
        quarantine.check(0.001)
    assert (tmp_path / "bad.jsonl").read_text() == listed


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match="the limit of bad records is a share from 0 to 1, got"):
        RecordCounts().check(limit, "bad.jsonl")


_COUNTS = st.builds(
    RecordCounts, seen=st.integers(0, 9), bad=st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)),
    first=st.none() | st.fixed_dictionaries({"where": st.text()}),
)  # fmt: skip


@given(st.lists(_COUNTS, max_size=4))
def test_counts_add_up_and_survive_json(parts):
    total = sum(parts, RecordCounts())
    assert total.seen == sum(part.seen for part in parts)
    assert {reason: total.bad.get(reason, 0) for reason in "abc"} == {
        reason: sum(part.bad.get(reason, 0) for part in parts) for reason in "abc"
    }
    assert total.first == next((part.first for part in parts if part.first), None)
    assert RecordCounts(**json.loads(json.dumps(dataclasses.asdict(total)))) == total
