"""Chat templates from outside: read beside their tokenizer, and rendered where they can do no harm."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lfm_jax.interop.foreign import render_templates
from lfm_jax.isolation.limits import Limits, call_limited

MOST_TEMPLATE_BYTES = 1 << 20
_MOST_SETTINGS_BYTES = 1 << 24
# What one process renders: of the messages as JSON, whose bytes are about those of the texts.
_TOGETHER_BYTES = 1 << 22
# Of a process with little to do. For each 128 KB more it has a second: the published templates take 0.005 to 0.06 (2 cores).
_LIMITS = Limits(cpu_seconds=3, seconds=30, memory_bytes=1 << 29)
_BYTES_A_SECOND = 1 << 17
_MEMORY_A_BYTE = 32  # JSON takes up to 24 times its bytes as objects of Python


def read_template(path: epath.PathLike) -> tuple[str | None, dict[str, str]]:
    """The chat template that comes with a tokenizer, and its special tokens by the names that templates use.

    Args:
      path: of the tokenizer's file or folder. The template is chat_template.jinja there, or that in tokenizer_config.json, or
        None.
    Raises:
      ValueError: a tokenizer_config.json, or a chat_template.jinja, that cannot be used.
    """
    path = epath.Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer_config.json"
    settings = _settings(file)
    template = settings.get("chat_template", "")
    if isinstance(template, list):  # several by name
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    if (folder / "chat_template.jinja").exists():
        template = _text(folder / "chat_template.jinja")
    if not isinstance(template, str):
        raise ValueError(f"{file}: chat_template is no text; give a template, or remove the entry")
    special = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    special = {name: token.get("content") if isinstance(token, dict) else token for name, token in special.items()}
    return template or None, {name: token for name, token in special.items() if isinstance(token, str)}


def _text(file: epath.Path) -> str:
    if file.stat().length > 4 * MOST_TEMPLATE_BYTES:
        raise ValueError(f"{file} has {file.stat().length} bytes, which is no template; it is damaged")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 ({error.reason} at byte {error.start}); it is damaged") from error


def _settings(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes()) if file.stat().length <= _MOST_SETTINGS_BYTES else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object of at most {_MOST_SETTINGS_BYTES} bytes; it is damaged")
    return content


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    name: str = "chat template",
) -> str:
    """The text that a template makes of a conversation, the same as transformers' `apply_chat_template` makes of it.

    The template runs in a process of its own with limits on time and memory, 0.1 seconds a call: fit to try a template; for a
    corpus there is `render_many`.

    Args:
      template: in Jinja's language, from anywhere.
      messages: with "role" and "content" and whatever the template reads; plain values, as in JSON.
      tools: descriptions of functions, as JSON schemas.
      add_generation_prompt: whether the text ends where the assistant begins.
      special_tokens: by the names that templates use, {"bos_token": "<|startoftext|>", ...}.
      name: of the file that the template is from, for messages.
    Raises:
      LimitError: it takes more than 3 seconds of processor time or 512 MiB, or a little more where there is much to render.
      ValueError: it is no template, is longer than a megabyte, refuses the messages, or makes text that is no UTF-8.
    """
    rendering = (messages, tools, add_generation_prompt)
    (text,) = render_many(template, [rendering], special_tokens=special_tokens, name=name)
    if isinstance(text, ValueError):
        raise text
    return text


def render_many(
    template: str,
    renderings: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any] | str] | None, bool]],
    *,
    special_tokens: Mapping[str, str] | None = None,
    name: str = "chat template",
) -> list[str | ValueError]:
    """The text of each as `render` makes it, or the error that it would raise; in one process for each 4 MB of messages.

    Args:
      renderings: (messages, tools, add_generation_prompt) of each; these and the others as in `render`.
    Raises:
      LimitError: some of them together take more time or memory than templates take for so many messages.
      ValueError: it is no template, or is longer than a megabyte.
    """
    if len(template) > MOST_TEMPLATE_BYTES:
        raise ValueError(f"{name}: a template of {len(template)} characters; at most {MOST_TEMPLATE_BYTES} are taken")
    head = json.dumps({"template": template, "shared": {**(special_tokens or {}), "documents": None}}).encode()[:-1]
    found, waiting, size = [], [], 0
    for messages, tools, prompt in renderings:
        tools = None if tools is None else list(tools)
        values = {"messages": list(messages), "tools": tools, "add_generation_prompt": prompt}
        waiting.append(json.dumps(values).encode())
        size += len(waiting[-1])
        if size > _TOGETHER_BYTES:
            found += _render_together(head, waiting, name)
            waiting, size = [], 0
    return found + (_render_together(head, waiting, name) if waiting else [])


def _render_together(head: bytes, values: list[bytes], name: str) -> list[str | ValueError]:
    data = head + b', "values": [' + b", ".join(values) + b"]}"
    more = len(data) // _BYTES_A_SECOND
    limits = Limits(_LIMITS.cpu_seconds + more, _LIMITS.seconds + 10 * more, _LIMITS.memory_bytes + _MEMORY_A_BYTE * len(data))
    return [_text_or_error(answer, name) for answer in call_limited(render_templates, data, name=name, limits=limits)]


def _text_or_error(answer: Mapping[str, str], name: str) -> str | ValueError:
    if "error" in answer:
        return ValueError(f"{name}: {answer['error']}")
    try:
        answer["text"].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, of the template or of a message
        return ValueError(f"{name}: the text it makes is no UTF-8 ({error.reason}); repair it or the messages")
    return answer["text"]
