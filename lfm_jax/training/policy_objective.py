"""Answers that a policy drew as a batch: the objective of reinforcement learning, and their log-probabilities."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lfm_jax.models import Decoder, FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import constrain, in_sequence
from lfm_jax.training.cross_entropy import LogProbs, drawn_log_probs
from lfm_jax.training.objective import Batch, Objective, Sums
from lfm_jax.training.policy_gradient import PolicyGradientConfig, Rollouts, policy_gradient_sums
from lfm_jax.training.state import parameter_shardings, replicated


def policy_objective(config: PolicyGradientConfig, *, block: int, known: int | None) -> Objective:
    """The loss of answers that a policy drew, see `policy_gradient_sums`.

    The batch has one answer a row, behind its prompt. Beside the usual arrays, of which `loss_mask` is 1 where the target is a
    token that the policy drew and that counts, it has, where the target stands:

      advantages, sampler_log_probs: [rows, seq] float32; the latter as `Completion.drawn_log_probs` tells them.
      temperature: [rows] float32, of the sampler; 0, which is greedy, counts as 1.
      kept: [rows, seq, words] uint32, optional: `Completion.kept`; zeros where every token could be drawn.
      old_log_probs, reference_log_probs: [rows, seq] float32, optional, see `Rollouts`.

    Where loss_mask is 0 any of these may be anything. The figures of a step: `ratio`, `clipped_low`, `clipped_high`,
    `sampler_gap`, `sampler_kl`, `entropy`, with a reference `kl`: means over the tokens; `ratio_min`, `ratio_max`,
    `sampler_gap_max`; and how many `tokens` and `sequences` count.

    Args:
      block: tokens whose logits exist at one time, on each device.
      known: the tokenizer's ids, which the sampler draws from; None: all rows of the vocabulary.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        found, router_counts = _of_answers(model, batch, block, known)
        optional = (batch.get(name) for name in ("old_log_probs", "reference_log_probs"))
        rollouts = Rollouts(batch["advantages"], batch["loss_mask"], batch["sampler_log_probs"], *optional)
        sums = policy_gradient_sums(config, found.of_targets, rollouts, found.entropy)
        counts = {name: sums.metrics[name] for name in ("tokens", "sequences")}
        means = {name: value for name, value in sums.metrics.items() if name not in counts}
        return Sums(
            sums.loss, sums.weight, means, router_counts, of=counts["tokens"], counts=counts, lowest=sums.lowest,
            highest=sums.highest,
        )  # fmt: skip

    return objective


def make_policy_log_probs_step(
    functions: FunctionalModel, mesh: Mesh, *, block: int, known: int | None
) -> Callable[[Tree, Tree, Batch], jax.Array]:
    """The jitted (params, buffers, batch of answers) -> log pi of each target under the sampler's temperature and truncation.

    For old_log_probs and reference_log_probs: [rows, seq] float32, of all hosts' rows on every host, in the order of the sequence
    on every mesh. Of the batch it reads tokens, targets, segment_ids, positions, temperature and kept.
    """
    whole = parameter_shardings(functions, mesh)

    def step(params: Tree, buffers: Tree, batch: Batch) -> jax.Array:
        params = jax.lax.with_sharding_constraint(functions.cast(params), whole)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found, _ = _of_answers(functions.bind(params, buffers), batch, block, known)
            return in_sequence(constrain(found.of_targets, ("batch", None)))

    return jax.jit(step, out_shardings=replicated(mesh))


def _of_answers(model: Decoder, batch: Batch, block: int, known: int | None) -> tuple[LogProbs, jax.Array | None]:
    """Log-probabilities and entropies of all positions, and how often experts were chosen."""
    output = model(batch["tokens"], batch["segment_ids"], batch["positions"])
    found = drawn_log_probs(
        output.hidden, model.head, batch["targets"], batch["temperature"], batch.get("kept"), known=known, block=block
    )
    return found, output.router_counts
