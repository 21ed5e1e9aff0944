"""Of the formats of `outside_formats` those of conversations: templates, tool calls, and JSON lines of what was said."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from experiments.benchmarks.outside_cases import JSON_CASES, Format, always, digest_of, edited

_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 12"}]
_TEMPLATE = """{{- bos_token -}}{%- set ns = namespace(n=0) -%}
{%- for message in messages -%}{%- set ns.n = ns.n + 1 -%}
{{- "<|im_start|>" + message.role + "\\n" + message.content | trim + "<|im_end|>\\n" -}}{%- endfor -%}
{%- if ns.n > 100 -%}{{ raise_exception("more than 100 messages") }}{%- endif -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


def _make_template(folder: epath.Path) -> None:
    (folder / "chat_template.jinja").write_text(_TEMPLATE)


def _read_template(folder: epath.Path) -> str:
    from lfm_jax.interop import chat_template

    file = folder / "chat_template.jinja"
    template, tokens = chat_template.read_template(folder)
    tokens = {"bos_token": "<|startoftext|>"} | tokens
    return chat_template.render(template or "", _CHAT, add_generation_prompt=True, special_tokens=tokens, name=str(file))


def _make_settings(folder: epath.Path) -> None:
    settings = {"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|im_end|>", "chat_template": _TEMPLATE, "n": 1.5}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _read_settings(folder: epath.Path) -> str:
    from lfm_jax.interop import chat_template

    template, tokens = chat_template.read_template(folder)
    return digest_of([template, *sorted(tokens.items())])


_TEMPLATE_CASES = {
    name: always(text)
    for name, text in {
        "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "power": "{{ 9**9**9**9 }}",
        "range": "{{ range(10**9) }}", "memory": "{{ 'a'*10**10 }}", "class": "{{ ''.__class__.__mro__ }}",
        "globals": "{{ raise_exception.__globals__ }}", "deep": "{{" + "(" * 100_000,
        "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "long": "a" * 2_000_000,
        "raise": "{{ raise_exception('no') }}", "undefined": "{{ a.b.c }}", "import": "{% import 'os' as os %}",
        "include": "{% include '/etc/passwd' %}", "format": "{{ '%999999999d' % 1 }}", "center": "{{ 'a' | center(999999999) }}",
        "lipsum": "{{ lipsum(n=1000000) }}", "cycler": "{{ cycler.__init__.__globals__ }}",
        "join": "{{ (['a' * 10**7] * 100) | join }}", "attr": "{{ '' | attr('__class__') }}",
        "map": "{{ [''] | map(attribute='__class__') | list }}", "str_format": "{{ '{0.__class__}'.format(1) }}",
    }.items()
}  # fmt: skip


_SETTINGS_CASES = JSON_CASES | {
    "template_number": edited(chat_template=1), "template_names": edited(chat_template=[{"name": "default", "template": 1}]),
    "template_list": edited(chat_template=[None]), "name_list": edited(chat_template=[{"name": [], "template": "a"}]),
    "token_list": edited(bos_token=["a"]), "token_content": edited(bos_token={"content": 1}),
    "no_template": edited(chat_template=None),
}  # fmt: skip


# Tool calls: what a model writes.

_TOOLS = [
    {"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
]
_PYTHONIC = """Let me see. <|tool_call_start|>[f(city="Z\u00fcrich's \\"old\\" town", days=-3), a.b(from=[1.5, None, (2, 07)],
when={"to": {"at": true}, "of": ['x', {}]}, path='C:\\dir\\', note='it's, then'), g()]<|tool_call_end|> Done. """
_TAGGED = """Well. <tool_call>
<function=f>
<parameter=city>S\u00e3o Paulo, 12 [a]</parameter>
<parameter=days>3</parameter>
<parameter=when>{"from": null, "to": [1.5, {"at": "08:30"}]}</parameter>
</function>
</tool_call><tool_call><function=g></function></tool_call> Done."""


def _calls_format(form: str, sample: str, marks: tuple[str, str]) -> Format:
    def read(folder: epath.Path) -> str:
        from data_pipelines.tasks import tool_calls

        text = (folder / "response").read_bytes().decode("utf-8", "surrogateescape")
        parsed = tool_calls.parse(text, form, _TOOLS)
        if parsed.error is not None:
            raise ValueError(parsed.error)
        return json.dumps(parsed, allow_nan=False)

    cases = {name: always(f"{marks[0]}{text}{marks[1]}") for name, text in _CALL_CASES[form].items()}
    return Format(lambda folder: (folder / "response").write_text(sample), "response", read, False, "", cases)


_CALL_CASES = {
    "lfm2": {
        "deep": "[f(x=" + "[" * 60_000, "deep_calls": "[" + "f(x=" * 16_000, "minus": "[f(x=" + "-" * 60_000 + "1)]",
        "sum": "[f(x=" + "1+" * 30_000 + "1)]", "dots": "[f(x=" + "a." * 30_000 + "a)]", "quotes": "[f(x=" + "'" * 60_000 + ")]",
        "ends": "[f(x='" + "')" * 30_000 + "]", "commas": "[f(x='" + "'," * 30_000 + ")]", "spaces": "[f(x=" + " " * 60_000,
        "backslashes": "[f(x='" + "\\" * 60_000 + ")]", "strings": "[f(x=" + "'a'" * 20_000 + ")]",
        "digits": "[f(x=" + "9" * 60_000 + ")]", "infinite": "[f(x=1e999)]", "power": "[f(x=9**9**9)]", "nul": "[f(x='\0')]",
        "many": "[" + "f(x=1), " * 8_000 + "]", "arguments": f"[f({', '.join(f'a{n}=1' for n in range(6_000))})]",
        "run": "[f(x=__import__('os').abort())]", "text_of_f": "[f(x=f'{abort()}')]", "stars": "[f(**{'x': 1})]",
        "surrogate": "[f(x='\ud800')]", "long": "x" * 20_000_000, "names": "[f(x=True, True=1, None=2)]",
    },
    "lfm3": {
        "deep": "<function=f><parameter=x>" + "[" * 60_000 + "</parameter></function>", "open": "<function=f>" * 5_000,
        "deep_objects": "<function=f><parameter=x>" + '{"a":' * 12_000 + "</parameter></function>",
        "parameters": "<function=f>" + "<parameter=a>" * 4_000 + "</function>",
        "ends": "<function=f><parameter=a>" + "</parameter>" * 5_000 + "</function>",
        "functions": "<function=f>" + "</function>" * 5_000 + "x", "spaces": " " * 60_000,
        "digits": "<function=f><parameter=x>" + "9" * 60_000 + "</parameter></function>",
        "infinite": "<function=f><parameter=x>1e999</parameter></function>",
        "nan": "<function=f><parameter=x>[NaN]</parameter></function>", "long": "x" * 20_000_000,
        "surrogate": '<function=f><parameter=x>"\\ud800"</parameter></function>', "names": "<function=" + "a." * 30_000 + ">",
    },
}  # fmt: skip


# Lines of JSON with messages in them.


def _said(role: str, content: Any, **rest: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **rest}


def _call(arguments: Any) -> dict[str, Any]:
    return _said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


_ASKED = [_said("system", "Be brief."), _said("user", "How is caf\u00e9 12?")]
_ANSWER = _said("assistant", "4")
_CONVERSATIONS = [
    {"messages": [*_ASKED, _said("assistant", f"Fine {number}.", thinking="Hm.")], "n": number} for number in range(10)
] + [
    {"messages": [*_ASKED, _call({"city": "Z\u00fcrich"}), _said("tool", {"t": [1, None]}), _ANSWER], "tools": _TOOLS},
    {"messages": [_said("user", [{"text": "a"}]), _call('{"city": "b", "days": 3}')], "tools": json.dumps(_TOOLS)},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
    {"conversations": [{"from": "human", "value": "Go"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
]  # fmt: skip
_PREFERENCES = [
    {"prompt": _ASKED, "chosen": [_said("assistant", f"Fine {number}.")], "rejected": "No."} for number in range(10)
] + [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "tools": _TOOLS},
    {"chosen": [*_ASKED, _said("assistant", "a")], "rejected": [*_ASKED, _said("assistant", "b")]},
]  # fmt: skip
_PROBLEMS = [
    {
        "question": f"Ann has {number} pears and buys 2. How many has she?",
        "answer": f"<<{number}+2={number + 2}>>\n#### {number + 2}",
    }
    for number in range(20)
]


def _read_conversations(folder: epath.Path) -> str:
    from data_pipelines.conversations.reading import ConversationsConfig, read_conversations

    config = ConversationsConfig(source=str(folder / "a.jsonl"), held_out_share=0.0)
    return _digest_as_written(read_conversations(config, "train"))


def _read_preferences(folder: epath.Path) -> str:
    from data_pipelines.conversations.preferences import read_preferences
    from data_pipelines.conversations.reading import ConversationsConfig

    config = ConversationsConfig(source=str(folder / "a.jsonl"), held_out_share=0.0)
    return _digest_as_written(side for pair in read_preferences(config, "train") for side in (pair.chosen, pair.rejected))


def _digest_as_written(conversations: Iterable[Any]) -> str:
    """Of the texts that a tokenizer is given, which takes UTF-8."""
    from data_pipelines.conversations.chat_formats import CHAT_FORMATS, Rendering

    renderings = [Rendering(messages, tools, False) for messages, tools, _ in conversations]
    return digest_of(text.encode() for text in CHAT_FORMATS["lfm2"].render_many(renderings))


def _read_problems(folder: epath.Path) -> str:
    from data_pipelines.tasks.gsm8k import Gsm8k

    task, found = Gsm8k(folder / "a.jsonl"), []
    for seed, difficulty, split in itertools.product(range(len(_PROBLEMS)), (1, 2, 6), ("train", "held_out")):
        with contextlib.suppress(ValueError):  # there is none of this kind
            found.append(task.sample(seed, difficulty, split))
    return digest_of(str(message["content"]).encode() for problem in found for message in problem.messages)


def _messages(*messages: Any, **rest: Any) -> Callable[[bytes], bytes]:
    return always(_lines([{"messages": [*_ASKED, *messages], **rest}]))


_NESTED = "[" * 900 + "]" * 900
_CONVERSATION_CASES = {
    "deep": always("[" * 1_000_000 + "\n"), "empty": always(b""), "nul": always(bytes(1000)), "list": always("[1]\n"),
    "deep_arguments": _messages(_call('{"a": ' + "[" * 1_000_000)), "nested": _messages(_call(f'{{"a": {_NESTED}}}')),
    "nested_answer": always(json.dumps({"messages": [*_ASKED, _said("tool", 0), _ANSWER]}).replace("0", _NESTED) + "\n"),
    "nested_tools": _messages(_ANSWER, tools=_NESTED), "surrogate": _messages(_said("assistant", "\ud800")),
    "surrogate_inside": _messages(_call('{"a": "\\ud800"}')),
    "surrogate_tools": _messages(_ANSWER, tools='[{"name": "\\ud800"}]'),
    "infinite": _messages(_call('{"a": 1e999}')), "digits": _messages(_call('{"a": ' + "9" * 1_000_000 + "}")),
    "no_role": _messages({"content": "a"}, _ANSWER), "roles": _messages(_said(["user"], "a"), _ANSWER),
    "no_answer": _messages(), "nothing": always(_lines([{"messages": []}])), "from_list": _messages({"from": [], "value": "a"}),
    "call_number": _messages(_said("assistant", "", tool_calls=[1])),
    "calls_text": _messages(_said("assistant", "", tool_calls="f")),
    "tool_null": _messages(_said("tool", None), _ANSWER), "tools_number": _messages(_ANSWER, tools=1),
    "many": lambda _: _lines([{"messages": [*_ASKED, *[_ANSWER] * 200_000]}]), "objects": lambda _: (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": [' + b"{}," * 5_500_000 + b'{}]}, '
        + json.dumps(_ANSWER).encode() + b"]}\n"
    ),
}  # fmt: skip
_PREFERENCE_CASES = {
    "deep": always("[" * 1_000_000 + "\n"), "empty": always(b""),
    "same": always(_lines([{"prompt": "a", "chosen": "b", "rejected": "b"}])),
    "no_prompt": always(_lines([{"chosen": "b", "rejected": "c"}])),
    "numbers": always(_lines([{"chosen": [1], "rejected": [2]}])),
    "surrogate": always(_lines([{"prompt": "a", "chosen": "\ud800", "rejected": "b"}])),
    "surrogate_inside": always(_lines([{"prompt": "a", "chosen": [_call('{"a": "\\ud800"}')], "rejected": "b"}])),
    "nested": always(_lines([{"prompt": "a", "chosen": [_call(f'{{"a": {_NESTED}}}')], "rejected": "b"}])),
    "prompt_number": always(_lines([{"prompt": 1, "chosen": "b", "rejected": "c"}])),
}  # fmt: skip
_PROBLEM_CASES = {
    "deep": always("[" * 1_000_000 + "\n"), "empty": always(b""), "list": always("[1]\n"), "null": always("null\n"),
    "digits": always(_lines([{"question": "a", "answer": "b\n#### " + "9" * 1_000_000}])),
    "exponent": always(_lines([{"question": "a", "answer": "b\n#### 1e999999999"}])),
    "fraction": always(_lines([{"question": "a", "answer": "b\n#### 1/0"}])),
    "surrogate": always(_lines([{"question": "\ud800", "answer": "b\n#### 1"}])),
    "marks": always(_lines([{"question": "a", "answer": "<<" * 1_000_000 + "\n#### 1"}])),
    "question_list": always(_lines([{"question": ["a"], "answer": "b\n#### 1"}])),
}  # fmt: skip


def _lines_format(records: list[Any], read: Callable[[epath.Path], str], crafted: dict[str, Callable[[bytes], bytes]]) -> Format:
    return Format(lambda folder: (folder / "a.jsonl").write_bytes(_lines(records)), "a.jsonl", read, False, "a.jsonl", crafted)


CHATS: dict[str, Format] = {
    "chat template": Format(_make_template, "chat_template.jinja", _read_template, False, "chat_template.jinja", _TEMPLATE_CASES),
    "tokenizer_config.json": Format(
        _make_settings, "tokenizer_config.json", _read_settings, False, "tokenizer_config.json", _SETTINGS_CASES
    ),
    "tool calls, LFM2": _calls_format("lfm2", _PYTHONIC, ("<|tool_call_start|>", "<|tool_call_end|>")),
    "tool calls, LFM3": _calls_format("lfm3", _TAGGED, ("<tool_call>", "</tool_call>")),
    "conversations": _lines_format(_CONVERSATIONS, _read_conversations, _CONVERSATION_CASES),
    "preferences": _lines_format(_PREFERENCES, _read_preferences, _PREFERENCE_CASES),
    "problems of GSM8K": _lines_format(_PROBLEMS, _read_problems, _PROBLEM_CASES),
}
