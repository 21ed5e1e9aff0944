"""What is learnt from pairs of answers, one chosen and one rejected: a family of losses of their log-probabilities."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.configuration import nearest
from lfm_jax.training.objective import Sums

Relative = Literal["none", "sigmoid", "hinge", "ipo", "exo", "apo"]
Absolute = Literal["none", "anchor", "apo_zero", "apo_down", "nca", "bco", "sppo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The loss of a pair: relative_weight * f(beta (c - r) - margin) + absolute_weight * g(beta c, beta r) + an SFT term.

    c and r are the log-ratios log pi - log reference of the chosen and the rejected answer, summed over their tokens or, with
    `length_normalized`, the means over them. Below, z = beta (c - r) - margin, C = beta c, R = beta r, s = sigmoid. Values and
    gradients are those of TRL 1.16 (dpo_trainer.py, and CPO's for SimPO) where it has the loss.

    relative: f. "sigmoid": -log s(z) (DPO, Rafailov et al. 2023, eq. 7; with margin and without reference it is SimPO, Meng et
      al. 2024, eq. 6). "hinge": max(0, 1 - z) (SLiC, Zhao et al. 2023). "ipo": ((z - 1/2) / beta)^2 (Azar et al. 2024, eq. 17).
      "exo": KL of (s(z), s(-z)) from (1 - e, e), e the label smoothing (Ji et al. 2024). "apo": s(-z). "none".
    absolute: g. "anchor": -log s(C). "apo_zero": s(-C) + s(R); "apo_down": s(C), which goes with relative "apo" (D'Oosterlinck
      et al. 2024). "nca": -log s(C) - log s(-C) / 2 - log s(-R) / 2 (Chen et al. 2024). "bco": -log s(C) - log s(-R) (Jung et
      al. 2024, without the shift). "sppo": ((C - 1/2) / beta)^2 + ((R + 1/2) / beta)^2 (Wu et al. 2024). "none".
    beta: rewards are beta times log-ratios. Its scale hangs on the length: the gradient of a token's log-probability has the
      factor beta for sums, and beta over the answer's length for means. Sums are trained with 0.1; with means that moves next to
      nothing, and Tulu 3 has 5, SimPO 2 to 10.
    margin: the chosen reward shall be greater by so much; in rewards, SimPO's gamma.
    label_smoothing: share e of pairs taken to be the wrong way round, (1 - e) f(z) + e f(-z) (conservative DPO, Mitchell 2023).
    robust: ((1 - e) f(z) - e f(-z)) / (1 - 2 e) instead, whose mean is that of f without noise (Chowdhury et al. 2024).
    reference_free: c and r are the log-probabilities themselves.
    sft_weight: of the chosen answer's mean -log pi, each answer counting the same (Pang et al. 2024).
    """

    relative: Relative = "sigmoid"
    relative_weight: float = 1.0
    absolute: Absolute = "none"
    absolute_weight: float = 1.0
    length_normalized: bool = True
    beta: float = 5.0
    margin: float = 0.0
    label_smoothing: float = 0.0
    robust: bool = False
    reference_free: bool = False
    sft_weight: float = 0.0

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if min(self.relative_weight, self.absolute_weight, self.sft_weight) < 0:
            raise ValueError(
                "weights must not be negative, got relative_weight "
                f"{self.relative_weight}, absolute_weight {self.absolute_weight}, sft_weight {self.sft_weight}"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and less than 0.5, got {self.label_smoothing}")
        if (self.robust or self.relative == "exo") and self.label_smoothing == 0:
            raise ValueError("robust and exo need a label_smoothing greater than 0, got 0; 0.1 and 0.001 are usual")
        if self.robust and self.relative == "exo":
            raise ValueError("exo has a use of its own for label_smoothing; leave robust out")
        if self.relative == "none" and (self.margin or self.label_smoothing):
            raise ValueError(
                f"margin {self.margin} and label_smoothing {self.label_smoothing} are of the relative term, which is 'none'; "
                "set them to 0, or choose a relative term"
            )
        if self.relative == self.absolute == "none" and not self.sft_weight:
            raise ValueError("relative and absolute are both 'none' and sft_weight is 0: there is nothing to learn; set one")


# Published members of the family, with settings to begin with: those of TRL 1.16 or the paper.
_MEMBERS: dict[str, dict[str, Any]] = {
    "dpo": {"length_normalized": False, "beta": 0.1},
    "dpo_norm": {},
    "simpo": {"reference_free": True, "beta": 2.0, "margin": 1.0},
    "ipo": {"relative": "ipo", "beta": 0.1},
    "hinge": {"relative": "hinge", "length_normalized": False, "beta": 0.1},
    "robust": {"robust": True, "label_smoothing": 0.1, "length_normalized": False, "beta": 0.1},
    "exo": {"relative": "exo", "label_smoothing": 1e-3, "length_normalized": False, "beta": 0.1},
    "apo_zero": {"relative": "none", "absolute": "apo_zero", "length_normalized": False, "beta": 0.1},
    "apo_down": {"relative": "apo", "absolute": "apo_down", "length_normalized": False, "beta": 0.1},
    "nca": {"relative": "none", "absolute": "nca", "length_normalized": False, "beta": 0.1},
    "bco": {"relative": "none", "absolute": "bco", "length_normalized": False, "beta": 0.1},
    "sppo": {"relative": "none", "absolute": "sppo", "length_normalized": False, "beta": 0.1},
    # LFM2's report (2511.23404) has a relative and an absolute term on length-normalised log-ratios. Form and weight of the
    # absolute one could not be confirmed: this is how others have built it.
    "lfm2": {"absolute": "anchor", "absolute_weight": 0.2},
}  # fmt: skip


def preference_member(name: str, **changes: Any) -> PreferenceConfig:
    """A published member of the family by its name, its settings changed by `changes`.

    Raises:
      ValueError: no member has that name, or see `PreferenceConfig`.
    """
    if name not in _MEMBERS:
        raise ValueError(f"no preference loss {name!r}. {nearest(name, _MEMBERS)}")
    return PreferenceConfig(**_MEMBERS[name] | changes)


class Answers(NamedTuple):
    """One answer to each prompt, in rows.

    log_probs: log pi(token) of each token of the answer, [pairs, seq] float32; any value where the mask is 0.
    mask: [pairs, seq], 1 for the answer's tokens, the one that ends it included; 0 for the prompt, for padding, on either side,
      and for what tools wrote.
    reference_log_probs: as log_probs, of the model that training begins with. No gradient goes there.
    """

    log_probs: jax.Array
    mask: jax.Array
    reference_log_probs: jax.Array | None = None


class PairLosses(NamedTuple):
    """Of each pair, so that sums are over pairs wherever these are: in micro-batches, on devices and hosts.

    loss: [pairs]. weight: [pairs], 1, or 0 if one of the two answers has no token: such a pair is padding, and all of it is 0.
    metrics: [pairs] each: `accuracy`, whether the chosen reward is greater; `reward_chosen`, `reward_rejected` and their
      difference `reward_margin`, in the units of beta; `chosen_log_prob`, `rejected_log_prob`, sums over the answer; their
      `_length`; and with a reference `kl`, exp(d) - 1 - d with d = log pi - log reference, the mean over the tokens of both
      answers: an estimate of KL(reference || policy) if the answers are the reference's own (Schulman 2020, k3).
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]

    def sums(self, router_counts: jax.Array | None = None) -> Sums:
        """What an objective returns: the sum of losses over the number of pairs."""
        return Sums(jnp.sum(self.loss), jnp.sum(self.weight), jax.tree.map(jnp.sum, self.metrics), router_counts)


def preference_losses(config: PreferenceConfig, chosen: Answers, rejected: Answers) -> PairLosses:
    """The loss of each pair, in float32 at least. Where policy and reference are equal, relative "sigmoid" alone gives log 2.

    Raises:
      ValueError: the loss needs the reference's log-probabilities, and one of the answers has none.
    """
    if not config.reference_free and (chosen.reference_log_probs is None or rejected.reference_log_probs is None):
        raise ValueError(
            "this loss is of log pi - log reference: give reference_log_probs of both answers, or set reference_free"
        )
    (c, chosen_log_prob, chosen_length), (r, rejected_log_prob, rejected_length) = (
        _score(config, answers) for answers in (chosen, rejected)
    )
    loss = jnp.zeros_like(c)
    if config.relative != "none":
        loss += config.relative_weight * _relative(config, config.beta * (c - r) - config.margin)
    if config.absolute != "none":
        loss += config.absolute_weight * _absolute(config, config.beta * c, config.beta * r)
    if config.sft_weight:
        loss -= config.sft_weight * chosen_log_prob / jnp.maximum(chosen_length, 1)
    reward_chosen, reward_rejected = config.beta * c, config.beta * r
    metrics = {
        "accuracy": (reward_chosen > reward_rejected).astype(c.dtype),
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "reward_margin": reward_chosen - reward_rejected,
        "chosen_log_prob": chosen_log_prob,
        "rejected_log_prob": rejected_log_prob,
        "chosen_length": chosen_length,
        "rejected_length": rejected_length,
    }
    if chosen.reference_log_probs is not None and rejected.reference_log_probs is not None:
        kl = jnp.sum(_divergence(chosen), axis=1) + jnp.sum(_divergence(rejected), axis=1)
        metrics["kl"] = kl / jnp.maximum(chosen_length + rejected_length, 1)
    real = (chosen_length > 0) & (rejected_length > 0)
    metrics = {name: jnp.where(real, jax.lax.stop_gradient(value), 0) for name, value in metrics.items()}
    return PairLosses(jnp.where(real, loss, 0), real.astype(loss.dtype), metrics)


def _score(config: PreferenceConfig, answers: Answers) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[pairs] each: the answer's score, c or r; its log-probability; its length."""
    log_prob = jnp.sum(masked(answers.log_probs, answers.mask), axis=1)
    length = jnp.sum(answers.mask.astype(bool), axis=1, dtype=log_prob.dtype)
    score = log_prob if config.reference_free else jnp.sum(_log_ratios(answers), axis=1)
    return score / jnp.maximum(length, 1) if config.length_normalized else score, log_prob, length


def _log_ratios(answers: Answers) -> jax.Array:
    reference = jax.lax.stop_gradient(masked(answers.reference_log_probs, answers.mask))
    return masked(answers.log_probs, answers.mask) - reference


def _divergence(answers: Answers) -> jax.Array:
    ratios = _log_ratios(answers)
    return jnp.expm1(ratios) - ratios


def _relative(config: PreferenceConfig, z: jax.Array) -> jax.Array:
    smoothing, log_sigmoid = config.label_smoothing, jax.nn.log_sigmoid
    if config.relative == "exo":
        weighed = lambda z, share: jax.nn.sigmoid(z) * (log_sigmoid(z) - jnp.log(share))
        return weighed(z, 1 - smoothing) + weighed(-z, smoothing)
    f = {
        "sigmoid": lambda z: -log_sigmoid(z),
        "hinge": lambda z: jax.nn.relu(1 - z),
        "ipo": lambda z: jnp.square((z - 0.5) / config.beta),
        "apo": lambda z: jax.nn.sigmoid(-z),
    }[config.relative]
    if not smoothing:
        return f(z)
    if config.robust:
        return ((1 - smoothing) * f(z) - smoothing * f(-z)) / (1 - 2 * smoothing)
    return (1 - smoothing) * f(z) + smoothing * f(-z)


def _absolute(config: PreferenceConfig, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid
    return {
        "anchor": lambda: -log_sigmoid(chosen),
        "apo_zero": lambda: sigmoid(-chosen) + sigmoid(rejected),
        "apo_down": lambda: sigmoid(chosen),
        "nca": lambda: -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2,
        "bco": lambda: -log_sigmoid(chosen) - log_sigmoid(-rejected),
        "sppo": lambda: (jnp.square(chosen - 0.5) + jnp.square(rejected + 0.5)) / config.beta**2,
    }[config.absolute]()


def at_least_float32(values: jax.Array) -> jax.Array:
    """The same in float32, or in float64 if it is in that: what losses and sums are in."""
    return values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Values where the mask is 1, else 0. They are chosen and not multiplied: what is masked may be infinite, or no number."""
    return jnp.where(mask.astype(bool), at_least_float32(values), 0)
