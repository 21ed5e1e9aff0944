"""A model that answers conversations: prompts and answers as its chat format writes them, and what became of each answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data_pipelines.conversations import Conversation, ConversationEncoder, end_ids
from experiments.conversations import find_template
from experiments.stages import Stage
from lfm_jax.configuration import mistakes_in
from lfm_jax.generation import Completion, Engine, EngineConfig, Request, SamplingConfig
from lfm_jax.generation.loops import classify
from lfm_jax.generation.repetition import repeated_share

NGRAM = 10  # tokens; shorter ones repeat in every table (lfm_jax.generation.repetition)


class Answerer:
    """An engine that is asked in conversations and answers in text.

    Args:
      chat_format: as in `ConversationSources`. mesh: that the stage is on.
    Raises:
      ConfigError: there is no such chat format, or the tokenizer has none of its own.
    """

    def __init__(self, stage: Stage, chat_format: str, settings: EngineConfig, mesh: Mesh):
        self.engine = Engine(stage.functions, stage.config, stage.params, stage.buffers, settings, mesh=mesh)
        with mistakes_in("chat_format"):
            self.encoder = ConversationEncoder(stage.tokenizer, find_template(chat_format, stage.tokenizer_path))
        self._decode, self._symbols = stage.tokenizer.decode, {index: name for name, index in self.encoder.symbols.items()}
        self.stop_ids = end_ids(stage.tokenizer)

    def prompts(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[tuple[int, ...] | str]:
        """What the model is given of each, up to where the assistant's turn begins; or why it cannot be asked.

        That begins with "refused: ", where the chat format does not write it, or "too_long: ", where the context has no room for
        it and an answer of `max_new_tokens`.
        """
        found: list[tuple[int, ...] | str] = []
        for conversation, ids in zip(conversations, self.encoder.each_prompt(conversations), strict=True):
            if isinstance(ids, ValueError):
                found.append(f"refused: {conversation.name}: {ids}")
            elif len(ids) + max_new_tokens > self.engine.context:
                room = f"an answer of {max_new_tokens}, in a context of {self.engine.context}"
                found.append(f"too_long: {conversation.name}: {len(ids)} tokens and {room}")
            else:
                found.append(tuple(ids.tolist()))
        return found

    def request(self, prompt: tuple[int, ...], sampling: SamplingConfig, **options: Any) -> Request:
        """One that ends where the assistant's turn does. options: further fields of `Request`."""
        return Request(prompt=prompt, sampling=sampling, stop_ids=self.stop_ids, **options)

    def text(self, tokens: Sequence[int]) -> str:
        """With the symbols that the model writes, such as those around a call; without what ends its turn."""
        text, run = "", []
        for token in (token for token in tokens if token not in self.stop_ids):
            if token in self._symbols:
                text, run = text + self._decode(run) + self._symbols[token], []
            else:
                run.append(token)
        return text + self._decode(run)

    def told(self, completion: Completion) -> dict[str, Any]:
        """Of an answer its text, tokens, finish_reason, ending (see `classify`) and repetition, the share of its n-grams that
        stood in it before; plain values of JSON."""
        tokens = completion.tokens
        row = np.array(tokens)[None]
        return {
            "text": self.text(tokens), "token_ids": tokens, "log_prob_sum": float(np.sum(completion.log_probs)),
            "tokens": len(tokens), "finish_reason": completion.finish_reason,
            "ending": classify(tokens, completion.finish_reason),
            "repetition": float(repeated_share(row, np.ones_like(row), NGRAM)[0]),
        }  # fmt: skip
