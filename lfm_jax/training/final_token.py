"""Final-token preference optimisation: at one position, tokens that may stand there against the one that begins a doom loop."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lfm_jax.models import Decoder, FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import constrain, in_sequence
from lfm_jax.training.objective import Batch, Objective, Sums
from lfm_jax.training.preference import PairLosses, at_least_float32, masked
from lfm_jax.training.state import parameter_shardings, replicated


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalTokenConfig:
    """FTPO, the loss of Liquid AI's antidoom (2026), with its settings. That code could not be read here: formula and settings
    are those of an adaptation of it (ttracx/thoxa-antidoom, reference_ftpo_trainer.py and configs/default.yaml).

    margin: in logits; a chosen token that leads the rejected one by so much has no more loss (clip_epsilon_logits).
    temperature: of the softplus; 1 there, and no setting (tau).
    tether: weight of the squared change of the logits of all other tokens (lambda_mse).
    target_tether, tolerance: weight of the squared change of the chosen and rejected tokens' logits beyond the tolerance
      (lambda_mse_target, tau_mse_target).
    """

    margin: float = 2.0
    temperature: float = 1.0
    tether: float = 0.4
    target_tether: float = 0.05
    tolerance: float = 0.5

    def __post_init__(self):
        if min(self.margin, self.temperature) <= 0:
            raise ValueError(f"margin and temperature must be positive, got {self.margin} and {self.temperature}")
        if min(self.tether, self.target_tether, self.tolerance) < 0:
            raise ValueError(
                "tether, target_tether and tolerance must not be negative, got "
                f"{self.tether}, {self.target_tether} and {self.tolerance}"
            )


def final_token_losses(
    config: FinalTokenConfig,
    logits: jax.Array,
    reference_logits: jax.Array,
    chosen: jax.Array,
    chosen_mask: jax.Array,
    rejected: jax.Array,
) -> PairLosses:
    """FTPO's loss of each position: the mean over its chosen tokens of w softplus((margin - d) / temperature), where d is by how
    much the token's logit is above the rejected token's and w = clip((margin - d) / margin, 0, 1), and the two tethers.

    So a position counts the same however many tokens are chosen there. w has a gradient as well. The tethers are means over the
    logits of a position and then over positions, where the original has means over the logits of a batch, which do not add up:
    the same where all positions have as many chosen tokens.

    Args:
      logits, reference_logits: at the position, [pairs, vocab]; no gradient goes to the reference's.
      chosen: token ids, [pairs, choices]; chosen_mask: [pairs, choices], 1, or 0 for padding. A position without any is padding.
      rejected: token ids, [pairs].
    Returns:
      metrics: `chosen_win`, the share of chosen tokens above the rejected one, which the original stops at 0.4; `satisfied`, of
      those above it by the margin; `lead`, the mean of d; `change` and `target_change`, the mean squared change of the other
      logits and, beyond the tolerance, of the chosen and rejected tokens'; `rejected_probability`, `chosen_probability`, of the
      rejected and of all chosen tokens together.
    """
    logits, reference = at_least_float32(logits), jax.lax.stop_gradient(at_least_float32(reference_logits))
    is_chosen = chosen_mask.astype(bool)
    choices = jnp.sum(is_chosen, axis=1, dtype=logits.dtype)
    mean = lambda values: jnp.sum(masked(values, is_chosen), axis=1, dtype=logits.dtype) / jnp.maximum(choices, 1)
    lead = jnp.take_along_axis(logits, chosen, axis=1) - jnp.take_along_axis(logits, rejected[:, None], axis=1)
    missing = config.margin - lead
    preference = mean(jnp.clip(missing / config.margin, 0, 1) * jax.nn.softplus(missing / config.temperature))
    rows = jnp.arange(len(rejected))
    alternative = jnp.zeros(logits.shape, bool).at[rows[:, None], chosen].max(is_chosen)
    target = alternative.at[rows, rejected].set(True)
    change = logits - reference
    others = jnp.mean(jnp.square(change), axis=1, where=~target)
    targets = jnp.mean(jnp.square(jnp.maximum(jnp.abs(change) - config.tolerance, 0)), axis=1, where=target)
    loss = preference + config.tether * others + config.target_tether * targets
    probabilities = jax.nn.softmax(logits)
    metrics = {
        "chosen_win": mean(lead > 0), "satisfied": mean(lead >= config.margin), "lead": mean(lead), "change": others,
        "target_change": targets, "rejected_probability": probabilities[rows, rejected],
        "chosen_probability": jnp.sum(probabilities, axis=1, where=alternative),
    }  # fmt: skip
    real = choices > 0
    metrics = {name: jnp.where(real, jax.lax.stop_gradient(value), 0) for name, value in metrics.items()}
    return PairLosses(jnp.where(real, loss, 0), real.astype(loss.dtype), metrics)


def final_token_objective(config: FinalTokenConfig) -> Objective:
    """The loss of positions, see `final_token_losses`, whose sums it returns: its weight is the number of rows with a position.

    A row of the batch is a text up to the position. loss_mask, [rows, seq], is 1 there and 0 elsewhere, and the target there is
    the rejected token. With them come chosen, [rows, choices] int32, filled up with -1, and reference_logits, [rows, vocab]
    float32, of the model that training begins with. The policy's logits are computed at the position alone. `place_batch` deals
    all of these as it does sequences, so on a mesh with `context` choices and vocab must divide as sequences do.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        logits, router_counts = _logits_there(model, batch)
        whole = lambda name: in_sequence(constrain(batch[name], ("batch", None)))
        chosen = whole("chosen")
        rejected = jnp.sum(jnp.where(batch["loss_mask"] > 0, batch["targets"], 0), axis=1)
        # Tokens are picked out of a whole vocabulary: out of one that is split XLA's partitioner for TPUs aborts (docs/log.md).
        logits = constrain(logits, ("batch", None))
        found = final_token_losses(config, logits, whole("reference_logits"), jnp.maximum(chosen, 0), chosen >= 0, rejected)
        sums = found.sums(router_counts)
        return sums._replace(counts={"pairs": sums.weight, "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)})

    return objective


def make_final_token_logits_step(functions: FunctionalModel, mesh: Mesh) -> Callable[[Tree, Tree, Batch], jax.Array]:
    """The jitted (params, buffers, batch) -> logits at each row's position, [rows, vocab] float32, of all hosts' rows on each."""
    whole = parameter_shardings(functions, mesh)

    def step(params: Tree, buffers: Tree, batch: Batch) -> jax.Array:
        params = jax.lax.with_sharding_constraint(functions.cast(params), whole)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _logits_there(functions.bind(params, buffers), batch)[0]

    return jax.jit(step, out_shardings=replicated(mesh))


def _logits_there(model: Decoder, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """[rows, vocab] float32; and how often experts were chosen."""
    output = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    # A masked sum, not a gather: the sequence may be split over devices, and in another order.
    there = jnp.sum(output.hidden, axis=1, keepdims=True, where=batch["loss_mask"][..., None] > 0)
    return constrain(model.logits(there)[:, 0], ("batch", "vocab")), output.router_counts
