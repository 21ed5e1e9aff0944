"""What a request asks for: its body read and every bound checked, before anything is tokenised or reaches the engine."""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm_jax.configuration import nearest
from lfm_jax.generation import MOST_TOP_LOG_PROBS, LoopConfig, Request, SamplingConfig

MOST_DEPTH = 32
MOST_MESSAGES, MOST_TOOLS, MOST_STOPS, MOST_STOP_CHARACTERS = 1024, 128, 4, 256
ROLES = ("system", "developer", "user", "assistant", "tool")
_COMPLETION_TOKENS = 16  # OpenAI's, where a completion does not say how many
_LEAST_TEMPERATURE = 1e-5  # but for 0; logits divided by less may leave float32
_MOST_SHOWN = 64
# A string, with or without its end, or a bracket. Possessive: a hostile body costs one pass.
_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|[\[{\]}]', re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may take.

    body_bytes: of a request; arrival_seconds: in which its head must have come, and then its body.
    requests: answered or waiting at a time, bodies that are being read included; more are told to come again (429).
    answers: that those may ask for together; choices: that one of them may, prompts times n.
    prompt_characters: of all texts of a request; new_tokens: of an answer.
    seconds: from the body to the end of the answer, which is cut off then. read_seconds: in which a client must have read of what
      it is sent. drain_seconds: for answers that are under way when the server is told to end.
    """

    body_bytes: int = 4_000_000
    arrival_seconds: float = 30.0
    requests: int = 64
    answers: int = 256
    choices: int = 16
    prompt_characters: int = 400_000
    new_tokens: int = 4096
    seconds: float = 600.0
    read_seconds: float = 30.0
    drain_seconds: float = 30.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < float("inf"):
                raise ValueError(f"{field.name} must be positive and finite, got {getattr(self, field.name)}")
        if self.choices > self.answers:
            raise ValueError(f"answers must be at least choices, {self.choices}, or some are never taken; got {self.answers}")


class RequestError(ValueError):
    """A request that is refused; the text is for the client. param: the field. status: of HTTP. code: OpenAI's, if it has one."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for, within the bounds.

    prompts: of a completion, texts or ids. messages, tools: of a chat, as its template reads them.
    max_tokens: None where the body does not say. sampling: fields of `SamplingConfig`.
    log_probs: how many of the most likely tokens are told beside each; None: nothing of the kind.
    """

    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None
    sampling: Mapping[str, float]
    n: int
    seed: int | None
    stop: tuple[str, ...]
    log_probs: int | None
    stream: bool
    include_usage: bool
    return_token_ids: bool
    stop_loops: bool


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
      RequestError: no UTF-8, no JSON, not an object, or nested deeper than `MOST_DEPTH`.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise RequestError("the body is no UTF-8; send JSON in UTF-8") from error
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MOST_DEPTH:
            raise RequestError(f"the body is nested deeper than {MOST_DEPTH}; send flatter JSON")
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:  # also of a number with thousands of digits
        raise RequestError(f"the body is no JSON: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


Validator = Callable[[Any, str], Any]


def _whole(least: int, most: int) -> Validator:
    def check(value: Any, name: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise RequestError(f"{name} must be a whole number in {least}..{most}", name)
        return value

    return check


def _number(least: float, most: float) -> Validator:
    def check(value: Any, name: str) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise RequestError(f"{name} must be a number in {least:g}..{most:g}", name)
        return float(value)

    return check


def _temperature(value: Any, name: str) -> float:
    value = _number(0, 100)(value, name)
    if 0 < value < _LEAST_TEMPERATURE:
        raise RequestError(f"{name} must be 0, which is greedy, or at least {_LEAST_TEMPERATURE:g}", name)
    return value


def _probability(value: Any, name: str) -> float:
    value = _number(0, 1)(value, name)
    if value == 0:
        raise RequestError(f"{name} must be above 0; 1 keeps every token", name)
    return value


def _flag(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false", name)
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} has half of a surrogate pair, which is no text", name) from error
    return value


def _list(value: Any, name: str, most: int, what: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise RequestError(f"{name} must be a list of 1 to {most} {what}", name)
    return value


def _stop(value: Any, name: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else _list(value, name, MOST_STOPS, "strings")
    for stop in stops:
        if not 1 <= len(_text(stop, name)) <= MOST_STOP_CHARACTERS:
            raise RequestError(f"{name}: a stop string has 1 to {MOST_STOP_CHARACTERS} characters", name)
    return tuple(stops)


def _known(value: Mapping[str, Any], fields: Mapping[str, Any] | Sequence[str], name: str) -> None:
    """Refuses a field that nobody reads: what a client believes to have set must be so."""
    unknown = next((field for field in value if field not in fields), None)
    if unknown is not None:
        field = f"{name}.{unknown[:_MOST_SHOWN]}" if name else unknown[:_MOST_SHOWN]
        raise RequestError(f"{field}: no such field. {nearest(unknown[:_MOST_SHOWN], fields)}", field)


def _stream_options(value: Any, name: str) -> bool:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", name)
    _known(value, ("include_usage",), name)
    return _flag(value.get("include_usage", False), f"{name}.include_usage")


def _only(*neutral: Any) -> Validator:
    """Of a field that clients send, at the value that changes nothing."""

    def check(value: Any, name: str) -> None:
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise RequestError(f"{name} is not supported; leave it out", name)

    return check


def _content(value: Any, name: str) -> str:
    """A text, or a list of texts; pictures and addresses of them are not fetched."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _text(value, name)
    parts = []
    for part in _list(value, name, MOST_MESSAGES, "parts"):
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise RequestError(f'{name}: only parts {{"type": "text", "text": ...}} are read', name)
        parts.append(_text(part["text"], name))
    return "".join(parts)


def _messages(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    messages = []
    for index, message in enumerate(_list(value, name, MOST_MESSAGES, "messages")):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", where)
        if message.get("tool_calls") is not None:
            raise RequestError(f"{where}.tool_calls is not read; send the answer's content back as it came", where)
        _known(message, ("role", "content", "name", "tool_call_id", "tool_calls", "refusal"), where)
        read = {"role": "system" if message["role"] == "developer" else message["role"]}
        read["content"] = _content(message.get("content"), f"{where}.content")
        for field in ("name", "tool_call_id"):
            if message.get(field) is not None:
                read[field] = _text(message[field], f"{where}.{field}")
        messages.append(read)
    return tuple(messages)


def _tools(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    for tool in _list(value, name, MOST_TOOLS, "tools"):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise RequestError(f'{name}: a tool is {{"type": "function", "function": {{...}}}}', name)
        for text in strings(tool):
            _text(text, name)
    return tuple(value)


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, names of fields included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings(item)]
    return []


_SHARED: dict[str, Validator] = {
    "model": _text, "temperature": _temperature, "top_p": _probability, "top_k": _whole(0, 1_000_000), "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100), "seed": _whole(0, (1 << 32) - 1), "stop": _stop, "stream": _flag,
    "stream_options": _stream_options, "return_token_ids": _flag, "stop_loops": _flag, "user": _text,
    "frequency_penalty": _only(0, 0.0), "presence_penalty": _only(0, 0.0), "logit_bias": _only({}),
}  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Reader:
    """Reads bodies for a model.

    Args:
      model: its name, which clients may say. vocab_size: of the tokenizer. context: tokens of a prompt and its answer.
    """

    def __init__(self, model: str, vocab_size: int, context: int, limits: Limits):
        self._model, self._vocab_size, self._context, self._limits = model, vocab_size, context, limits
        new_tokens = min(limits.new_tokens, context - 1)
        shared = _SHARED | {"n": _whole(1, limits.choices), "max_tokens": _whole(1, new_tokens)}
        self._completion_fields: dict[str, Validator] = shared | {
            "prompt": self._prompts, "logprobs": _whole(0, MOST_TOP_LOG_PROBS), "echo": _only(False), "best_of": _only(1),
            "suffix": _only(""),
        }  # fmt: skip
        self._chat_fields: dict[str, Validator] = shared | {
            "messages": _messages, "tools": _tools, "tool_choice": _only("auto"), "logprobs": _flag,
            "top_logprobs": _whole(0, MOST_TOP_LOG_PROBS), "max_completion_tokens": _whole(1, new_tokens),
            "response_format": _only({"type": "text"}),
        }  # fmt: skip

    def completion(self, body: bytes) -> Asked:
        """Of POST /v1/completions. Raises RequestError."""
        values = self._values(body, self._completion_fields, "prompt")
        self._bound(strings(values["prompt"]), "prompt")
        return self._asked(values, values.get("logprobs"), prompts=values["prompt"])

    def chat(self, body: bytes) -> Asked:
        """Of POST /v1/chat/completions. Raises RequestError."""
        values = self._values(body, self._chat_fields, "messages")
        tools = values.get("tools", ())
        self._bound([*strings(values["messages"]), *strings(tools)], "messages")
        if "top_logprobs" in values and not values.get("logprobs"):
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if "max_completion_tokens" in values:
            values["max_tokens"] = values["max_completion_tokens"]
        log_probs = values.get("top_logprobs", 0) if values.get("logprobs") else None
        return self._asked(values, log_probs, messages=values["messages"], tools=tools)

    def _values(self, body: bytes, fields: Mapping[str, Validator], required: str) -> dict[str, Any]:
        content = read_json(body)
        _known(content, fields, "")
        values = {name: fields[name](value, name) for name, value in content.items() if value is not None}
        if required not in values:
            raise RequestError(f"{required} is missing", required)
        if values.get("model", self._model) != self._model:
            raise RequestError(f"this server has the model {self._model!r} alone", "model", status=404, code="model_not_found")
        return values

    def _asked(self, values: Mapping[str, Any], log_probs: int | None, **what: Any) -> Asked:
        n, prompts = values.get("n", 1), len(what.get("prompts", (None,)))
        if n * prompts > self._limits.choices:
            raise RequestError(f"{prompts} prompts and n={n} are more than {self._limits.choices} answers at a time", "n")
        return Asked(
            **what, max_tokens=values.get("max_tokens"), n=n, seed=values.get("seed"), stop=values.get("stop", ()),
            sampling={"temperature": 1.0, "top_p": 1.0} | {name: values[name] for name in _SAMPLING if name in values},
            log_probs=log_probs, stream=values.get("stream", False), include_usage=values.get("stream_options", False),
            return_token_ids=values.get("return_token_ids", False), stop_loops=values.get("stop_loops", False),
        )  # fmt: skip

    def _bound(self, texts: Sequence[str], name: str) -> None:
        characters = sum(map(len, texts))
        if characters > self._limits.prompt_characters:
            raise RequestError(f"{name} has {characters} characters; at most {self._limits.prompt_characters} are read", name)

    def _prompts(self, value: Any, name: str) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(value, str):
            return (_text(value, name),)
        if isinstance(value, list) and value and not isinstance(value[0], str | list):
            return (self._ids(value, name),)
        prompts = _list(value, name, self._limits.choices, "strings or lists of ids, or a list of ids")
        return tuple(self._ids(prompt, name) if isinstance(prompt, list) else _text(prompt, name) for prompt in prompts)

    def _ids(self, value: list[Any], name: str) -> tuple[int, ...]:
        if not 1 <= len(value) < self._context:
            message = f"{name}: {len(value)} ids; 1 to {self._context - 1} are read"
            raise RequestError(message, name, code="context_length_exceeded")
        if not all(type(index) is int and 0 <= index < self._vocab_size for index in value):
            raise RequestError(f"{name}: ids must be whole numbers in 0..{self._vocab_size - 1}", name)
        return tuple(value)

    def requests(self, asked: Asked, prompts: Sequence[tuple[int, ...]], stop_ids: tuple[int, ...]) -> list[Request]:
        """For the engine: n of each prompt in turn; each is drawn by a seed of its own.

        Raises:
          RequestError: a prompt and its answer do not fit into the context.
        """
        most, requests = asked.max_tokens, []
        if most is None and not asked.messages:
            most = _COMPLETION_TOKENS
        for prompt in prompts:
            room = self._context - len(prompt)
            if room < (most or 1):
                raise RequestError(
                    f"a prompt of {len(prompt)} tokens and an answer of up to {most or 1} do not fit into a context of "
                    f"{self._context}; shorten the prompt or lower max_tokens",
                    "messages" if asked.messages else "prompt", code="context_length_exceeded",
                )  # fmt: skip
            for _ in range(asked.n):
                seed = random.getrandbits(32) if asked.seed is None else (asked.seed + len(requests)) % (1 << 32)
                new_tokens = most or min(room, self._limits.new_tokens)
                requests.append(
                    Request(
                        prompt=prompt, sampling=SamplingConfig(max_new_tokens=new_tokens, seed=seed, **asked.sampling),
                        stop_ids=stop_ids, stop_strings=asked.stop, loop=LoopConfig() if asked.stop_loops else None,
                        top_log_probs=asked.log_probs or 0,
                    )  # fmt: skip
                )
        return requests
