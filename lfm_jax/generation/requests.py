"""What is asked of an engine, what it tells, and an answer while it grows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lfm_jax.generation.loops import LoopConfig, LoopDetector
from lfm_jax.generation.sampling import SamplingConfig
from lfm_jax.generation.slots import Chosen
from lfm_jax.generation.text import TextStream

FinishReason = Literal["stop", "length", "loop", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    prompt: token ids, at least one.
    stop_ids: the answer ends with the first of these, which is its last token.
    stop_strings: its text ends where the first of these to be complete begins, its tokens with the one that completes it.
    loop: it ends where it has come to loop; None: it may.
    top_log_probs: how many of the most likely tokens are told beside each that was chosen.
    drawn: it is also told under which distribution each token was drawn, for a trainer that must compute the same.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    loop: LoopConfig | None = None
    top_log_probs: int = 0
    drawn: bool = False


class Update(NamedTuple):
    """What is new of an answer.

    tokens, log_probs: the chosen ones, and how likely the model held each (before penalty, temperature and truncation).
    top: for each, the most likely tokens and their log-probabilities, as many as were asked for.
    text: what is sure of it; "" without a tokenizer. finish_reason: None while it goes on.
    drawn_log_probs: of each token under the distribution it was drawn from: after temperature and truncation, over the ids of
      the tokenizer. At temperature 0 that at temperature `greedy_as` without truncation: the distribution that was drawn from
      would have one token and no gradient, so that reinforcement learning has none of greedy answers. Empty if not asked for.
    kept: the tokens that top_k, top_p and min_p had left to draw from, [tokens, ceil(vocab / 32)] uint32: bit i of word w, from
      the lowest, is id 32 w + i. None if not asked for, or without truncation.
    routing: the experts that tokens went to, of the prompt with the first update, and then of the token before each that is new,
      [tokens, moe layers, top_k] int16: the last token of an answer goes nowhere. None unless the engine is to tell it.
    """

    request: int
    tokens: list[int]
    log_probs: list[float]
    top: list[list[tuple[int, float]]]
    text: str
    finish_reason: FinishReason | None
    drawn_log_probs: Sequence[float] = ()
    kept: np.ndarray | None = None
    routing: np.ndarray | None = None


class Completion(NamedTuple):
    """A whole answer; fields as in `Update`. The tokens of a stop string are there, its text is not. routing: of the prompt and
    of all tokens but the last."""

    tokens: list[int]
    log_probs: list[float]
    top: list[list[tuple[int, float]]]
    text: str
    finish_reason: FinishReason
    drawn_log_probs: Sequence[float] = ()
    kept: np.ndarray | None = None
    routing: np.ndarray | None = None


class Answer:
    """A request in its slot. routing: of its prompt, then of all tokens that the model reads for it; empty if it is not told."""

    def __init__(
        self, number: int, request: Request, decode: Callable[[Sequence[int]], str] | None, routing: np.ndarray | None = None
    ):
        self.number, self.request = number, request
        self.tokens: list[int] = []
        self.routing = [] if routing is None else [routing]
        self._stream = None if decode is None else TextStream(decode, request.stop_strings)
        self._detector = None if request.loop is None else LoopDetector(request.loop)

    def take(self, chosen: Chosen) -> Update:
        """The next tokens of this request, [steps], -1 behind the last."""
        request, tokens = self.request, [int(token) for token in chosen.tokens if token >= 0]
        if chosen.routing is not None:
            self.routing.append(chosen.routing[: len(tokens)])
        reason = None
        if self._detector is not None:
            looped = next((index for index, token in enumerate(tokens, 1) if self._detector.push(token)), None)
            if looped is not None:
                tokens, reason = tokens[:looped], "loop"
        if tokens and tokens[-1] in request.stop_ids:
            reason = "stop"
        elif len(self.tokens) + len(tokens) == request.sampling.max_new_tokens:
            reason = reason or "length"
        text = ""
        if self._stream is not None:
            text = self._stream.push([token for token in tokens if token not in request.stop_ids])
            if self._stream.stopped:
                tokens, reason = tokens[: self._stream.stopped - len(self.tokens)], "stop"
            text += self._stream.finish() if reason else ""
        self.tokens += tokens
        count = request.top_log_probs
        top = [
            [(int(index), float(value)) for index, value in zip(ids[:count], values[:count], strict=True)]
            for ids, values in zip(chosen.top_ids[: len(tokens)], chosen.top_log_probs[: len(tokens)], strict=True)
        ]
        floats = lambda values: [float(value) for value in values[: len(tokens)]]
        drawn = floats(chosen.drawn_log_probs) if request.drawn else []
        kept = chosen.kept[: len(tokens)] if request.drawn and request.sampling.truncates else None
        routing = self.routing[-1] if self.routing else None
        if chosen.routing is not None:
            routing = routing[: len(tokens)]
        return Update(self.number, tokens, floats(chosen.log_probs), top, text, reason, drawn, kept, routing)


def cancelled(number: int) -> Update:
    """The last update of a request that is not answered any further."""
    return Update(number, [], [], [], "", "cancelled")


def joined(updates: Sequence[Update]) -> Completion:
    """All of an answer from its updates."""
    every = lambda field: [item for update in updates for item in getattr(update, field)]
    text = "".join(update.text for update in updates)
    kept, routing = (
        [getattr(update, field) for update in updates if getattr(update, field) is not None] for field in ("kept", "routing")
    )
    return Completion(
        every("tokens"), every("log_probs"), every("top"), text, updates[-1].finish_reason, every("drawn_log_probs"),
        np.concatenate(kept) if kept else None, np.concatenate(routing) if routing else None,
    )  # fmt: skip
