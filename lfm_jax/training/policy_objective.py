"""Answers that a policy drew as a batch: the objective of reinforcement learning, and their log-probabilities."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lfm_jax.models import Decoder, DecoderOutput, FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import constrain, in_sequence
from lfm_jax.training.cross_entropy import LogProbs, drawn_log_probs
from lfm_jax.training.objective import Batch, Objective, Part, Sums
from lfm_jax.training.policy_gradient import PolicyGradientConfig, Rollouts, policy_gradient_sums
from lfm_jax.training.state import parameter_shardings, replicated


def policy_objective(
    config: PolicyGradientConfig,
    *,
    block: int,
    known: int | None,
    replay_routing: bool = False,
    environments: Sequence[str] = (),
) -> Objective:
    """The loss of answers that a policy drew, see `policy_gradient_sums`.

    The batch has one answer a row, behind its prompt. Beside the usual arrays, of which `loss_mask` is 1 where the target is a
    token that the policy drew and that counts, it has, where the target stands:

      advantages, sampler_log_probs: [rows, seq] float32; the latter as `Completion.drawn_log_probs` tells them.
      temperature: [rows] float32, of the sampler; 0, which is greedy, counts as 1.
      kept: [rows, seq, words] uint32, optional: `Completion.kept`; zeros where every token could be drawn.
      old_log_probs, reference_log_probs: [rows, seq] float32, optional, see `Rollouts`.

    Where loss_mask is 0 any of these may be anything. Where the token stands that goes in, be it of the prompt or drawn:

      routing: [rows, seq, moe layers, top_k], of a mixture of experts: those that the token went to in the sampler, as
        `Completion.routing` tells them; negative for padding.

    And environment: [rows] int32, which of `environments` an answer is of, if there are any.

    The figures of a step: `ratio`, `clipped_low`, `clipped_high`, `sampler_gap`, `sampler_kl`, `entropy`, with a reference `kl`,
    with a routing `routing_equal`: means over the tokens, of all and of each environment; `ratio_min`, `ratio_max`,
    `sampler_gap_max`; and how many `tokens` and `sequences` count. `routing_equal` is the share of blocks whose router chooses
    the experts, in whatever order, that the sampler's has chosen at the place that the token was drawn at.

    Args:
      block: tokens whose logits exist at one time, on each device.
      known: the tokenizer's ids, which the sampler draws from; None: all rows of the vocabulary.
      replay_routing: every token goes to the experts of `routing`, weighed by the present router's scores (R3: Ma et al. 2025,
        arXiv 2510.11370); `routing_equal` and the counts of the router are still of its own choice.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        found, output = _of_answers(model, batch, block, known, batch["routing"] if replay_routing else None)
        optional = (batch.get(name) for name in ("old_log_probs", "reference_log_probs"))
        rollouts = Rollouts(batch["advantages"], batch["loss_mask"], batch["sampler_log_probs"], *optional)
        figures = {"entropy": found.entropy}
        if "routing" in batch:
            figures["routing_equal"] = _equal(output.routing, batch["routing"])
        sums = policy_gradient_sums(config, found.of_targets, rollouts, **figures)
        counts = {name: sums.metrics[name] for name in ("tokens", "sequences")}
        means = lambda metrics: {name: value for name, value in metrics.items() if name not in counts}
        parts = {}
        for index, name in enumerate(environments):
            own = rollouts.mask * (batch["environment"] == index)[:, None].astype(rollouts.mask.dtype)
            metrics = policy_gradient_sums(config, found.of_targets, rollouts._replace(mask=own), **figures).metrics
            parts[name] = Part(means(metrics), metrics["tokens"])
        return Sums(
            sums.loss, sums.weight, means(sums.metrics), output.router_counts, of=counts["tokens"], counts=counts,
            lowest=sums.lowest, highest=sums.highest, parts=parts,
        )  # fmt: skip

    return objective


def make_policy_log_probs_step(
    functions: FunctionalModel, mesh: Mesh, *, block: int, known: int | None
) -> Callable[[Tree, Tree, Batch], jax.Array]:
    """The jitted (params, buffers, batch of answers) -> log pi of each target under the sampler's temperature and truncation.

    For old_log_probs and reference_log_probs: [rows, seq] float32, of all hosts' rows on every host, in the order of the sequence
    on every mesh. Of the batch it reads tokens, targets, segment_ids, positions, temperature, kept, and routing, which it replays
    where it is there.
    """
    whole = parameter_shardings(functions, mesh)

    def step(params: Tree, buffers: Tree, batch: Batch) -> jax.Array:
        params = jax.lax.with_sharding_constraint(functions.cast(params), whole)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found, _ = _of_answers(functions.bind(params, buffers), batch, block, known, batch.get("routing"))
            return in_sequence(constrain(found.of_targets, ("batch", None)))

    return jax.jit(step, out_shardings=replicated(mesh))


def _of_answers(
    model: Decoder, batch: Batch, block: int, known: int | None, replayed: jax.Array | None
) -> tuple[LogProbs, DecoderOutput]:
    """Log-probabilities and entropies of all positions, and what they are made of."""
    output = model(batch["tokens"], batch["segment_ids"], batch["positions"], routing=replayed)
    found = drawn_log_probs(
        output.hidden, model.head, batch["targets"], batch["temperature"], batch.get("kept"), known=known, block=block
    )
    return found, output


def _equal(chosen: jax.Array, told: jax.Array) -> jax.Array:
    """The share of layers in which a token's experts, [batch, seq, layers, top_k], are the same, in any order: [batch, seq]."""
    same = jnp.all(jnp.sort(chosen, axis=-1) == jnp.sort(told.astype(chosen.dtype), axis=-1), axis=-1)
    return jnp.mean(same, axis=-1, dtype=jnp.float32)
