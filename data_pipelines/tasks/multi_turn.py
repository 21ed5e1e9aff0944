"""Environments of several turns: a model calls tools that are methods of Python, reads what they return, and goes on."""

import asyncio
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

from data_pipelines.tasks.task import Problem, Scores, Split
from data_pipelines.tasks.tool_calls import Call, Form, parse

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", list: "array", tuple: "array"}
_JSON_TYPES |= {dict: "object"}
_PYTHON_TYPES = {
    "integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "array": list, "object": dict,
}  # fmt: skip
# What a tool returns stands in the prompt of the next turn.
_MOST_RESULT_CHARACTERS = 10_000
_MOST_CALLS_A_TURN = 32
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example|Examples|Note):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"[ \t]+(\w+):[ \t]*(.*)")


class Step(NamedTuple):
    """What follows a response: the messages to append after it, and whether the episode is over (then there are none)."""

    messages: list[dict[str, Any]]
    done: bool


class Environment(Protocol):
    """A task of several turns. One object plays one episode at a time; it may be reset any number of times.

    name, max_difficulty: as in `Task`.
    """

    name: str
    max_difficulty: int

    def reset(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """Begins the episode of these arguments, always the same one: the first messages and the tools."""
        ...

    def step(self, response: str) -> Step:
        """Takes one turn of the assistant. Whatever its text, nothing is raised as long as the episode is not over."""
        ...

    def score(self) -> Scores:
        """How good the episode was up to now, in named parts, "correct" among them; see `Task.score`."""
        ...


@dataclasses.dataclass
class Turns:
    """The turns of one episode: each response's calls are made, and their results returned as messages of the role "tool".

    A response without calls ends the episode: it is the answer. So does the last turn. Calls that cannot be read, unknown tools
    and wrong arguments give a message that says so, as a tool's exceptions do, and the model may try again.

    Attributes:
      tools: by name; see `tool_methods`.
      most: turns at most.
      form: how calls are written, see `tool_calls.parse`.
      turns, malformed, calls, failed: how many responses there were, how many of them could not be read, how many calls were
        made, and how many of those gave an error.
      answer: the last response, if it ended the episode without calls.
    """

    tools: dict[str, Callable[..., Any]]
    most: int
    form: Form = "lfm2"
    turns: int = 0
    malformed: int = 0
    calls: int = 0
    failed: int = 0
    answer: str | None = None

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"an episode must have 1 turn or more, got {self.most}")
        self.schemas = [tool_schema(tool) for tool in self.tools.values()]

    @property
    def done(self) -> bool:
        return self.answer is not None or self.turns >= self.most

    def step(self, response: str) -> Step:
        """See `Environment.step`.

        Raises:
          ValueError: the episode is over.
        """
        if self.done:
            raise ValueError(f"the episode was over after {self.turns} turns: reset the environment before the next step")
        self.turns += 1
        parsed = parse(response, self.form, self.schemas)
        if parsed.error is not None:
            self.malformed += 1
            contents = [_error(f"the calls cannot be read: {parsed.error}")]
        elif not parsed.calls:
            self.answer = parsed.text
            return Step([], True)
        else:
            contents = [self._called(call) for call in parsed.calls[:_MOST_CALLS_A_TURN]]
        # After the last turn nobody reads them.
        return Step([] if self.done else [{"role": "tool", "content": content} for content in contents], self.done)

    def scores(self) -> Scores:
        """calls: share of the calls that gave no error. format: share of the turns that could be read. None of nothing."""
        return {
            "calls": 1 - self.failed / self.calls if self.calls else None,
            "format": 1 - self.malformed / self.turns if self.turns else None,
        }

    def _called(self, call: Call) -> str:
        self.calls += 1
        problem, content = self._problem(call), ""
        if problem is None:
            try:
                result = self.tools[call.name](**call.arguments)
                if inspect.iscoroutine(result):
                    result = asyncio.run(result)
                content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
            except Exception as error:  # of whatever kind: the tool says so that the call was wrong
                problem = str(error) or type(error).__name__
        if problem is not None:
            self.failed += 1
            return _error(problem)
        return content if len(content) <= _MOST_RESULT_CHARACTERS else f"{content[:_MOST_RESULT_CHARACTERS]} [cut off]"

    def _problem(self, call: Call) -> str | None:
        """Why the call cannot be made."""
        if call.name not in self.tools:
            return f"there is no tool {call.name[:100]!r}; there are {', '.join(self.tools)}"
        schema = next(one["function"] for one in self.schemas if one["function"]["name"] == call.name)["parameters"]
        unknown = [key for key in call.arguments if key not in schema["properties"]]
        missing = [key for key in schema.get("required", ()) if key not in call.arguments]
        if unknown or missing:
            parts = [f"has no argument {key[:100]!r}" for key in unknown] + [f"needs the argument {key!r}" for key in missing]
            return f"{call.name} {' and '.join(parts)}"
        for key, value in call.arguments.items():
            if not fits(value, schema["properties"][key]):
                return f"{call.name}: {key} must be {_said(schema['properties'][key])}, got {str(value)[:100]!r}"
        return None


def _error(text: str) -> str:
    return json.dumps({"error": text[:_MOST_RESULT_CHARACTERS]}, ensure_ascii=False)


def _said(schema: dict[str, Any]) -> str:
    return f"one of {schema['enum']}" if "enum" in schema else f"of type {schema.get('type', 'any')}"


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what a schema of `tool_schema` says: type, enum, nullable, anyOf and the types of elements."""
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    # Python's bool is an int, JSON's is not.
    if kinds and not any(
        isinstance(value, _PYTHON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds
    ):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list):
        parts = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        return len(parts) == len(value) and all(map(fits, value, parts))
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        return all(fits(part, schema["additionalProperties"]) for part in value.values())
    return True


def tool_methods(environment: Any, reserved: Collection[str] = ()) -> dict[str, Callable[..., Any]]:
    """The public methods of an object, by name: what TRL's GRPOTrainer gives the model as tools.

    Source: trl/trainer/grpo_trainer.py, `environment_factory`: all methods whose names do not begin with "_", in the order of
    their names, but for the reserved ones.
    """
    return {
        name: method
        for name, method in inspect.getmembers(environment, inspect.ismethod)
        if not name.startswith("_") and name not in reserved
    }


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function out of its type hints and its docstring, as chat templates take it.

    As transformers.utils.get_json_schema has it, without what is returned.

    Raises:
      ValueError: no docstring, or an argument without a type hint, without a description under "Args:", or of a type that JSON
        does not have.
    """
    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(f"the tool {name} must have a docstring that says what it does: it is what the model reads")
    description, descriptions = _documented(text)
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if key not in hints or key not in descriptions:
            lacking = "a type hint" if key not in hints else 'a description under "Args:"'
            raise ValueError(f"the argument {key!r} of the tool {name} must have {lacking}")
        properties[key] = _hint_schema(hints[key], f"{name}, argument {key!r}")
        words = descriptions[key]
        if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", words, re.IGNORECASE):
            properties[key]["enum"] = json.loads(choices[1])
            words = words[: choices.start()].strip()
        properties[key]["description"] = words
        if parameter.default is inspect.Parameter.empty:
            required.append(key)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """(what the function does, what its arguments are) of a docstring in Google's style."""
    # Before the first section, then name and text of each section.
    parts = _SECTION.split(text)
    arguments: dict[str, str] = {}
    section = dict(zip(parts[1::2], parts[2::2], strict=True)).get("Args", "")
    lines = [line for line in section.splitlines() if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    key = None
    for line in lines:
        begins = _ARGUMENT.fullmatch(line)
        if begins and len(line) - len(line.lstrip()) == indent:
            key = begins[1]
            arguments[key] = begins[2].strip()
        elif key is not None:
            arguments[key] = f"{arguments[key]} {line.strip()}".strip()
    return parts[0].strip(), arguments


def _hint_schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint. where: for messages."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if not parts and (origin or hint) in _JSON_TYPES:
        return {"type": _JSON_TYPES[origin or hint]}
    values = [member.value for member in hint] if inspect.isclass(hint) and issubclass(hint, enum.Enum) else parts
    if origin in (typing.Union, types.UnionType):
        schemas = [_hint_schema(part, where) for part in parts if part is not type(None)]
        if len(schemas) > 1 and all(one.keys() == {"type"} for one in schemas):
            kinds = sorted({one["type"] for one in schemas})
            schemas = [{"type": kinds[0] if len(kinds) == 1 else kinds}]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        return schema | ({"nullable": True} if type(None) in parts else {})
    if values is not parts or origin is typing.Literal:
        kinds = list(dict.fromkeys(_JSON_TYPES.get(type(value), "") for value in values))
        if all(kinds):
            return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}
    if origin is list:
        return {"type": "array", "items": _hint_schema(parts[0], where)}
    if origin is tuple and ... not in parts:
        return {"type": "array", "prefixItems": [_hint_schema(part, where) for part in parts]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _hint_schema(parts[1], where)}
    raise ValueError(f"{where}: a type hint must be one that JSON has (str, int, list[...], Literal[...], ...), got {hint!r}")
