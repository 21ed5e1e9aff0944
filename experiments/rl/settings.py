"""The settings of reinforcement learning: environments, rollouts, rewards, advantages, what is watched and what is measured."""

import dataclasses
from typing import Literal

from lfm_jax.generation import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentsConfig:
    """What is practised.

    names: tasks of the registry (gsm8k:PATH and reasoning_gym:NAME among them), "shop", or trl:MODULE:CLASS:ROWS, a class for
      TRL's `environment_factory` and a file of JSON lines, its rows; see `experiments.rl.environments`.
    weights: shares of the prompts; difficulties: that each begins with; adaptive: whether it then follows the `CurriculumConfig`.
      One for each name, or none: all alike, difficulty 1, and fixed.
    max_turns: of an episode with tools, at most.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    difficulties: tuple[int, ...] = ()
    adaptive: tuple[bool, ...] = ()
    max_turns: int = 16

    def __post_init__(self):
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be of one environment or more, each once, got {', '.join(self.names) or 'none'}")
        for field in ("weights", "difficulties", "adaptive"):
            if len(getattr(self, field)) not in (0, len(self.names)):
                raise ValueError(f"{field} has {len(getattr(self, field))} values for {len(self.names)} names; give one for each")
        if not all(weight > 0 for weight in self.weights):
            raise ValueError(f"weights must be positive, got {self.weights}")
        if self.max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {self.max_turns}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """When the difficulty of an adaptive environment changes, by one, and what is called cold.

    window: batches over whose mean of "correct" it is decided; after a change the next window begins. raise_above, lower_below:
      the means from where on it does.
    cold_after: batches in a row without one answer that is right at all, after which an environment is cold: there is nothing to
      learn from. Then as many samples as `probe_samples` of each of `probe_prompts` problems tell rare from absent.
    """

    window: int = 8
    raise_above: float = 0.8
    lower_below: float = 0.2
    cold_after: int = 16
    probe_prompts: int = 4
    probe_samples: int = 64

    def __post_init__(self):
        for field in ("window", "cold_after", "probe_prompts", "probe_samples"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 <= self.lower_below < self.raise_above <= 1:
            raise ValueError(
                f"lower_below must be from 0 on and below raise_above, which is at most 1, got {self.lower_below} and "
                f"{self.raise_above}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutsConfig:
    """The answers of a batch, and how often it is learnt from.

    prompts: of a batch, over all hosts. temperatures: (temperature, how many of a prompt's answers are drawn at it), ...; at 0
      there is one, the greedy answer.
    greedy_as: the temperature that the greedy answer is learnt from as if drawn at. At 1 all its tokens are made less likely
      when it is worse than the others, as it is when it loops, and the entropy rises; at a low one the sure tokens have
      next to no gradient (docs/log.md, 2026-11-26).
    top_p, top_k, min_p: see `SamplingConfig`; which tokens they kept is replayed when the answers are learnt from.
    max_new_tokens: of an answer, or of a turn of an episode. seq_len: the longest row: prompt, answers and what tools say.
    buckets: rows of a batch are padded to seq_len, its half, its quarter, ...: one of so many lengths, each a program.
    stop_at_loop: an answer ends where it has come to loop (`lfm_jax.generation.loops.INNER`).
    chat_format: as in `ConversationSources`.
    extra_rounds: so often are prompts whose answers all have the same reward replaced by others (dynamic sampling: DAPO, Yu et
      al. 2025, section 3.2); those that are left then are taken as they are.
    epochs: how often each answer is learnt from. mini_batches: updates in an epoch.
    lag: 1: the answers to the next batch are made by the parameters that this batch began with, while it is learnt from.
    keep: of so many of the last batches all is kept in rollouts/, besides what checkpoints need; None: of all.
    """

    prompts: int = 32
    temperatures: tuple[tuple[float, int], ...] = ((1.0, 8),)
    greedy_as: float = 0.2
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    seq_len: int = 512
    buckets: int = 3
    stop_at_loop: bool = False
    chat_format: str = "auto"
    extra_rounds: int = 0
    epochs: int = 1
    mini_batches: int = 1
    lag: Literal[0, 1] = 0
    keep: int | None = 16

    def __post_init__(self):
        for field in ("prompts", "buckets", "epochs", "mini_batches"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.answers < 2 or not all(count > 0 for _, count in self.temperatures):
            raise ValueError(f"temperatures must give each prompt 2 answers or more to compare, got {self.temperatures}")
        if sum(count for temperature, count in self.temperatures if temperature == 0) > 1:
            raise ValueError(f"temperatures must have one answer at 0, as all would be the same, got {self.temperatures}")
        if not self.max_new_tokens < self.seq_len:
            raise ValueError(
                f"seq_len must be above max_new_tokens {self.max_new_tokens}, or no prompt has room, got {self.seq_len}"
            )
        if self.prompts % self.mini_batches:
            raise ValueError(f"prompts {self.prompts} do not divide into {self.mini_batches} mini_batches of whole groups")
        if self.extra_rounds < 0 or (self.keep is not None and self.keep < 0):
            raise ValueError(f"extra_rounds and keep must not be negative, got {self.extra_rounds} and {self.keep}")
        for temperature, _ in self.temperatures:
            self.sampling(temperature, self.max_new_tokens, 0)  # refuses

    @property
    def answers(self) -> int:
        """To each prompt."""
        return sum(count for _, count in self.temperatures)

    @property
    def each_temperature(self) -> list[float]:
        """Of each answer to a prompt."""
        return [temperature for temperature, count in self.temperatures for _ in range(count)]

    @property
    def filtered(self) -> bool:
        """Whether not every token can be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def sampling(self, temperature: float, max_new_tokens: int, seed: int) -> SamplingConfig:
        """How an answer is drawn; nothing else, such as a model's generation_config, has a say in it."""
        filters = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p} if temperature else {"top_p": 1.0}
        return SamplingConfig(
            temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, greedy_as=self.greedy_as, **filters
        )

    @property
    def updates(self) -> int:
        """For each batch of rollouts."""
        return self.epochs * self.mini_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """What an answer is worth: the sum of these, each of which is recorded.

    correct: weight of the part of that name. other_parts: weight of the mean of the others that apply, such as the format.
    ngram: n of the two penalties for repeating n-grams of token ids (`lfm_jax.generation.repetition`). ngram_penalty: for an
      answer that is nothing else, 0 or less. ngram_token_penalty: at each token that repeats; its discounted sum to the end
      (ngram_discount) is added to the token's own advantage.
    overlong_buffer: over so many tokens before max_new_tokens the reward falls by 1 (`overlong_penalty`); None: it does not.
    loop_penalty: for an answer that ends in a loop, 0 or less.
    """

    correct: float = 1.0
    other_parts: float = 0.0
    ngram: int = 10
    ngram_penalty: float = 0.0
    ngram_token_penalty: float = 0.0
    ngram_discount: float = 1.0
    overlong_buffer: int | None = None
    loop_penalty: float = 0.0

    def __post_init__(self):
        for field in ("ngram_penalty", "ngram_token_penalty", "loop_penalty"):
            if getattr(self, field) > 0:
                raise ValueError(f"{field} must be 0 or less, got {getattr(self, field)}: what is added would be a prize")
        if self.ngram < 1 or not 0 <= self.ngram_discount <= 1:
            raise ValueError(f"ngram must be 1 or more and ngram_discount from 0 to 1, got {self.ngram}, {self.ngram_discount}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantagesConfig:
    """scale, leave_one_out: see `group_advantages`. mask_truncated: answers that the limit cut off teach nothing (DAPO's overlong
    filtering), but for those that end in a loop: what is wrong with them is not the limit."""

    scale: Literal["group", "batch", "none"] = "group"
    leave_one_out: bool = False
    mask_truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """problems: of each environment, held out. difficulties: in turn; none: that which the environment begins with.
    temperatures: one answer at each; none: greedy and those of the rollouts."""

    problems: int = 64
    difficulties: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = ()

    def __post_init__(self):
        if self.problems < 1:
            raise ValueError(f"problems must be at least 1, got {self.problems}")
