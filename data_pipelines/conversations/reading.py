"""Conversations out of files of JSON lines: what a message may be, and which side of the split a conversation is on."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.sources.documents import Split
from data_pipelines.sources.quarantine import Quarantine, good_records
from data_pipelines.sources.records import BadRecord
from data_pipelines.sources.text_files import find_text_files, read_lines

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names of the roles, and those of its relatives.
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# Whoever copies, compares or writes a value goes down into it by recursion, and how deep that may go depends on who does.
_MOST_DEPTH = 64


class Conversation(NamedTuple):
    """Messages as chat templates take them, tools, and a name for messages to people: file and line.

    messages: each a mapping with "role" (one of `ROLES`) and "content" (text; of a tool, anything of JSON), and an assistant's
    maybe with "thinking" (text) and "tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}, ...].
    tools: JSON schemas of functions, or the text of such; none: ().
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any] | str] = ()
    name: str = "conversation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """Where conversations come from and how they are split.

    source: a file, a folder or a pattern (see `find_text_files`) of .jsonl, .jsonl.gz or .jsonl.zst, a conversation each line:
      {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}, or ShareGPT's {"conversations": [{"from": ...,
      "value": ...}, ...]}. Other fields are left alone.
    max_record_bytes: what one line may take.
    held_out_share: the share that is held out. Which ones is decided by a hash of what stands before the first answer, so that
      the answers to one question are on one side, and a conversation stays on its side whatever is added and wherever it lies.
    """

    source: str
    max_record_bytes: int = 1 << 24
    held_out_share: float = 0.05

    def __post_init__(self):
        if not 0 <= self.held_out_share <= 1:
            raise ValueError(f"held_out_share must be from 0 to 1, got {self.held_out_share}")
        if self.max_record_bytes < 1:
            raise ValueError(f"max_record_bytes must be positive, got {self.max_record_bytes}")


def read_conversations(
    config: ConversationsConfig, split: Split, quarantine: Quarantine | None = None
) -> Iterator[Conversation]:
    """The conversations of one split, in the order of files and lines, read as they are asked for; the same on every machine.

    Args:
      quarantine: takes the bad records of both splits (of which one they would be is not known), and reading goes on.
    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: a bad record and no quarantine, a damaged file, a source of other files, or a split without a conversation.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    files = find_text_files(config.source)
    others = [name for name, _ in files if not name.endswith(SUFFIXES)]
    if others:
        raise ValueError(f"source {config.source!r} holds {others[0]}; conversations are read from {', '.join(SUFFIXES)}")
    found = False
    parse = functools.partial(_parse, max_bytes=config.max_record_bytes)
    for name, path in files:
        lines = read_lines(path, config.max_record_bytes, None)
        for record in good_records(lines, parse, path, name, quarantine):
            messages, tools = json.loads(record.text)
            if (split_fraction(messages) < config.held_out_share) == (split == "held_out"):
                found = True
                yield Conversation(messages, tools, f"{name}:{record.index}")
    if not found:
        raise ValueError(
            f"no conversation of source {config.source!r} is in the {split!r} split with held_out_share {config.held_out_share}; "
            "change held_out_share, or give more conversations"
        )


def split_fraction(messages: Sequence[Mapping[str, Any]]) -> float:
    """A number in [0, 1) that is as good as random and always the same for what stands before the first answer."""
    first_answer = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    asked = json.dumps(messages[:first_answer], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(asked, digest_size=8).digest(), "big") / 2**64


def _parse(line: bytes, max_bytes: int) -> tuple[str, None]:
    """A line's conversation, as the JSON of [messages, tools], and no difficulty.

    Bad records have the reasons "too_long", "no_utf8", "no_json" and "no_object" of all records (see `BadRecord`), "no_field"
    (neither messages nor conversations), "no_message" (one that is none), "no_call" (a tool call, or tools, that are none) and
    "no_answer" (the assistant says nothing).
    """
    record = read_object(line, max_bytes, "'messages'")
    try:
        messages, tools = _messages(record), read_tools(record.get("tools"))
    except Wrong as wrong:
        raise BadRecord(wrong.reason, str(wrong), line) from wrong
    return written([messages, tools], line), None


def read_object(line: bytes, max_bytes: int, expected: str) -> dict[str, Any]:
    """The JSON object of a line, all of whose text is UTF-8. expected: what it should have, for errors. Raises BadRecord."""
    if len(line) > max_bytes:
        raise BadRecord("too_long", f"the line is longer than {max_bytes} bytes; split the record, or raise the limit", line)
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # "\ud800" is valid JSON
    except UnicodeError as error:
        raise BadRecord("no_utf8", f"no UTF-8 ({error.reason}); repair or remove the record", line) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("no_json", f"no JSON ({error}); repair or remove the line", line) from error
    if not isinstance(record, dict):
        raise BadRecord("no_object", f"expected a JSON object with {expected}, got {type(record).__name__}", line)
    return record


def written(read: list[Any], line: bytes) -> str:
    """The JSON of what was read of a line, for `Record.text`. Arguments and tools may have been JSON within its JSON.

    Raises:
      BadRecord: a text in it is no UTF-8, or values lie too deep within each other.
    """
    text = json.dumps(read, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeError as error:
        raise BadRecord("no_utf8", f"no UTF-8 ({error.reason}); repair or remove the record", line) from error
    if text.count("[") + text.count("{") > _MOST_DEPTH and _depth(read) > _MOST_DEPTH:
        raise BadRecord("no_json", f"more than {_MOST_DEPTH} lists and objects within each other; remove the record", line)
    return text


def _depth(value: list[Any]) -> int:
    """How many lists and mappings are within each other."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = (each.values() if isinstance(each, dict) else each for each in level if each)
        level = [value for values in inner for value in values if isinstance(value, list | dict)]
    return depth


class Wrong(Exception):
    """What is wrong with a record, and the reason that it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    given = record.get("messages", record.get("conversations"))
    if not isinstance(given, list):
        names = ", ".join(map(repr, list(record)[:20]))[:400] or "nothing"
        raise Wrong("no_field", f"expected a list 'messages' or 'conversations', got a record of {names}; name it so")
    messages = [read_message(entry, f"message {number}") for number, entry in enumerate(given)]
    if isinstance(record.get("system"), str) and record["system"] and "messages" not in record:  # beside ShareGPT's list
        messages.insert(0, {"role": "system", "content": record["system"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise Wrong("no_answer", f"none of the {len(messages)} messages is an assistant's: nothing is to be learnt; remove it")
    return messages


def read_message(entry: Any, where: str) -> dict[str, Any]:
    """A message of a record, ShareGPT's as well, as `Conversation` has it. where: in the record, for errors. Raises `Wrong`."""
    if not isinstance(entry, dict):
        raise Wrong("no_message", f"{where} is {type(entry).__name__}, not an object with 'role' and 'content'")
    if "from" in entry:
        role = _SHAREGPT_ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
        if role is None:
            raise Wrong("no_message", f"{where} is from {entry['from']!r:.40}; expected one of {', '.join(_SHAREGPT_ROLES)}")
        if entry["from"] == "function_call":
            calls = _from_json(entry.get("value"), where)
            entry = {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        else:
            entry = {"role": role, "content": entry.get("value")}
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise Wrong("no_message", f"{where} has the role {role!r:.40}; expected one of {', '.join(ROLES)}")
    calls = entry.get("tool_calls") or []
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise Wrong("no_call", f"{where} has tool_calls that are no list, or is no assistant's; repair or remove the record")
    message = {"role": role, "content": _content(content, role == "tool", bool(calls), where)}
    thinking = entry.get("thinking") or entry.get("reasoning_content")
    if thinking and role == "assistant":
        if not isinstance(thinking, str):
            raise Wrong("no_message", f"{where} has thinking that is {type(thinking).__name__}, not text")
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [_call(call, f"{where}, call {number}") for number, call in enumerate(calls)]
    return message


def _content(content: Any, of_tool: bool, has_calls: bool, where: str) -> Any:
    """Text; of a list of parts, each a text, the texts together."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    if isinstance(content, str) or (of_tool and content is not None):
        return content
    if content is None and has_calls:
        return ""
    raise Wrong("no_message", f"{where} has content that is {type(content).__name__}, not text; only texts are read")


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of OpenAI's form, or its function alone; arguments may be the text of a JSON object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    if isinstance(arguments, str):
        arguments = _from_json(arguments, where)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise Wrong("no_call", f"{where} is no function with a name and arguments, an object; repair or remove the record")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(tools: Any) -> list[Any]:
    """The tools of a record as `Conversation` has them; none: []. Raises `Wrong`."""
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else []
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict | str) for tool in tools)):
        raise Wrong("no_call", "tools are no list of objects; give JSON schemas of functions")
    return tools or []


def _from_json(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise Wrong("no_call", f"{where} is no JSON ({error}); repair or remove the record") from error
