"""How conversations are written for a model: LFM2's and LFM2.5's formats in our own code, or any template in Jinja's language."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from data_pipelines.tokenization.tokenizer import SYMBOLS

_PAD, _BOS, _EOS = SYMBOLS[:3]
_TURN, END, _LIST, _END_LIST, CALL, END_CALL, _RESPONSE, _END_RESPONSE = SYMBOLS[6:]
_END_THINKING = "</think>"


# A `ChatFormat` for others; what is in angles is filled in.
_JINJA = """\
{%- set tool_list = <tool_list> -%}
{%- set response = <response> -%}
{%- set kept_from_last = <role> -%}
{%- macro text(content) -%}
    {{- content if content is string else content | tojson if content is defined and content is not none else "" -}}
{%- endmacro -%}
{%- macro argument(value) -%}
    {{- <written> if value is string else value | tojson if value is mapping else value | string -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set first = 1 if messages and messages[0].role == "system" else 0 -%}
{%- set ns = namespace(system=text(messages[0].content) if first else "", kept_from=0, said="", call="") -%}
{%- for tool in tools or [] -%}
    {%- set before = ("\\n" if ns.system else "") + "List of tools: " + tool_list[0] if loop.first else ", " -%}
    {%- set ns.system = ns.system + before + (tool if tool is string else tool | tojson) + (tool_list[1] if loop.last else "") -%}
{%- endfor -%}
{%- if ns.system -%}
    {{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages[first:] -%}
    {%- if message.role == kept_from_last -%}
        {%- set ns.kept_from = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages[first:] -%}
    {%- set keeps_thinking = loop.index0 >= ns.kept_from -%}
    {%- set ns.said = text(message.content) -%}
    {%- if message.role == "tool" -%}
        {%- set ns.said = response[0] + ns.said + response[1] -%}
    {%- elif message.role == "assistant" -%}
        {%- if not keeps_thinking and "</think>" in ns.said -%}
            {%- set ns.said = ns.said.split("</think>")[-1].strip() -%}
        {%- elif keeps_thinking and message.thinking is defined and message.thinking is not none -%}
            {%- set ns.said = "<think>" + message.thinking + "</think>" + ns.said -%}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set ns.call = "" -%}
            {%- for name, value in call.function.arguments.items() -%}
                {%- set ns.call = ns.call + ("" if loop.first else ", ") + name + "=" + argument(value) -%}
            {%- endfor -%}
            {%- set before, after = "<|tool_call_start|>[" if loop.first else ", ", "]<|tool_call_end|>" if loop.last else "" -%}
            {%- set ns.said = ns.said + before + call.function.name + "(" + ns.call + ")" + after -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" + ns.said + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


class Rendering(NamedTuple):
    """A text that is asked for: of these messages with these tools, up to where the assistant begins, or whole."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any] | str]
    generation_prompt: bool


class Template(Protocol):
    """What makes texts of conversations. name: for messages. source: its own text, if it comes from outside."""

    name: str
    source: str

    def render_many(self, renderings: Sequence[Rendering]) -> list[str | ValueError]:
        """The text of each, or why there is none."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A format of the LFM family: the beginning-of-text symbol, then `<|im_start|>role`, content and `<|im_end|>` of each turn.

    The tools are listed in the system turn. An assistant's turn is its thinking in `<think>`, its content and its calls as a list
    in Python's form, `<|tool_call_start|>[name(key=value)]<|tool_call_end|>`, also where the published template has no place for
    thinking or calls but in the content.

    tool_list, response: what stands around the list of tools, and around what a tool answers.
    write_text: writes an argument that is a text.
    forgets: which thinking is left out: none, that of all answers but the last, or that before the last question.
    """

    name: str
    tool_list: tuple[str, str]
    response: tuple[str, str] = ("", "")
    write_text: Callable[[str], str]
    forgets: Literal["nothing", "before_last_answer", "before_last_question"]
    source: str = ""

    def render_many(self, renderings: Sequence[Rendering]) -> list[str | ValueError]:
        """As in `Template`; every conversation has a text."""
        return [self.render(*rendering) for rendering in renderings]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any] | str] = (),
        generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, the same as the published template makes of it."""
        system = ""
        if messages and messages[0]["role"] == "system":
            system, messages = _text(messages[0].get("content")), messages[1:]
        if tools:
            listed = ", ".join(tool if isinstance(tool, str) else _json(tool) for tool in tools)
            system += ("\n" if system else "") + "List of tools: " + listed.join(self.tool_list)
        turns = [f"{_TURN}system\n{system}{END}\n"] if system else []
        kept_from = self._kept_from([message["role"] for message in messages])
        for index, message in enumerate(messages):
            turns.append(f"{_TURN}{message['role']}\n{self._said(message, index >= kept_from)}{END}\n")
        return "".join([_BOS, *turns, f"{_TURN}assistant\n" if generation_prompt else ""])

    def jinja(self) -> str:
        """The same as a chat template in Jinja's language."""
        written = "value | tojson" if self.write_text is _json else """ "'" + value + "'" """.strip()
        values = {"tool_list": list(self.tool_list), "response": list(self.response), "role": _KEPT_FROM_LAST[self.forgets] or ""}
        filled = {name: _json(value) for name, value in values.items()} | {"written": written}
        return re.sub(r"<(tool_list|response|role|written)>", lambda found: filled[found[1]], _JINJA)

    def _kept_from(self, roles: list[str]) -> int:
        """The first message whose thinking stays."""
        role = _KEPT_FROM_LAST[self.forgets]
        return len(roles) - 1 - roles[::-1].index(role) if role in roles else 0

    def _said(self, message: Mapping[str, Any], keeps_thinking: bool) -> str:
        content = _text(message.get("content"))
        if message["role"] == "tool":
            return content.join(self.response)
        if message["role"] != "assistant":
            return content
        if not keeps_thinking and _END_THINKING in content:
            content = content.rpartition(_END_THINKING)[2].strip()
        if keeps_thinking and message.get("thinking") is not None:
            content = f"<think>{message['thinking']}{_END_THINKING}{content}"
        if message.get("tool_calls"):
            content += CALL + "[" + ", ".join(self._call(call["function"]) for call in message["tool_calls"]) + "]" + END_CALL
        return content

    def _call(self, function: Mapping[str, Any]) -> str:
        arguments = ", ".join(f"{name}={self._argument(value)}" for name, value in function["arguments"].items())
        return f"{function['name']}({arguments})"

    def _argument(self, value: Any) -> str:
        if isinstance(value, str):
            return self.write_text(value)
        return _json(value) if isinstance(value, Mapping) else str(value)


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else _json(content)


def _json(value: Any) -> str:
    """As `tojson` writes it in transformers' chat templates."""
    return json.dumps(value, ensure_ascii=False)


# What a format forgets, and the role from whose last message on it forgets nothing.
_KEPT_FROM_LAST = {"nothing": None, "before_last_answer": "assistant", "before_last_question": "user"}
_TEXT_TO_QUOTES = "'{}'".format  # with no escapes, as LFM2.5-8B-A1B's template has it
# By name: those whose published templates are compared with in the tests.
CHAT_FORMATS = {
    chat_format.name: chat_format
    for chat_format in (
        # LFM2-8B-A1B.jinja, and LFM2 as a whole. Calls are in the content there, and the model card's have JSON's quotes.
        ChatFormat(
            name="lfm2", tool_list=(_LIST + "[", "]" + _END_LIST), response=(_RESPONSE, _END_RESPONSE), write_text=_json,
            forgets="nothing",
        ),
        # LFM2.5-Instruct.jinja; calls likewise.
        ChatFormat(name="lfm2_5_instruct", tool_list=("[", "]"), write_text=_json, forgets="before_last_answer"),
        # LFM2.5-8B-A1B.jinja
        ChatFormat(name="lfm2_5", tool_list=("[", "]"), write_text=_TEXT_TO_QUOTES, forgets="before_last_question"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class JinjaTemplate:
    """A chat template from anywhere, which runs in a process with limits, many conversations at a time.

    source: in Jinja's language. name: of its file. special_tokens: by the names that it uses; without them, those of LFM2.
    """

    source: str
    name: str = "chat template"
    special_tokens: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"bos_token": _BOS, "eos_token": END, "pad_token": _PAD}
    )

    def render_many(self, renderings: Sequence[Rendering]) -> list[str | ValueError]:
        """As in `Template`; a template may refuse a conversation.

        Raises:
          ValueError: it is no template, or takes more time or memory than a template does (`LimitError`).
        """
        from lfm_jax.interop.chat_template import render_many

        conversations = [
            ([self._readable(message) for message in messages], list(tools) or None, prompt)
            for messages, tools, prompt in renderings
        ]
        return render_many(self.source, conversations, special_tokens=self.special_tokens, name=self.name)

    def _readable(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message with its fields named as the template names them."""
        for field, *others in (("tool_calls",), ("thinking", "reasoning_content")):
            if not message.get(field) or self._reads(field):
                continue
            known = [other for other in others if self._reads(other)]
            if not known:
                raise ValueError(
                    f"{self.name} does not read {field}, which messages have, and would leave them out; write them into the "
                    "content, or take another template"
                )
            message = {**message, known[0]: message[field]}
        return message

    def _reads(self, field: str) -> bool:
        return re.search(rf"\b{field}\b", self.source) is not None
