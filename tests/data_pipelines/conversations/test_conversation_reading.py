"""Conversations out of files: both forms of records, bad ones put aside, and a split that follows the question."""

import json

import pytest
import zstandard

from data_pipelines import Quarantine
from data_pipelines.conversations import Conversation, ConversationsConfig, read_conversations

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}


def _write(path, records):
    path.write_bytes(b"\n".join(record if isinstance(record, bytes) else json.dumps(record).encode() for record in records))
    return path


def _read(path, **settings):
    config = ConversationsConfig(source=str(path), held_out_share=0.0, **settings)
    return list(read_conversations(config, "train"))


def test_messages_come_as_they_are(tmp_path):
    messages = [
        {"role": "system", "content": ""}, {"role": "user", "content": "caf\u00e9"},
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": {"a": [1, None]}}, {"role": "assistant", "content": "<|im_end|>"},
    ]  # fmt: skip
    path = _write(tmp_path / "a.jsonl", [{"messages": messages, "tools": [TOOL, "text"], "id": 7}, {"messages": HI}])
    assert _read(path) == [Conversation(messages, [TOOL, "text"], "a.jsonl:1"), Conversation(HI, [], "a.jsonl:2")]


def test_other_spellings_become_the_usual_ones(tmp_path):
    """Those of OpenAI's interface: parts, arguments as text, no content beside calls; and another name for thinking."""
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": []},
    ]
    (found,) = _read(_write(tmp_path / "a.jsonl", [{"messages": given, "tools": json.dumps([TOOL])}]))
    assert found.messages == [
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "c", "thinking": "hm"},
    ]  # fmt: skip
    assert found.tools == [TOOL]


def test_sharegpt_is_converted(tmp_path):
    given = [
        {"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "It is 2."},
    ]  # fmt: skip
    (found,) = _read(_write(tmp_path / "a.jsonl", [{"conversations": given, "system": "Be brief.", "tools": ""}]))
    assert found.messages == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]  # fmt: skip


def test_files_are_read_in_order_and_compressed_ones_too(tmp_path):
    _write(tmp_path / "b.jsonl", [{"messages": HI}, b"", {"messages": HI}])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"messages": HI}).encode()))
    assert [conversation.name for conversation in _read(tmp_path)] == ["a.jsonl.zst:1", "b.jsonl:1", "b.jsonl:3"]


def _changed(**changes):
    return {"messages": [HI[0], HI[1] | changes]}


NESTED = json.loads("[" * 62 + "]" * 62)
BAD = [
    (b'{"messages": "\xff"}', "no_utf8", "no UTF-8"),
    (b'{"messages": [], "a": "\\ud800"}', "no_utf8", "no UTF-8 .surrogates not allowed"),
    (b'{"messages": [', "no_json", "no JSON"),
    (b"[" * 100_000, "no_json", "no JSON"),
    (_changed(tool_calls=[{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]), "no_utf8", "no UTF-8 .surrogates not"),
    ({"messages": HI, "tools": '["\\ud800"]'}, "no_utf8", "no UTF-8 .surrogates not allowed"),
    ({"messages": [*HI, {"role": "tool", "content": NESTED}]}, "no_json", "more than 64 lists and objects within each other"),
    (b"[1]", "no_object", "expected a JSON object with 'messages', got list"),
    ({"text": "Hi"}, "no_field", "expected a list 'messages' or 'conversations', got a record of 'text'"),
    ({"messages": {}}, "no_field", "expected a list 'messages'"),
    ({"messages": ["Hi"]}, "no_message", "message 0 is str, not an object with 'role' and 'content'"),
    ({"messages": []}, "no_answer", "none of the 0 messages is an assistant's"),
    ({"messages": HI[:1]}, "no_answer", "none of the 1 messages is an assistant's"),
    (_changed(role="bot"), "no_message", "message 1 has the role 'bot'; expected one of system, user"),
    (_changed(role=["user"]), "no_message", "message 1 has the role .'user'.; expected"),
    (_changed(content=None), "no_message", "message 1 has content that is NoneType, not text"),
    (_changed(content=[{"type": "image"}]), "no_message", "message 1 has content that is list, not text"),
    (_changed(thinking=7), "no_message", "message 1 has thinking that is int, not text"),
    (_changed(tool_calls={"name": "f"}), "no_call", "message 1 has tool_calls that are no list, or is no assistant's"),
    ({"messages": [HI[0] | {"tool_calls": [CALL]}, HI[1]]}, "no_call", "message 0 has tool_calls that are no list, or is no ass"),
    (_changed(tool_calls=["f()"]), "no_call", "message 1, call 0 is no function with a name and arguments"),
    (_changed(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), "no_call", "call 0 is no function with a name"),
    (_changed(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "no_call", "message 1, call 0 is no JSON"),
    ({"messages": HI, "tools": {"f": 1}}, "no_call", "tools are no list of objects"),
    ({"messages": HI, "tools": "f, g"}, "no_call", "tools is no JSON"),
    ({"conversations": [{"from": "alien", "value": "Hi"}]}, "no_message", "message 0 is from 'alien'; expected one of system, h"),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "no_call", "message 0 is no JSON"),
    (b'{"messages": "' + b"x" * 200_000 + b'"}', "too_long", "the line is longer than 150000 bytes"),
]


def test_every_kind_of_bad_record_is_put_aside_and_the_good_ones_come_through(tmp_path):
    path = _write(tmp_path / "a.jsonl", [each for record, _, _ in BAD for each in ({"messages": HI}, record)])
    config = ConversationsConfig(source=str(path), max_record_bytes=150_000, held_out_share=0.0)
    with Quarantine(tmp_path / "bad.jsonl") as quarantine:
        found = list(read_conversations(config, "train", quarantine))
    assert [conversation.name for conversation in found] == [f"a.jsonl:{2 * number + 1}" for number in range(len(BAD))]
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == [reason for _, reason, _ in BAD]
    assert quarantine.counts.seen == 2 * len(BAD)


def test_values_may_lie_within_each_other_up_to_the_limit(tmp_path):
    """And brackets in a text are no depth."""
    messages = [*HI, {"role": "tool", "content": NESTED[0]}, {"role": "tool", "content": "[{" * 200}]
    (found,) = _read(_write(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert found.messages == messages


@pytest.mark.parametrize(("record", "reason", "message"), BAD, ids=range(len(BAD)))
def test_without_a_quarantine_a_bad_record_ends_the_reading(record, reason, message, tmp_path):
    path = _write(tmp_path / "a.jsonl", [{"messages": HI}, record])
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{message}"):
        _read(path, max_record_bytes=150_000)


def _asked(number, answer):
    return {"messages": [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": answer}]}


def _split(path, share):
    config = ConversationsConfig(source=str(path), held_out_share=share)
    return [[found.messages for found in read_conversations(config, split)] for split in ("train", "held_out")]


def test_the_split_follows_the_question_wherever_it_lies(tmp_path):
    records = [_asked(number, answer) for number in range(400) for answer in ("yes", "no")]
    train, held_out = _split(_write(tmp_path / "a.jsonl", records), 0.25)
    assert len(train) + len(held_out) == len(records)
    questions = [{messages[0]["content"] for messages in side} for side in (train, held_out)]
    assert not questions[0] & questions[1]
    assert 75 <= len(questions[1]) <= 125  # four deviations around a hundred would be 65 to 135
    # In another file and another order, with twice the share, what was held out still is.
    more = _split(_write(tmp_path / "b.jsonl", records[::-1] + [_asked("of another kind", "a")]), 0.5)[1]
    assert questions[1] < {messages[0]["content"] for messages in more}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out_share": 1.5}, "held_out_share must be from 0 to 1, got 1.5"),
        ({"max_record_bytes": 0}, "max_record_bytes must be positive, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConversationsConfig(source="a.jsonl", **settings)


def test_what_holds_no_conversation_is_refused(tmp_path):
    path = _write(tmp_path / "a.jsonl", [{"messages": HI}])
    config = ConversationsConfig(source=str(path), held_out_share=0.0)
    with pytest.raises(ValueError, match="no conversation of source '.*a.jsonl' is in the 'held_out' split with held_out_sh"):
        list(read_conversations(config, "held_out"))
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
        list(read_conversations(config, "test"))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="holds b.txt; conversations are read from .jsonl, "):
        _read(tmp_path)
