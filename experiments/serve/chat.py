"""From messages to ids by a chat template, and back: its symbols become symbols, and whatever messages spell stays text, but for
the symbols around a call in what an assistant said."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import Tokenizer
from data_pipelines.conversations import JinjaTemplate, end_ids, part_symbols, symbol_ids
from data_pipelines.conversations.chat_formats import CALL, END_CALL
from experiments.serve.requests import RequestError, strings
from lfm_jax.interop.chat_template import read_template, render
from lfm_jax.interop.tokenizer_json import CHAT_TEMPLATE

_CALL_SYMBOLS = re.compile(f"({re.escape(CALL)}|{re.escape(END_CALL)})")
_TURN = "<|im_start|>"
_ASSISTANT = "assistant\n"
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class ChatFormat:
    """Of a model. symbols: spelling of each symbol that the tokenizer has: its id. stop_ids: an assistant's turn ends by one."""

    def __init__(self, tokenizer: Tokenizer, template: str = CHAT_TEMPLATE, special_tokens: Mapping[str, str] | None = None):
        """special_tokens: by the names that the template uses, as in `render`; without them, those of `JinjaTemplate`."""
        self._tokenizer, self._template = tokenizer, template
        self._special_tokens = {**JinjaTemplate(source=template).special_tokens, **(special_tokens or {})}
        self.symbols = symbol_ids(tokenizer)  # one that it has not is text in the template, too
        self._pattern = re.compile("(" + "|".join(map(re.escape, self.symbols)) + ")")
        self.stop_ids = end_ids(tokenizer)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
        """The ids up to where the assistant begins, behind one beginning-of-text. Takes 0.1 seconds: a process is started.

        Raises:
          RequestError: the template refuses the messages, or takes too long over them.
        """
        used = set().union(*strings([messages, tools]))
        mark = next((chr(code) for code in itertools.chain(*_PRIVATE) if chr(code) not in used), None)
        if mark is None:
            raise RequestError("the messages use every private-use character of Unicode; leave one out", "messages")
        try:
            text = render(
                self._template, [_parted(message, mark) for message in messages], tools=part_symbols(tools, mark) or None,
                add_generation_prompt=True, special_tokens=self._special_tokens, name="the chat template",
            )  # fmt: skip
        except ValueError as error:
            raise RequestError(str(error).replace(mark, ""), "messages") from error
        pieces = self._pieces(text, mark)
        encoded = iter(self._tokenizer.encode_batch([piece for piece, symbol in pieces if symbol is None], threads=1))
        ids = [index for _, symbol in pieces for index in (next(encoded) if symbol is None else [symbol])]
        bos = self._tokenizer.bos_id
        return (bos, *(index for index in ids if index != bos))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of what the model said, with the symbols around calls and no others, which `prompt` makes symbols again."""
        spelling = {self.symbols.get(symbol): symbol for symbol in (CALL, END_CALL)}
        runs = itertools.groupby(ids, spelling.get)
        return "".join(symbol * len(list(run)) if symbol else self._tokenizer.decode(list(run)) for symbol, run in runs)

    def _pieces(self, text: str, mark: str) -> list[tuple[str, int | None]]:
        """Symbols, and the text between them: (piece, id of a symbol)."""
        pieces, before = [], ""
        for piece in self._pattern.split(text):
            if before == _TURN and piece.startswith(_ASSISTANT):
                # A model's words begin with a token of their own when it says them, and so they do when it is told of them.
                pieces.append((_ASSISTANT, None))
                piece = piece.removeprefix(_ASSISTANT)
            if piece:  # without its mark it may well be spelled as a symbol
                pieces.append((piece.replace(mark, ""), self.symbols.get(piece)))
            before = piece
        return pieces


def _parted(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The message with a mark in whatever spells a symbol, but for those around calls in an assistant's content."""
    parted = part_symbols(message, mark)
    if message["role"] == "assistant":
        pieces = _CALL_SYMBOLS.split(message["content"])
        parted["content"] = "".join(piece if index % 2 else part_symbols(piece, mark) for index, piece in enumerate(pieces))
    return parted


def read_chat_format(tokenizer: Tokenizer, path: epath.Path) -> ChatFormat:
    """That of a tokenizer's file or folder: the template that comes with it, or else LFM2's.

    Raises:
      ValueError: a tokenizer_config.json that cannot be used.
    """
    template, special = read_template(path)
    return ChatFormat(tokenizer, template or CHAT_TEMPLATE, special)
