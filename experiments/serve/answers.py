"""What the engine says, in the words of the OpenAI API."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from experiments.serve.requests import Asked
from experiments.serve.runner import Part
from lfm_jax.generation import Request, Update

# Of each way to end: OpenAI's word, and ours where it has none of its own.
_FINISH = {"stop": ("stop", None), "length": ("length", None), "loop": ("stop", "loop"), "cancelled": ("length", "time")}


class Answers:
    """All choices of one request, whole or in chunks.

    Args:
      spell: the text of one token, symbols included.
      chat: whether they are a chat's.
    """

    def __init__(self, model: str, asked: Asked, requests: Sequence[Request], spell: Callable[[int], str], *, chat: bool):
        self._asked, self._requests, self._spell, self._chat = asked, requests, spell, chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self._updates: list[list[Update]] = [[] for _ in requests]
        self._cached: list[int | None] = [None for _ in requests]
        self._characters = [0 for _ in requests]  # told, of each; for the offsets of tokens

    @property
    def requests(self) -> Sequence[Request]:
        """Of the choices."""
        return self._requests

    @property
    def stream(self) -> bool:
        """Whether chunks were asked for."""
        return self._asked.stream

    @property
    def begun(self) -> bool:
        """Whether the engine has said anything."""
        return any(self._updates)

    @property
    def open(self) -> list[int]:
        """Choices that have not ended."""
        return [index for index, updates in enumerate(self._updates) if not updates or updates[-1].finish_reason is None]

    def take(self, part: Part) -> None:
        """Remembers what is new."""
        self._updates[part.index].append(part.update)
        self._cached[part.index] = part.cached

    def cut(self) -> list[Part]:
        """Ends what is open, since its time is up; the last parts of those choices."""
        parts = [Part(index, Update(0, [], [], [], "", "cancelled"), self._cached[index]) for index in self.open]
        for part in parts:
            self.take(part)
        return parts

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, updates in enumerate(self._updates):
            every = lambda field, updates=updates: [item for update in updates for item in getattr(update, field)]
            text = "".join(update.text for update in updates)
            joined = Update(0, every("tokens"), every("log_probs"), every("top"), text, updates[-1].finish_reason)
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            choices.append(self._choice(index, joined, said, first=True))
        return self._head | {"choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        role = {"delta": {"role": "assistant", "content": ""}}
        opened = [self._choice(index, Update(0, [], [], [], "", None), role, first=True) for index in range(len(self._requests))]
        return [self._chunk([choice]) for choice in opened] if self._chat else []

    def chunk(self, part: Part) -> dict[str, Any] | None:
        """That of a part, which has been taken; None where there is nothing to say."""
        update = part.update
        tokens = update.tokens and (self._asked.log_probs is not None or self._asked.return_token_ids)
        if not (update.text or tokens or update.finish_reason):
            return None
        said = {"delta": {"content": update.text} if update.text else {}} if self._chat else {"text": update.text}
        first = not self._chat and self._updates[part.index][0] is update
        return self._chunk([self._choice(part.index, update, said, first=first)])

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after all others."""
        return [self._chunk([]) | {"usage": self._usage()}] if self._asked.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self._chat else {}
        return self._head | kind | {"choices": choices} | ({"usage": None} if self._asked.include_usage else {})

    def _choice(self, index: int, update: Update, said: dict[str, Any], *, first: bool) -> dict[str, Any]:
        reason, detail = _FINISH[update.finish_reason] if update.finish_reason else (None, None)
        choice = {"index": index, **said, "logprobs": self._log_probs(index, update), "finish_reason": reason}
        if detail:
            choice["finish_detail"] = detail
        if self._asked.return_token_ids:
            choice |= {"prompt_token_ids": list(self._requests[index].prompt)} if first else {}
            choice["token_ids"] = update.tokens
        return choice

    def _log_probs(self, index: int, update: Update) -> dict[str, Any] | None:
        if self._asked.log_probs is None:
            return None
        texts = [self._spell(token) for token in update.tokens]
        tops = [[(self._spell(token), value) for token, value in top] for top in update.top]
        if self._chat:
            content = [
                _entry(text, value) | {"top_logprobs": [_entry(*pair) for pair in top]}
                for text, value, top in zip(texts, update.log_probs, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for text in texts:
            offsets.append(self._characters[index])
            self._characters[index] += len(text)
        # Tokens of one spelling are one entry here: the likelier one's, which comes first.
        top = [dict(reversed(pairs)) for pairs in tops]
        return {"tokens": texts, "token_logprobs": update.log_probs, "top_logprobs": top, "text_offset": offsets}

    def _usage(self) -> dict[str, Any]:
        """Of the n choices of a prompt, one has read it."""
        firsts = range(0, len(self._requests), self._asked.n)
        read = sum(len(self._requests[index].prompt) for index in firsts)
        told = sum(len(update.tokens) for updates in self._updates for update in updates)
        usage: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": told, "total_tokens": read + told}
        cached = [self._cached[index] for index in firsts]
        if None not in cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
        return usage


def _entry(text: str, value: float) -> dict[str, Any]:
    """bytes: None for a part of a character, whose bytes its text does not show."""
    return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
