"""Chat templates from outside, rendered where they can do no harm."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_jax.interop.foreign import render_template
from lfm_jax.isolation.limits import Limits, call_limited

MOST_TEMPLATE_BYTES = 1 << 20
_LIMITS = Limits(cpu_seconds=3, seconds=30, memory_bytes=1 << 29)


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

    The template runs in a process of its own with limits on time and memory, 0.1 seconds a call: fit to try a template, not to
    render a corpus one by one.

    Args:
      template: in Jinja's language, from anywhere.
      messages: with "role" and "content" and whatever the template reads; plain values, as in JSON.
      tools: descriptions of functions, as JSON schemas.
      add_generation_prompt: whether the text ends where the assistant begins.
      special_tokens: by the names that templates use, {"bos_token": "<|startoftext|>", ...}.
      name: of the file that the template is from, for messages.
    Raises:
      LimitError: it takes more than 3 seconds of processor time or 512 MiB.
      ValueError: it is no template, is longer than a megabyte, refuses the messages, or makes text that is no UTF-8.
    """
    if len(template) > MOST_TEMPLATE_BYTES:
        raise ValueError(f"{name}: a template of {len(template)} characters; at most {MOST_TEMPLATE_BYTES} are taken")
    values = {
        **(special_tokens or {}), "messages": list(messages), "tools": None if tools is None else list(tools), "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }  # fmt: skip
    data = json.dumps({"template": template, "values": values}).encode()
    text = call_limited(render_template, data, name=name, limits=_LIMITS)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, of the template or of a message
        raise ValueError(f"{name}: the text it makes is no UTF-8 ({error.reason}); repair it or the messages") from error
    return text
