"""Chat templates from outside: the text that transformers makes of them, and no harm from those that mean it."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lfm_jax.interop import chat_template
from lfm_jax.interop.chat_template import read_template, render, render_many
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE
from lfm_jax.isolation.limits import LimitError

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "x": "<&> caf\u00e9"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"where": "SF", "days": [1, None, True]}}}
CHATS = {
    "question": ([{"role": "user", "content": "Hi\n"}], None),
    "tools": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}], [TOOL, TOOL]),
    "calls": (
        [
            {"role": "user", "content": "Weather in SF?"},
            {"role": "assistant", "content": "<think>look it up</think>", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"degrees": 20}'},
            {"role": "assistant", "content": "<think>cold</think>20 degrees, \U0001f976."},
            {"role": "user", "content": "Thanks"},
        ],
        [TOOL],
    ),
}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOKENS = {"bos_token": "<|startoftext|>"}


def _theirs(template, messages, tools, prompt):
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **TOKENS)
    return texts[0]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("file", ["LFM2-8B-A1B", "LFM2.5-8B-A1B", "LFM2.5-Instruct"])
def test_published_templates_render_as_in_transformers(file, chat, published_data):
    template = (published_data / "lfm_templates" / f"{file}.jinja").read_text()
    messages, tools = CHATS[chat]
    for prompt in (True, False):
        expected = _theirs(template, messages, tools, prompt)
        assert "<|im_start|>user" in expected
        found = render(template, messages, tools=tools, add_generation_prompt=prompt, special_tokens=TOKENS)
        assert found == expected


LANGUAGE = """{% for m in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
  {% generation %}
  {{ m.content | trim }}
  {% endgeneration %}
{% endfor %}
{% set ns = namespace(self=1) %}{% set ns.a = {"b": [1, 2.5]} %}{{ ns.a | tojson(indent=2) }}{{ dict(a=1) }}
{{ undefined_name }}{{ tools is none }}{{ documents }}{{ "a" * 3 }}{{ strftime_now("x") }}
"""


@pytest.mark.parametrize("template", [LANGUAGE, CHAT_TEMPLATE], ids=["language", "ours"])
def test_the_language_is_that_of_transformers(template):
    messages = CHATS["calls"][0]
    assert render(template, messages, special_tokens=TOKENS) == _theirs(template, messages, None, False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "more than 3 seconds of processor time"),
        ("{{ 'a' * 10**10 }}", "more than 512 MiB of memory"),
    ],
)
def test_a_template_that_takes_too_much_is_stopped(template, message):
    with pytest.raises(LimitError, match=f"some/file.jinja: {message}"):
        render(template, CHATS["question"][0], name="some/file.jinja")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "chat template: cannot be rendered .TemplateSyntaxError: "),
        ("{{ raise_exception('roles must alternate') }}", "cannot be rendered .TemplateError: roles must alternate"),
        ("{{ nothing.at.all }}", "cannot be rendered .UndefinedError: 'nothing' is undefined"),
        ("{{ range(10**9) }}", "cannot be rendered .OverflowError: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered .SecurityError|UndefinedError"),
        ("{{ messages.append(1) }}", "cannot be rendered .SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "a namespace may not hold '__class__'"),
        ("{{ namespace(_x=1) }}", "a namespace may not hold '_x'"),
        ("{{ " + "(" * 50_000, "cannot be rendered .RecursionError"),
        ("{% include '/etc/hostname' %}", "cannot be rendered .TypeError: no loader"),
        ("\ud800", "the text it makes is no UTF-8 .surrogates not allowed"),
        ("a" * (1 << 20) + "a", "a template of 1048577 characters; at most 1048576"),
    ],
)
def test_a_template_that_may_not_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        render(template, CHATS["question"][0])


def test_many_are_rendered_as_one_by_one_in_few_processes(monkeypatch):
    """In their order, each with its own tools and ending, and an error where `render` raises it."""
    template = CHAT_TEMPLATE + "{% if messages[0].content == 'bad' %}{{ raise_exception('why') }}{% endif %}"
    bad, surrogate = ([{"role": "user", "content": content}] for content in ("bad", "\ud800"))
    chats = [(*CHATS["calls"], False), (*CHATS["question"], True), (bad, None, True), (surrogate, None, False)]
    chats.append((*CHATS["tools"], True))
    expected = []
    for messages, tools, prompt in chats:
        try:
            expected.append(render(template, messages, tools=tools, add_generation_prompt=prompt, special_tokens=TOKENS))
        except ValueError as error:
            expected.append(str(error))
    sizes = []
    limited = chat_template.call_limited
    monkeypatch.setattr(chat_template, "call_limited", lambda *data, **limits: sizes.append(1) or limited(*data, **limits))
    monkeypatch.setattr(chat_template, "_TOGETHER_BYTES", 500)
    found = render_many(template, chats, special_tokens=TOKENS)
    assert [str(text) for text in found] == expected
    assert [isinstance(text, ValueError) for text in found] == [number in (2, 3) for number in range(len(chats))]
    assert 1 < len(sizes) < len(chats)
    assert render_many(template, []) == []


def test_much_to_render_has_more_time_and_memory(monkeypatch):
    given = []
    limited = lambda work, data, *, name, limits: given.append((len(data), limits)) or []
    monkeypatch.setattr(chat_template, "call_limited", limited)
    for size in (10, 3 << 20):
        render_many("", [([{"role": "user", "content": "a" * size}], None, False)])
    (_, little), (size, much) = given
    assert (little.cpu_seconds, little.seconds, little.memory_bytes >> 20) == (3, 30, 512)
    assert (much.cpu_seconds, much.seconds, much.memory_bytes) == (3 + 24, 30 + 240, (1 << 29) + 32 * size)


def test_of_several_templates_the_default_is_taken(tmp_path):
    entries = [{"name": ["a"], "template": "a"}, None, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entries, "eos_token": {"content": "<|e|>"}}))
    assert read_template(tmp_path) == ("b", {"eos_token": "<|e|>"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{{ bos_token }}\xff", r"chat_template.jinja is no UTF-8 \(invalid start byte at byte 15\); it is damaged"),
        (b"a" * ((4 << 20) + 1), "chat_template.jinja has 4194305 bytes, which is no template"),
    ],
    ids=["no_utf8", "long"],
)
def test_a_file_that_is_no_template_is_named(content, message, tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_template(tmp_path)
