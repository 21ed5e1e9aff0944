"""Tool calls in a model's text: LFM2's Pythonic list and LFM3's tags, read, written, and compared with what was wanted.

What a model writes is parsed, never run. The known failures of LFM2's format are read as they are meant (vllm#48171,
mlx-lm#1246): brackets, raw line ends and unescaped quotes in strings, Windows paths, negative numbers, tuples, leading zeros,
arguments called `from`, dotted names, JSON's true, false and null.
"""

import ast
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from data_pipelines.tasks.task import Scores

Form = Literal["lfm2", "lfm3"]

_MARKS = {"lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"), "lfm3": ("<tool_call>", "</tool_call>")}
# From the first call of a response to its last one. Python's parser is recursive and this is text from a model: what is given to
# it has few characters, few open brackets and nothing else that nests.
_MOST_CHARACTERS = 1 << 16
_MOST_DEPTH = 32
_MOST_NUMBER_CHARACTERS = 40

_NAME = r"[^\W\d][\w-]*(?:\.[^\W\d][\w-]*)*"
_TOKEN = re.compile(
    rf"(?P<space>\s+)|(?P<string>'''|\"\"\"|'|\")|(?P<number>(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))"
    rf"|(?P<name>{_NAME})|(?P<mark>[()\[\]{{}},:=+-])"
)
_CALLED_OR_GIVEN = re.compile(r"\s*[(=]")
_DIGIT = re.compile(r"\s*[\d.]")
# As JSON writes them, which the templates do inside of mappings, and as Python does.
_CONSTANTS = {"true": "True", "false": "False", "null": "None", "True": "True", "False": "False", "None": "None"}
_QUOTES = ("'", '"', "'''", '"""')
_STRICT_ENDS = {quote: re.compile(rf"((?:(?!{quote})[^\\]|\\.)*+){quote}", re.DOTALL) for quote in _QUOTES}
# A quote that is followed by what may follow a value. LFM2.5's template puts quotes around a string and escapes nothing in it.
_FOLLOWING = r"\s*(?:(?:\)\s*)+[,\]]|[\]}:]|,\s*(?:[\w.-]+\s*=|['\"\[{(]|[+-]?[\d.]|(?:true|false|null|none)\b))"
_LENIENT_ENDS = {quote: re.compile(rf"(.*?){quote}(?={_FOLLOWING})", re.DOTALL | re.IGNORECASE) for quote in _QUOTES}
# A sound escape, or one character that cannot stand in a literal as it is.
_ESCAPE = re.compile(
    r"\\(?:[\\'\"abfnrtv\n]|[0-3][0-7]{2}|[0-7]{1,2}(?![0-7])|x[\da-fA-F]{2}|u[\da-fA-F]{4}|U00(?:0[\da-fA-F]|10)[\da-fA-F]{4})"
    "|[\\\\\"\n\r\0\ud800-\udfff]"
)
_BEFORE_VALUES = ("", "=", ",", ":", "(", "[", "{")
# What may follow without one of these: a call's arguments, and a string that is written in several.
_AFTER_EACH_OTHER = {("call", "mark", "("), *(("string", "string", quote) for quote in _QUOTES)}

_FUNCTION = re.compile(rf"\s*<function=({_NAME})>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(rf"\s*<parameter=({_NAME})>(.*?)</parameter>\s*", re.DOTALL)

_TYPES = {
    "string": str, "integer": int, "number": float, "float": float, "boolean": bool, "array": list, "tuple": list,
    "object": dict, "dict": dict, "any": str,
}  # fmt: skip


class Call(NamedTuple):
    """A function's name and its arguments, plain values of JSON."""

    name: str
    arguments: dict[str, Any]


class Parsed(NamedTuple):
    """What a response holds. text: what stands around the calls. error: what is wrong, and then there are no calls."""

    calls: list[Call]
    text: str
    error: str | None = None


class _MalformedError(ValueError):
    """The text is no call."""


def parse(response: str, form: Form = "lfm2", tools: Sequence[dict[str, Any]] = ()) -> Parsed:
    """The calls in a response, in their order.

    Args:
      form: "lfm2" (of LFM2 and LFM2.5): `<|tool_call_start|>[name(key=value, ...), ...]<|tool_call_end|>`. Values are literals
        of Python or JSON; tuples and sets become lists. Without the brackets it is read as well, as BFCL does. "lfm3":
        `<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`, one for each call. How values
        stand there is taken from Qwen3-Coder's format, which has the same tags: strings as they are, all else as JSON.
      tools: JSON schemas of the functions. With "lfm3" they tell a string from a number that looks the same; an argument that
        they do not have is taken for JSON where it is JSON.
    """
    start, end = _MARKS[form]
    first, last = response.find(start), response.rfind(end)
    if first < 0 and last < 0:
        return Parsed([], response)
    try:
        if last + len(end) - first > _MOST_CHARACTERS:
            raise _MalformedError(f"the calls have more than {_MOST_CHARACTERS} characters")
        calls, texts, position = [], [], 0
        while (opened := response.find(start, position)) >= 0:
            texts.append(response[position:opened])
            closed = response.find(end, opened)
            if closed < 0:
                raise _MalformedError(f"{start} without {end}")
            block = response[opened + len(start) : closed]
            calls += _pythonic(block) if form == "lfm2" else [_tagged(block, tools)]
            position = closed + len(end)
        texts.append(response[position:])
        if end in "".join(texts):
            raise _MalformedError(f"{end} without {start}")
    except _MalformedError as error:
        return Parsed([], response, str(error))
    return Parsed(calls, "".join(texts))


def write(calls: Sequence[Call], form: Form = "lfm2", tools: Sequence[dict[str, Any]] = ()) -> str:
    """The text that `parse` reads as these calls; "" for none. Simple values look as LFM2.5's template writes them.

    Raises:
      ValueError: no text is read as these calls: names with spaces, values that JSON does not have, closing tags in a string.
    """
    if not calls:
        return ""
    start, end = _MARKS[form]
    if form == "lfm2":
        text = start + "[" + ", ".join(_written(*call) for call in calls) + "]" + end
    else:
        text = "".join(f"{start}{_written_tags(*call)}{end}" for call in calls)
    read = parse(text, form, tools)
    if read.calls != list(calls):
        problem = read.error or "it is read otherwise"
        raise ValueError(f"calls must be what the form {form!r} can hold, got {list(calls)!r}: {problem}")
    return text


def _written(name: str, arguments: dict[str, Any]) -> str:
    # The template writes a mapping as JSON and all else as Python. No string may hold the marks of the form.
    values = {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else repr(value) for key, value in arguments.items()
    }
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})".replace("<|", "<\\x7c")


def _written_tags(name: str, arguments: dict[str, Any]) -> str:
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in arguments.items()
    }
    parameters = "".join(f"<parameter={key}>{value}</parameter>" for key, value in values.items())
    return f"<function={name}>{parameters}</function>"


def _pythonic(text: str) -> list[Call]:
    """The calls of one block. Strings end by Python's rules, or, if it cannot be read so, at a quote that looks like an end."""
    try:
        return _calls(*_source(text, _STRICT_ENDS))
    except _MalformedError:
        try:
            return _calls(*_source(text, _LENIENT_ENDS))
        except _MalformedError:
            pass
        raise


def _source(text: str, ends: dict[str, re.Pattern]) -> tuple[str, list[str]]:
    """The text as an expression that Python's parser can be given, in which `_N` stands for the N-th of the names."""
    text = text.strip()
    if not text.startswith("["):
        text = f"[{text}]"
    parts, names = [], []
    position, brackets, before = 0, 0, ""
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise _MalformedError(f"{text[position : position + 20]!r} where a call or a literal belongs")
        kind, part, position = token.lastgroup, token[0], token.end()
        if kind == "space":
            continue
        if (kind != "mark" or part in "([{") and before not in _BEFORE_VALUES and (before, kind, part) not in _AFTER_EACH_OTHER:
            raise _MalformedError(f"{part[:20]!r} after a value")  # indexing, chains of calls
        if kind == "string":
            body = ends[part].match(text, position)
            if body is None:
                raise _MalformedError("a string without an end")
            part, position = f'"{_ESCAPE.sub(_escaped, body[1])}"', body.end()
        elif kind == "number":
            if len(part) > _MOST_NUMBER_CHARACTERS:
                raise _MalformedError(f"a number of {len(part)} characters")
            part = re.sub(r"^0+(?=\d)", "", part)
        elif kind == "name":
            if following := _CALLED_OR_GIVEN.match(text, position):
                names.append(part)
                part, kind = f"_{len(names) - 1}", "call" if following[0][-1] == "(" else "key"
            elif part not in _CONSTANTS:
                raise _MalformedError(f"{part[:40]!r} is no literal")
            else:
                part = _CONSTANTS[part]
        elif part in "+-" and (before not in _BEFORE_VALUES or not _DIGIT.match(text, position)):
            raise _MalformedError("arithmetic")
        brackets += (part in "([{") - (part in ")]}") if kind == "mark" else 0
        if brackets > _MOST_DEPTH:
            raise _MalformedError(f"more than {_MOST_DEPTH} brackets within each other")
        # After a sign comes the number, as if the sign were not there.
        before = before if part in "+-" else part if kind == "mark" else kind
        parts.append(part)
    return "".join(parts), names


def _escaped(found: re.Match) -> str:
    text = found[0]
    if len(text) > 1:
        return text
    return f"\\{text}" if text in '\\"' else f"\\u{ord(text):04x}"


def _calls(source: str, names: list[str]) -> list[Call]:
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _MalformedError(f"no list of calls: {getattr(error, 'msg', error)}") from error
    if not isinstance(tree, ast.List) or not all(isinstance(node, ast.Call) for node in tree.elts):
        raise _MalformedError("no list of calls")
    calls = []
    for node in tree.elts:
        name = names[int(node.func.id[1:])]
        if node.args:
            raise _MalformedError(f"{name[:40]!r} has an argument without a name")
        keys = [names[int(keyword.arg[1:])] for keyword in node.keywords]
        if len(set(keys)) < len(keys):
            raise _MalformedError(f"{name[:40]!r} has an argument twice")
        calls.append(Call(name, dict(zip(keys, (_value(keyword.value) for keyword in node.keywords), strict=True))))
    return calls


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise _MalformedError("a number beyond those of double precision")
        return node.value
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise _MalformedError("a mapping with a key that is no string")
        return dict(zip(keys, map(_value, node.values), strict=True))
    raise _MalformedError("a call where a literal belongs")


def _tagged(text: str, tools: Sequence[dict[str, Any]]) -> Call:
    """The call of one block of LFM3's form."""
    function = _FUNCTION.fullmatch(text)
    if function is None:
        raise _MalformedError("no <function=NAME>...</function> in the block")
    name, body = function.groups()
    known = (schema(tools, name) or {}).get("parameters", {}).get("properties", {})
    arguments, position = {}, 0
    while position < len(body):
        parameter = _PARAMETER.match(body, position)
        if parameter is None:
            if not body[position:].strip():
                break
            raise _MalformedError(f"{body[position : position + 20]!r} where <parameter=KEY>...</parameter> belongs")
        key, value = parameter.groups()
        if key in arguments:
            raise _MalformedError(f"{name[:40]!r} has an argument twice")
        arguments[key] = value if known.get(key, {}).get("type") == "string" else _from_json(value)
        position = parameter.end()
    return Call(name, arguments)


def _from_json(text: str) -> Any:
    """The value, or the text itself where it is no JSON."""
    if depth(text) > _MOST_DEPTH:
        raise _MalformedError(f"more than {_MOST_DEPTH} brackets within each other")
    if re.search(rf"\d{{{_MOST_NUMBER_CHARACTERS}}}", text):
        return text
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except ValueError:
        return text
    return value


def depth(text: str) -> int:
    """How many brackets are within each other, those in strings included."""
    steps = ((character in "([{") - (character in ")]}") for character in text)
    return max(itertools.accumulate(steps), default=0)


def schema(tools: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The function of that name among tools, each `{"type": "function", "function": {...}}` or the inner part alone."""
    functions = (tool.get("function", tool) for tool in tools)
    return next((function for function in functions if function["name"] == name), None)


def call_error(call: Call, wanted: dict[str, dict[str, list]], tools: Sequence[dict[str, Any]]) -> str | None:
    """Why a call is not the one that was wanted, by the rules and in the words of BFCL's checker; None if it is.

    Source: ShishirPatil/gorilla, bfcl_eval/eval_checker/ast_eval/ast_checker.py, `simple_function_checker` for Python. Its rules:
    every required argument, and none that the function lacks; types as in the schema (an integer will do for a float, not the
    other way round); strings are compared without case, spaces and `,./-_*^`.

    Args:
      wanted: the name, and for each argument the values that are accepted; "" among them: it may be left out. A mapping is
        given with the accepted values of each of its keys.
      tools: must have the function.
    """
    ((name, accepted),) = wanted.items()
    if call.name != name:
        return "simple_function_checker:wrong_func_name"
    parameters = schema(tools, name)["parameters"]
    if any(key not in call.arguments for key in parameters.get("required", ())):
        return "simple_function_checker:missing_required"
    for key, value in call.arguments.items():
        if key not in parameters["properties"] or key not in accepted:
            return "simple_function_checker:unexpected_param"
        if error := _argument_error(value, accepted[key], parameters["properties"][key]["type"]):
            return error
    if any(key not in call.arguments and "" not in values for key, values in accepted.items()):
        return "simple_function_checker:missing_optional"
    return None


def _argument_error(value: Any, accepted: list, kind: str) -> str | None:
    expected = _TYPES[kind]
    if expected is float and type(value) is int:
        value = float(value)
    # The schema's type, or that of the accepted values where they are of another: a variable's name, say.
    other = next((type(one) for one in accepted if one != ""), expected)
    if type(value) not in (expected, other):
        return "type_error:simple"
    if expected is other and expected in (str, list, dict):
        kinds = {str: "value_error:string", list: "value_error:list/tuple", dict: "value_error:dict_value"}
        return None if any(_same(value, one) for one in accepted) else kinds[expected]
    return None if value in accepted else "value_error:others"


def _same(value: Any, accepted: Any) -> bool:
    """Whether a value is the accepted one. A mapping's accepted values are lists of them, by key."""
    if isinstance(value, str) and isinstance(accepted, str):
        return _plain(value) == _plain(accepted)
    if isinstance(value, list) and isinstance(accepted, list):
        return len(value) == len(accepted) and all(map(_same, value, accepted))
    if isinstance(value, dict) and isinstance(accepted, dict):
        return all(key in accepted and any(_same(item, one) for one in accepted[key]) for key, item in value.items()) and all(
            key in value or "" in items for key, items in accepted.items()
        )
    return value == accepted


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def score_calls(parsed: Parsed, wanted: Sequence[dict[str, dict[str, list]]], tools: Sequence[dict[str, Any]]) -> Scores:
    """How good the calls of a response are; their order does not matter, as in BFCL's parallel problems.

    Args:
      wanted: the calls, each as `call_error` takes it. None of them: a response in words, without calls, is right.
      tools: must have the functions.
    Returns:
      correct: 1.0 or 0.0. format: whether there are calls and no errors in them (words, where no calls are wanted). name: share
      of the names that are right. arguments: share of the arguments that are, a missing or an unknown one being wrong. The
      latter two are None where no calls are wanted.
    """
    calls = parsed.calls
    if not wanted:
        sound = parsed.error is None and bool(parsed.text.strip())
        return {"correct": float(sound and not calls), "format": float(sound), "name": None, "arguments": None}
    left, matched, named, arguments = list(calls), 0, 0, 0.0
    # The exact ones first: two calls of one function must not take each other's place.
    for one in sorted(wanted, key=lambda one: all(call_error(call, one, tools) for call in calls)):
        errors = [call_error(call, one, tools) for call in left]
        if None in errors:
            left.pop(errors.index(None))
            matched, named, arguments = matched + 1, named + 1, arguments + 1
            continue
        ((name, accepted),) = one.items()
        shares = [_share(call, accepted, schema(tools, name)) if call.name == name else -1.0 for call in left]
        if shares and max(shares) >= 0:
            named, arguments = named + 1, arguments + max(shares)
            left.pop(shares.index(max(shares)))
    most = max(len(wanted), len(calls))
    return {
        "correct": float(matched == most),
        "format": float(parsed.error is None and bool(calls)),
        "name": named / most,
        "arguments": arguments / most,
    }


def _share(call: Call, accepted: dict[str, list], function: dict[str, Any]) -> float:
    """Of the arguments that are wanted or given, those that are right."""
    known = function["parameters"]["properties"]
    keys = call.arguments.keys() | accepted.keys()
    right = 0
    for key in keys:
        if key not in call.arguments:
            right += "" in accepted[key]
        elif key in accepted and key in known:
            right += _argument_error(call.arguments[key], accepted[key], known[key]["type"]) is None
    return right / len(keys) if keys else 1.0
