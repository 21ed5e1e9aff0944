"""What of a conversation an assistant has said: found by rendering up to where it begins to speak, and then with what it says.

That works with every template, and it is what happens when a model answers: it sees the one and says the difference.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.conversations.chat_formats import CALL, END_CALL, Rendering, Template
from data_pipelines.conversations.reading import Conversation

# A model's calls stand in its content, in LFM2's format; their symbols are symbols there, and nowhere else in a message.
_CALLS = re.compile(f"{re.escape(CALL)}.*?{re.escape(END_CALL)}", re.DOTALL)
# Letters that text hardly has. They have no upper case and are no spaces, and Python writes them as they are inside a list.
_MARKS = tuple(map(chr, range(0x1401, 0x166D)))
_PROBE = ({"role": "user", "content": "a"},)


class Turns(NamedTuple):
    """A text that a model is trained on.

    text: as it is rendered, up to the end of the last answer. spans: (first, end) of the characters of each answer, ascending.
    beginning: with what the template lets an assistant begin. mark: a character that is to be taken out again: it parts what
    would otherwise read as a symbol; "": there is none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    beginning: str
    mark: str = ""

    def plain(self) -> str:
        """The text as people read it."""
        return self.text.replace(self.mark, "") if self.mark else self.text


def render_prompts(conversations: Sequence[Conversation], template: Template) -> list[Turns | ValueError]:
    """The text of each up to where the assistant begins to speak, with no spans; or why the template makes none of it.

    Raises:
      ValueError: the template does not end where an assistant begins.
    """
    parted = [_without_symbols(conversation, template) for conversation in conversations]
    beginning, texts = _render(template, [Rendering(messages, tools, True) for messages, tools, _ in parted])
    return [
        text if isinstance(text, ValueError) else Turns(text, (), beginning, mark)
        for text, (_, _, mark) in zip(texts, parted, strict=True)
    ]


def render_turns(conversations: Sequence[Conversation], template: Template) -> list[list[Turns] | ValueError]:
    """The texts of each conversation with its answers: one, or several where the template forgets; or why it makes none of it.

    A template may leave out of earlier answers what the model has thought. The model saw it as it spoke, and sees no more of it
    later, so no one text is right for all answers: whatever continues a text is in it, and another begins where that is not so.
    Each answer is in one text, behind what the model sees when it is asked for it.

    Raises:
      ValueError: the template does not end where an assistant begins, or renders an answer otherwise than behind the beginning
        that it makes; the message shows where.
    """
    parted = [_without_symbols(conversation, template) for conversation in conversations]
    answers = [[at for at, message in enumerate(messages) if message["role"] == "assistant"] for messages, _, _ in parted]
    wanted = [
        rendering
        for (messages, tools, _), ends in zip(parted, answers, strict=True)
        for at in ends
        for rendering in (Rendering(messages[:at], tools, True), Rendering(messages[: at + 1], tools, False))
    ]
    beginning, rendered = _render(template, wanted)
    texts, found = iter(rendered), []
    for conversation, (_, _, mark), ends in zip(conversations, parted, answers, strict=True):
        pairs = [(next(texts), next(texts)) for _ in ends]
        refused = [text for pair in pairs for text in pair if isinstance(text, ValueError)]
        where = f"{conversation.name}, {template.name}"
        parts = [] if refused else [(before, _answer(before, after, beginning, where)) for before, after in pairs]
        found.append(refused[0] if refused else _join(parts, beginning, mark))
    return found


def _join(parts: list[tuple[str, str]], beginning: str, mark: str) -> list[Turns]:
    """As few texts as there can be, of (what comes before an answer, the answer)."""
    found: list[Turns] = []
    for before, answer in parts:
        spans = ((len(before), len(before) + len(answer)),)
        if found and before.startswith(found[-1].text):
            spans = found.pop().spans + spans
        found.append(Turns(before + answer, spans, beginning, mark))
    return found


def _render(template: Template, wanted: list[Rendering]) -> tuple[str, list[str | ValueError]]:
    """With what the template lets an assistant begin, and what is wanted."""
    question = [Rendering(_PROBE, (), False), Rendering(_PROBE, (), True)]
    without, with_it, *texts = template.render_many([*question, *wanted])
    return _beginning(without, with_it, template.name), texts


def _beginning(without: str | ValueError, with_it: str | ValueError, name: str) -> str:
    """With what a template lets an assistant begin, from its texts of a question."""
    for text in (without, with_it):
        if isinstance(text, ValueError):
            raise ValueError(f"{name} refuses a conversation of one question: {text}") from text
    if not with_it.startswith(without) or with_it == without:
        raise ValueError(
            f"{name} ends no text where an assistant begins: with add_generation_prompt a question becomes "
            f"{with_it[-100:]!r}, without it {without[-100:]!r}; what is an answer cannot be told"
        )
    return with_it.removeprefix(without)


def _answer(before: str, after: str, beginning: str, where: str) -> str:
    """What `after` has behind `before`; or, where it has less of what came earlier, behind the last place where one begins."""
    if after.startswith(before):
        return after.removeprefix(before)
    # Messages spell no symbol, so a beginning that has one is the template's; and the last one is that of the last message.
    if "<|" in beginning and before.endswith(beginning) and beginning in after:
        return after.rpartition(beginning)[2]
    same = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    raise ValueError(
        f"{where}: an answer is rendered otherwise than behind where it begins, from character {same} on: "
        f"{after[same : same + 100]!r} where the prompt has {before[same : same + 100]!r}; what is an answer cannot be told"
    )


def _without_symbols(conversation: Conversation, template: Template) -> tuple[list[Any], list[Any], str]:
    """Messages and tools in which no text spells a symbol, and the mark that parts those that did."""
    messages, tools = list(conversation.messages), list(conversation.tools)
    spelled = json.dumps([messages, tools], ensure_ascii=False)
    if "<|" not in spelled and "|>" not in spelled:
        return messages, tools, ""
    used = set(spelled) | set(template.source)
    mark = next((mark for mark in _MARKS if mark not in used), None)
    if mark is None:
        raise ValueError(f"{conversation.name} spells symbols and has each of the {len(_MARKS)} marks that part them; remove it")
    return [_part_message(message, mark) for message in messages], part_symbols(tools, mark), mark


def _part_message(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    parted = part_symbols(message, mark)
    content = message.get("content")
    if message["role"] == "assistant" and isinstance(content, str):
        inside = [call.removeprefix(CALL).removesuffix(END_CALL) for call in _CALLS.findall(content)]
        calls = [CALL + part_symbols(call, mark) + END_CALL for call in inside]
        texts = [part_symbols(text, mark) for text in _CALLS.split(content)]
        parted["content"] = "".join(itertools.chain(*itertools.zip_longest(texts, calls, fillvalue="")))
    return parted


def part_symbols(value: Any, mark: str) -> Any:
    """Plain values in which no text begins or ends a symbol: a mark, which no text has, parts what would. Names of fields too."""
    if isinstance(value, str):
        return value.replace("<|", f"<{mark}|").replace("|>", f"|{mark}>")
    if isinstance(value, Mapping):
        return {part_symbols(name, mark): part_symbols(item, mark) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [part_symbols(item, mark) for item in value]
    return value
