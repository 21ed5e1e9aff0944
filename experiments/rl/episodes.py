"""Episodes that a policy plays: every token that it drew stays as it was drawn, and what tools say is put behind it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.conversations import Conversation
from data_pipelines.tasks import Environment, Problem
from experiments.answering import NGRAM, Answerer
from experiments.rl.settings import RolloutsConfig
from lfm_jax.generation import Completion, LoopConfig, Request
from lfm_jax.generation.loops import classify
from lfm_jax.generation.repetition import repeated_share

# Stands for what the policy said where only what follows it is to be rendered: one token, whatever it was.
_SAID = {"role": "assistant", "content": "a"}
_ENDINGS = ("tail_loop", "inner_loop", "limit", "ended")  # the worst first


def answer_seed(*numbers: int | str) -> int:
    """Of draws: the same for the same numbers (run, batch, round, prompt, answer, turn), whatever else is asked. 32 bits."""
    return int.from_bytes(hashlib.blake2b(json.dumps(numbers).encode(), digest_size=4).digest(), "little")


class Episode:
    """One answer, or one episode of several turns, token by token.

    Attributes:
      token_ids: all behind the prompt, those of tools and of turns' beginnings as well; drawn: whether the policy drew each.
      log_probs, kept: of the drawn ones, see `Completion.drawn_log_probs` and `.kept`.
      routing: of the prompt and of all but the last, as they were first read, see `Completion.routing`; None if it is not told.
      messages: what was said, by both sides. truncated: it was cut off by a limit. over: nothing follows.
    """

    def __init__(
        self, environment: Environment, problem: Problem, prompt: Sequence[int], temperature: float, seed: Sequence[int | str]
    ):
        self.environment, self.problem, self.temperature = environment, problem, temperature
        self.prompt = tuple(prompt)
        self.token_ids: list[int] = []
        self.drawn: list[bool] = []
        self.log_probs: list[float] = []
        self.kept: list[np.ndarray] = []
        self.routing: np.ndarray | None = None
        self.messages: list[dict[str, Any]] = []
        self.finish_reason = ""
        self.truncated = self.over = False
        self._seed, self._turns = tuple(seed), []

    @property
    def turns(self) -> list[int]:
        """The tokens that were drawn in each."""
        return [len(turn) for turn, _ in self._turns]

    def request(self, answerer: Answerer, rollouts: RolloutsConfig) -> Request:
        """What the policy is asked for next."""
        ids = (*self.prompt, *self.token_ids)
        limit = min(rollouts.max_new_tokens, rollouts.seq_len - len(ids))
        sampling = rollouts.sampling(self.temperature, limit, answer_seed(*self._seed, len(self._turns)))
        return answerer.request(ids, sampling, drawn=True, loop=LoopConfig() if rollouts.stop_at_loop else None)

    def take(self, completion: Completion, answerer: Answerer) -> list[dict[str, Any]]:
        """A turn of the policy. Returns the messages that answer it; none where the episode is over."""
        self._turns.append((completion.tokens, completion.finish_reason))
        self.token_ids += completion.tokens
        self.drawn += [True] * len(completion.tokens)
        self.log_probs += completion.drawn_log_probs
        self.kept += [] if completion.kept is None else list(completion.kept)
        if completion.routing is not None:
            read = [] if self.routing is None else [self.routing]
            self.routing = np.concatenate([*read, completion.routing[sum(map(len, read)) :]])
        self.finish_reason = completion.finish_reason
        text = answerer.text(completion.tokens)
        self.messages.append({"role": "assistant", "content": text})
        step = self.environment.step(text)
        self.truncated = completion.finish_reason == "length"
        # A turn that was cut off is not answered: there was no end to answer to.
        self.over = step.done or completion.finish_reason != "stop"
        return [] if self.over else step.messages

    def go_on(self, messages: list[dict[str, Any]], ids: Sequence[int], seq_len: int) -> None:
        """Puts the messages behind what was said, by these ids; without room for them and a token more it is over."""
        if len(self.prompt) + len(self.token_ids) + len(ids) >= seq_len:
            self.truncated = self.over = True
            return
        self.messages += messages
        self.token_ids += ids
        self.drawn += [False] * len(ids)

    def told(self) -> dict[str, Any]:
        """What became of it, in plain values of JSON; see `Answerer.told`."""
        endings = {classify(tokens, reason) for tokens, reason in self._turns} | ({"limit"} if self.truncated else set())
        ids, drawn = np.array([self.token_ids]), np.array([self.drawn])
        return {
            "temperature": self.temperature, "messages": self.messages, "token_ids": self.token_ids,
            "drawn": [int(each) for each in self.drawn], "tokens": int(np.sum(self.drawn)), "turns": len(self._turns),
            "finish_reason": self.finish_reason, "truncated": self.truncated,
            "ending": next(ending for ending in _ENDINGS if ending in endings),
            "repetition": float(repeated_share(ids, drawn, NGRAM)[0]), "parts": self.environment.score(),
        }  # fmt: skip


def play(episodes: Sequence[Episode], answerer: Answerer, rollouts: RolloutsConfig) -> None:
    """All episodes to their ends, a turn of each at a time."""
    active = list(episodes)
    while active:
        completions = answerer.engine.run([episode.request(answerer, rollouts) for episode in active])
        answered = [(each, each.take(found, answerer)) for each, found in zip(active, completions, strict=True)]
        going = [(episode, messages) for episode, messages in answered if not episode.over]
        follows = following(answerer, [(episode.problem, episode.prompt, messages) for episode, messages in going])
        for (episode, messages), ids in zip(going, follows, strict=True):
            episode.go_on(messages, ids, rollouts.seq_len)
        active = [episode for episode, _ in going if not episode.over]


def following(
    answerer: Answerer, answered: Sequence[tuple[Problem, Sequence[int], list[dict[str, Any]]]]
) -> list[list[int]]:
    """The ids behind the symbol that ended a turn: what is left of that turn, the messages, and the next turn's beginning.

    They are those of a conversation in which the policy said something else: the symbols around a text part it from all others,
    so that they are the same whatever was said, and what was said is not made into ids again.

    Args:
      answered: (problem, ids of its prompt, messages) of each.
    Raises:
      ValueError: the template writes the prompt otherwise once there is an answer, or ends turns with no symbol.
    """
    conversations = [
        Conversation([*problem.messages, _SAID, *messages], problem.tools or ()) for problem, _, messages in answered
    ]
    found = []
    for (_, prompt, _), ids in zip(answered, answerer.encoder.prompts(conversations) if conversations else [], strict=True):
        behind = ids.tolist()[len(prompt) :]
        end = next((place for place, token in enumerate(behind) if token in answerer.stop_ids), None)
        if tuple(ids[: len(prompt)].tolist()) != tuple(prompt) or end is None:
            raise ValueError(
                "the chat format writes what stands before an answer otherwise once it is there, or ends it with no symbol: no "
                "episode of several turns can be learnt from with it; take another rollouts.chat_format"
            )
        found.append(behind[end + 1 :])
    return found
