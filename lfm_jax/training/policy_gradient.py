"""Reinforcement learning from groups of answers: advantages, and the losses of their tokens as sums."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.configuration import nearest
from lfm_jax.training.preference import at_least_float32, masked

# Beyond e^20 a ratio says no more; at e^88 a float32 ends. verl has the same bound (trainer/ppo/core_algos.py).
_MOST_LOG_RATIO = 20.0


class Advantages(NamedTuple):
    """values: [groups, answers] float32. varied: [groups] bool, whether a group's rewards differ: if not, its values are 0."""

    values: jax.Array
    varied: jax.Array


def group_advantages(
    rewards: jax.Array,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    leave_one_out: bool = False,
    epsilon: float = 1e-4,
) -> Advantages:
    """How much better each answer is than the mean of those to the same prompt.

    A group whose rewards are all equal pushes nothing, yet with `kl_weight` its tokens are pulled towards the reference, and they
    count in the denominators. Dynamic sampling (DAPO, Yu et al. 2025, section 3.2) replaces such groups before the loss.

    Args:
      rewards: [groups, answers], two answers at least. One that could not be scored is NaN: the others are compared without it,
        and its advantage is 0.
      scale: what the differences are divided by: the standard deviation (n - 1) of the "group" (GRPO, Shao et al. 2024, section
        4.1.2) or of the whole "batch" (of all hosts, so pass all of it), plus epsilon; "none" (Dr. GRPO, Liu et al. 2025).
      leave_one_out: compare with the mean of the others (RLOO, Ahmadian et al. 2024), n / (n - 1) times as much.

    Raises:
      ValueError: rewards is not a table with at least two answers to a prompt.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, answers] with at least 2 answers to a prompt, got shape {rewards.shape}")
    rewards = at_least_float32(jnp.asarray(rewards))
    varied = jnp.nanmax(rewards, axis=1) > jnp.nanmin(rewards, axis=1)
    values = rewards - jnp.nanmean(rewards, axis=1, keepdims=True)
    if leave_one_out:
        scored = jnp.sum(~jnp.isnan(rewards), axis=1, keepdims=True, dtype=rewards.dtype)
        values *= scored / (scored - 1)
    if scale == "group":
        values /= jnp.nanstd(rewards, axis=1, ddof=1, keepdims=True) + epsilon
    elif scale == "batch":
        values /= jnp.nanstd(rewards, ddof=1) + epsilon
    # Equal rewards may differ from their mean by a rounding, which the division by epsilon makes large.
    values = jnp.where(varied[:, None] & ~jnp.isnan(rewards), values, 0)
    return Advantages(values, varied)


def overlong_penalty(lengths: jax.Array, *, max_tokens: int, buffer: int) -> jax.Array:
    """What to add to the rewards of answers of so many tokens: 0, going down to -1 over the last `buffer` of `max_tokens`, and -1
    beyond (DAPO, eq. 13).

    Raises:
      ValueError: the buffer is not shorter than the longest answer, or empty.
    """
    if not 0 < buffer < max_tokens:
        raise ValueError(f"buffer must be at least 1 token and less than max_tokens {max_tokens}, got {buffer}")
    return jnp.clip((max_tokens - buffer - lengths) / buffer, -1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """The loss of a token is -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), or CISPO's; w = pi / pi_old, A its advantage.

    Values and gradients are those of TRL 1.16 (grpo_trainer.py) where it has the variant.

    surrogate: "clip" as above (PPO, Schulman et al. 2017, eq. 7), where a clipped token has no gradient; "cispo": -min(w,
      ratio_cap) A log pi with no gradient through the weight (MiniMax-M1, 2025), where every token has one.
    ratio: of each "token"; or one for the "sequence", its tokens' geometric mean (GSPO, Zheng et al. 2025).
    aggregation: "sequence_mean": the mean over a sequence's tokens, then over sequences (GRPO: a token counts by 1 / length, so
      that long wrong answers are punished less). "token_mean": over all tokens of the step (DAPO: by 1 / tokens, each the same).
      "constant": the sum over tokens, over sequences and max_tokens (Dr. GRPO: by 1 / (sequences max_tokens), each the same and
      from step to step as well).
    clip_low, clip_high: of "clip" alone, how far below and above 1 the ratio counts.
    ratio_cap: of "cispo" alone, the largest weight.
    max_tokens: of "constant" alone, the most tokens that an answer can have.
    importance_cap: C of truncated importance sampling: the token's loss is weighed by min(pi_old / pi_sampler, C), where pi_old
      is the trainer's own (Yao et al. 2025; about 2). None: not weighed.
    kl_weight: of the divergence from the reference, exp(d) - 1 - d with d = log reference - log pi (Schulman 2020, k3).
    kl_by_ratio: multiplies it by w, without which its gradient is not that of the divergence (DeepSeek-V3.2, 2025).
    """

    surrogate: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.28
    ratio_cap: float | None = None
    max_tokens: int | None = None
    importance_cap: float | None = None
    kl_weight: float = 0.0
    kl_by_ratio: bool = True

    def __post_init__(self):
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low must be at least 0 and less than 1, clip_high not negative, got {self.clip_low} and {self.clip_high}"
            )
        if (self.ratio_cap is None) == (self.surrogate == "cispo"):
            raise ValueError(f"ratio_cap is of surrogate 'cispo', which needs it; got {self.ratio_cap} with {self.surrogate!r}")
        if (self.max_tokens is None) == (self.aggregation == "constant"):
            raise ValueError(
                f"max_tokens is of aggregation 'constant', which needs it; got {self.max_tokens} with {self.aggregation!r}"
            )
        for field in ("ratio_cap", "max_tokens", "importance_cap"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"{field} must be positive, got {value}")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight must not be negative, got {self.kl_weight}")


_MEMBERS: dict[str, dict[str, Any]] = {
    "grpo": {"aggregation": "sequence_mean", "clip_high": 0.2},
    "dr_grpo": {"aggregation": "constant", "clip_high": 0.2, "max_tokens": 4096},
    "dapo": {},
    # The published range is that of a mean over tokens, whose spread is small (GSPO, section 5.1).
    "gspo": {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"surrogate": "cispo", "ratio_cap": 5.0},
}  # fmt: skip


def policy_gradient_member(name: str, **changes: Any) -> PolicyGradientConfig:
    """A published variant by its name, its settings changed by `changes`. Of advantages, dr_grpo has scale "none".

    Raises:
      ValueError: no variant has that name, or see `PolicyGradientConfig`.
    """
    if name not in _MEMBERS:
        raise ValueError(f"no policy-gradient loss {name!r}. {nearest(name, _MEMBERS)}")
    return PolicyGradientConfig(**_MEMBERS[name] | changes)


class Rollouts(NamedTuple):
    """What is known of a batch of answers besides the policy that is trained. No gradient goes to any of it.

    advantages: [batch], or [batch, seq] for rewards of single tokens.
    mask: [batch, seq], 1 for tokens that the policy itself drew. 0 for the prompt, for what tools wrote, for padding, and for all
      of an answer that is left out, as a truncated one may be: none of these is in a numerator or a denominator.
    sampler_log_probs: [batch, seq], of each token where it was drawn, under the distribution it was drawn from.
    old_log_probs: [batch, seq], of the policy at the batch's first step, computed by the trainer. None: the sampler's are the old
      ones, which holds where sampler and trainer compute the same.
    reference_log_probs: [batch, seq], of the model not to be left; None without a KL term.
    """

    advantages: jax.Array
    mask: jax.Array
    sampler_log_probs: jax.Array
    old_log_probs: jax.Array | None = None
    reference_log_probs: jax.Array | None = None


class PolicySums(NamedTuple):
    """Of a (micro-)batch, scalars: loss, weight and metrics add up over micro-batches, devices and hosts; of the others the
    lowest and the highest counts.

    loss, weight: numerator and denominator of the loss.
    metrics: `tokens`, and sums over them: `clipped_low`, `clipped_high`: tokens that the clip keeps from going on down or up
      (CISPO: that the cap has made less of); `ratio`; `sampler_gap`, |d|, and `sampler_kl`, exp(d) - 1 - d, where d = trainer's -
      sampler's log-probability, with the old one if it is given: at a batch's first step both are 0 if the two compute the same;
      `kl`, with a reference; and other figures, if given. `sequences`, those with a token.
    lowest, highest: `ratio`, and `sampler_gap`, over the tokens; infinite and -infinite without any.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    lowest: dict[str, jax.Array]
    highest: dict[str, jax.Array]


def policy_gradient_sums(
    config: PolicyGradientConfig, log_probs: jax.Array, rollouts: Rollouts, **figures: jax.Array
) -> PolicySums:
    """The loss of the policy whose log-probabilities of the answers' tokens are given, in float32 at least.

    Where policy, old policy and sampler are equal every ratio is 1, and the gradient by a token's log-probability is -A over the
    denominator: that of REINFORCE.

    Args:
      log_probs: [batch, seq], under the sampler's temperature and filters.
      figures: [batch, seq] each, such as the entropy, that are summed up as metrics and nothing else.

    Raises:
      ValueError: a KL term without reference_log_probs; importance_cap without old_log_probs, when all weights would be 1.
    """
    if config.kl_weight and rollouts.reference_log_probs is None:
        raise ValueError(f"kl_weight is {config.kl_weight}, but there are no reference_log_probs; give them, or set it to 0")
    if config.importance_cap is not None and rollouts.old_log_probs is None:
        raise ValueError(
            "importance_cap weighs by old_log_probs over the sampler's, and there are none; compute them, or set it to None"
        )
    real = rollouts.mask.astype(bool)
    log_probs, known = masked(log_probs, real), lambda values: jax.lax.stop_gradient(masked(values, real))
    sampler = known(rollouts.sampler_log_probs)
    old = sampler if rollouts.old_log_probs is None else known(rollouts.old_log_probs)
    advantages = rollouts.advantages if rollouts.advantages.ndim == 2 else rollouts.advantages[:, None]
    advantages = known(jnp.broadcast_to(advantages, real.shape)).astype(log_probs.dtype)
    lengths = jnp.sum(real, axis=1, keepdims=True, dtype=log_probs.dtype)

    log_ratio = _bounded(log_probs - old)
    if config.ratio == "sequence":
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(lengths, 1), real.shape)
    ratio = jnp.exp(log_ratio)
    losses, low, high = _surrogate(config, ratio, advantages, log_probs)
    if config.importance_cap is not None:
        losses *= jnp.minimum(jnp.exp(_bounded(old - sampler)), config.importance_cap)

    gap = (log_probs if rollouts.old_log_probs is None else old) - sampler
    per_token = {
        "tokens": real, "clipped_low": low, "clipped_high": high, "ratio": ratio,
        "sampler_gap": jnp.abs(gap), "sampler_kl": _divergence(gap),
    }  # fmt: skip
    if rollouts.reference_log_probs is not None:
        divergence = _divergence(known(rollouts.reference_log_probs) - log_probs)
        losses += config.kl_weight * divergence * (ratio if config.kl_by_ratio else 1)
        per_token["kl"] = divergence
    per_token |= {name: figure.astype(log_probs.dtype) for name, figure in figures.items()}
    per_token = jax.lax.stop_gradient(per_token)
    metrics = {name: jnp.sum(masked(value, real), dtype=log_probs.dtype) for name, value in per_token.items()}
    metrics["sequences"] = jnp.sum(lengths > 0, dtype=log_probs.dtype)
    extreme = lambda name, start, find: find(jnp.where(real, per_token[name], start))
    return PolicySums(
        *_aggregated(config, jnp.where(real, losses, 0), lengths),
        metrics,
        lowest={"ratio": extreme("ratio", jnp.inf, jnp.min)},
        highest={name: extreme(name, -jnp.inf, jnp.max) for name in ("ratio", "sampler_gap")},
    )


def _surrogate(
    config: PolicyGradientConfig, ratio: jax.Array, advantages: jax.Array, log_probs: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[batch, seq] each: the losses, and which of them are clipped below and above."""
    if config.surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(ratio, config.ratio_cap))
        return -weight * advantages * log_probs, jnp.zeros_like(ratio), (ratio > config.ratio_cap) & (advantages > 0)
    lowest, highest = 1 - config.clip_low, 1 + config.clip_high
    losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, lowest, highest) * advantages)
    return losses, (ratio < lowest) & (advantages < 0), (ratio > highest) & (advantages > 0)


def _aggregated(config: PolicyGradientConfig, losses: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of the loss, from masked losses [batch, seq] and lengths [batch, 1]."""
    if config.aggregation == "token_mean":
        return jnp.sum(losses), jnp.sum(lengths)
    sequences = jnp.sum(lengths > 0, dtype=losses.dtype)
    if config.aggregation == "sequence_mean":
        return jnp.sum(losses / jnp.maximum(lengths, 1)), sequences
    return jnp.sum(losses), sequences * config.max_tokens


def _bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -_MOST_LOG_RATIO, _MOST_LOG_RATIO)


def _divergence(log_ratio: jax.Array) -> jax.Array:
    """exp(d) - 1 - d, whose mean under p for d = log q - log p is KL(p || q)."""
    bounded = _bounded(log_ratio)
    return jnp.expm1(bounded) - bounded
