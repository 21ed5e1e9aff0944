"""Pairs of answers as a batch: the objective that learns from them, and their log-probabilities under a reference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lfm_jax.models import Decoder, FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import constrain, in_sequence
from lfm_jax.training.cross_entropy import linear_log_probs
from lfm_jax.training.objective import Batch, Objective, Sums
from lfm_jax.training.preference import Answers, PreferenceConfig, preference_losses
from lfm_jax.training.state import parameter_shardings, replicated

REJECTED = "rejected_"  # before the names of a batch's arrays, for those of the rejected answers
REFERENCE = "reference_log_probs"


def preference_objective(config: PreferenceConfig, *, block: int) -> Objective:
    """The loss of pairs, see `preference_losses`, whose sums it returns: its weight is the number of pairs, and its
    tokens are those of both rows.

    The batch has in each row a pair: under the usual names the prompt with the chosen answer, [pairs, seq] each, and under these
    names with "rejected_" before them that with the rejected one; loss_mask is 1 for the answer alone. With them come
    reference_log_probs and rejected_reference_log_probs, [pairs, seq] float32, or the loss is reference-free. So a pair is never
    parted, however rows are dealt to micro-batches, devices and hosts, and sequences to the devices of `context`.

    Args:
      block: tokens whose logits exist at one time, on each device.
    """

    def objective(model: Decoder, batch: Batch, key: jax.Array) -> Sums:
        log_probs, router_counts = _pair_log_probs(model, batch, block)
        chosen, rejected = (
            Answers(found, batch[f"{prefix}loss_mask"], batch.get(f"{prefix}{REFERENCE}"))
            for prefix, found in zip(("", REJECTED), log_probs, strict=True)
        )
        sums = preference_losses(config, chosen, rejected).sums(router_counts)
        tokens = sum(jnp.sum(batch[f"{prefix}segment_ids"] > 0, dtype=jnp.float32) for prefix in ("", REJECTED))
        return sums._replace(counts={"pairs": sums.weight, "tokens": tokens})

    return objective


def make_log_probs_step(
    functions: FunctionalModel, mesh: Mesh, *, block: int
) -> Callable[[Tree, Tree, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted (params, buffers, batch of pairs) -> log pi of each target of the chosen and of the rejected answers.

    [pairs, seq] float32 each, of all hosts' rows on every host, in the order of the sequence on every mesh.
    """
    whole = parameter_shardings(functions, mesh)

    def step(params: Tree, buffers: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = jax.lax.with_sharding_constraint(functions.cast(params), whole)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            log_probs, _ = _pair_log_probs(functions.bind(params, buffers), batch, block)
            chosen, rejected = (in_sequence(constrain(found, ("batch", None))) for found in log_probs)
            return chosen, rejected

    return jax.jit(step, out_shardings=replicated(mesh))


def _pair_log_probs(model: Decoder, batch: Batch, block: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
    """[pairs, seq] each, of the chosen and of the rejected answers, from one pass; and how often experts were chosen."""
    pairs, seq = batch["tokens"].shape

    def both(name: str) -> jax.Array:
        """Side by side, so that no row moves to another device."""
        stacked = jnp.stack([batch[name], batch[REJECTED + name]], axis=1)
        return constrain(stacked.reshape(2 * pairs, seq), ("batch", "seq"))

    output = model(both("tokens"), both("segment_ids"), both("positions"))
    log_probs = linear_log_probs(output.hidden, model.head, both("targets"), block=block).reshape(pairs, 2, seq)
    return (log_probs[:, 0], log_probs[:, 1]), output.router_counts
