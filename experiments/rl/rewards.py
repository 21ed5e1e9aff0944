"""What answers are worth, and how much better than those beside them: numbers on the host, all of them recorded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.rl.settings import AdvantagesConfig, RewardsConfig
from lfm_jax.generation.repetition import ngram_penalty, token_penalty
from lfm_jax.training import group_advantages, overlong_penalty


def rewards_of(config: RewardsConfig, answer: dict[str, Any], turns: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
    """The fields `rewards`, by part, and `reward`, their sum; None where the answer could not be scored.

    Args:
      answer: as `Episode.told` has it. turns: tokens of each; the longest one counts as overlong.
    """
    parts = answer["parts"]
    others = [value for name, value in parts.items() if name != "correct" and value is not None]
    ids, drawn = np.array([answer["token_ids"]]), np.array([answer["drawn"]])
    rewards = {
        "correct": None if parts["correct"] is None else config.correct * parts["correct"],
        "other_parts": config.other_parts * (sum(others) / len(others)) if others else 0.0,
        "ngram": float(ngram_penalty(ids, drawn, config.ngram, config.ngram_penalty)[0]),
        "loop": config.loop_penalty * (answer["ending"] == "tail_loop"),
    }
    if config.overlong_buffer is not None:
        longest = np.float32(max(turns))
        rewards["overlong"] = float(overlong_penalty(longest, max_tokens=max_new_tokens, buffer=config.overlong_buffer))
    scored = rewards["correct"] is not None
    return {"rewards": rewards, "reward": math.fsum(rewards.values()) if scored else None}


def token_advantages(config: RewardsConfig, answer: dict[str, Any]) -> list[float] | None:
    """Of each drawn token the discounted sum of the penalties from it to the end; None where there is no such penalty."""
    if not config.ngram_token_penalty:
        return None
    ids, drawn = np.array([answer["token_ids"]]), np.array([answer["drawn"]])
    penalties = token_penalty(ids, drawn, config.ngram, config.ngram_token_penalty)[0][drawn[0] != 0]
    sums, after = [], 0.0
    for penalty in penalties[::-1].tolist():
        after = penalty + config.ngram_discount * after
        sums.append(after)
    return sums[::-1]


def varied(group: Sequence[dict[str, Any]]) -> bool:
    """Whether there is anything to learn from a group: two answers with different rewards."""
    return len({answer["reward"] for answer in group if answer["reward"] is not None}) > 1


def advantages_of(config: AdvantagesConfig, groups: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """The advantages of the answers to each prompt, from their rewards; of all hosts together, for the scale of a batch."""
    rewards = np.array([[math.nan if reward is None else reward for reward in group] for group in groups], np.float32)
    found = group_advantages(rewards, scale=config.scale, leave_one_out=config.leave_one_out)
    return np.asarray(found.values).tolist()


def counts(config: AdvantagesConfig, answer: dict[str, Any]) -> bool:
    """Whether the answer is learnt from at all, see `AdvantagesConfig.mask_truncated`; one without a score is not."""
    if answer["reward"] is None:
        return False
    return not (config.mask_truncated and answer["truncated"] and answer["ending"] != "tail_loop")
