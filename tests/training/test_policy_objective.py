"""What an engine drew as a batch of reinforcement learning: the trainer's ratios are 1, and masks hold on every mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfm_jax.generation import Engine, EngineConfig, Request, SamplingConfig
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    abstract_state,
    make_eval_step,
    make_policy_log_probs_step,
    make_train_step,
    place_batch,
    policy_gradient_member,
    policy_objective,
)

KNOWN = 37
CONFIG = ModelConfig(
    vocab_size=64, tokenizer_vocab_size=KNOWN, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=4,
    num_kv_heads=2, head_dim=8, mlp_dim=48, context_length=64,
)  # fmt: skip
FUNCTIONS = functional(lambda rngs: Decoder(CONFIG, ComputeConfig(dtype="float32"), rngs=rngs))
MESHES = {
    "one device": MeshConfig(data=1, fsdp=1),
    "replicas and parts of sequences": MeshConfig(data=2, fsdp=1, context=2, tensor=2),
}
PLAIN = SamplingConfig(max_new_tokens=14, temperature=1.0, top_p=1.0)
SAMPLING = {
    "0.6": {"temperature": 0.6}, "1": {}, "1.3": {"temperature": 1.3}, "top_k": {"top_k": 5}, "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1}, "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "greedy": {"temperature": 0, "greedy_as": 0.3},
}  # fmt: skip
ROWS, SEQ = 8, 24
LENGTHS = (3, 1, 6, 8, 4, 2, 7, 5)
TOOL, TRUNCATED = slice(9, 12), 2  # tokens of all answers that a tool could have written; a row that is left out


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(float(leaf.ndim == 1), 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, FUNCTIONS.abstract_params), jax.tree.map(draw, FUNCTIONS.abstract_buffers)


@functools.cache
def rollouts():
    """(prompt, sampling, completion) of each row, all answered together."""
    rng = np.random.default_rng(0)
    sampling = [dataclasses.replace(PLAIN, seed=7, **changes) for changes in SAMPLING.values()]
    prompts = [tuple(map(int, rng.integers(0, KNOWN, length))) for length in LENGTHS]
    asked = [Request(prompt=prompt, sampling=each, drawn=True) for prompt, each in zip(prompts, sampling, strict=True)]
    answers = Engine(FUNCTIONS, CONFIG, *weights(), EngineConfig(steps=5)).run(asked)
    return [(each.prompt, each.sampling, answer) for each, answer in zip(asked, answers, strict=True)]


@functools.cache
def first_pass():
    """The batch of these answers; every token that was drawn counts."""
    rng = np.random.default_rng(1)
    batch = {name: np.zeros((ROWS, SEQ), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch |= {name: np.zeros((ROWS, SEQ), np.float32) for name in ("loss_mask", "sampler_log_probs")}
    batch["advantages"] = rng.normal(size=(ROWS, 1)).astype(np.float32).repeat(SEQ, axis=1)
    batch["temperature"] = np.array([sampling.temperature or sampling.greedy_as for _, sampling, _ in rollouts()], np.float32)
    batch["kept"] = np.zeros((ROWS, SEQ, 2), np.uint32)
    for row, (prompt, _, answer) in enumerate(rollouts()):
        ids = [*prompt, *answer.tokens]
        drawn = slice(len(prompt) - 1, len(ids) - 1)
        batch["tokens"][row, : len(ids) - 1], batch["targets"][row, : len(ids) - 1] = ids[:-1], ids[1:]
        batch["segment_ids"][row, : len(ids) - 1], batch["positions"][row, : len(ids) - 1] = 1, range(len(ids) - 1)
        batch["loss_mask"][row, drawn], batch["sampler_log_probs"][row, drawn] = 1, answer.drawn_log_probs
        if answer.kept is not None:
            batch["kept"][row, drawn] = answer.kept
    return batch


def off_policy():
    """The same after some updates, with other log-probabilities for the sampler, a tool's words, and an answer left out."""
    batch, rng = dict(first_pass()), np.random.default_rng(2)
    for name in ("old_log_probs", "reference_log_probs", "sampler_log_probs"):
        noise = rng.normal(scale=0.2, size=(ROWS, SEQ)).astype(np.float32)
        batch[name] = first_pass()["sampler_log_probs"] + noise
    batch["loss_mask"] = batch["loss_mask"].copy()
    batch["loss_mask"][:, TOOL] = batch["loss_mask"][TRUNCATED] = 0
    return batch


def mesh_of(name):
    return make_mesh(MESHES[name], jax.devices()[: math.prod(dataclasses.astuple(MESHES[name]))])


@functools.cache
def gradient_function(name, known=KNOWN):
    """(params, batch) -> (figures, gradient), compiled once for a structure of batches."""
    objective = policy_objective(policy_gradient_member(name), block=20, known=known)

    def mean(params, batch):
        sums = objective(FUNCTIONS.bind(params, weights()[1]), batch, jax.random.key(0))
        return sums.loss / sums.weight, sums.figures()

    return jax.jit(jax.grad(mean, has_aux=True))


def passed(batch, **options):
    gradient, figures = gradient_function("dapo", **options)(weights()[0], batch)
    return {name: float(value) for name, value in figures.items()}, gradient


def test_on_the_first_pass_every_ratio_is_1_at_every_temperature_and_truncation():
    """Float32 rounding of a cached and of a whole forward pass; 2e-6 has been seen."""
    figures, _ = passed(first_pass())
    assert max(figures["ratio_max"] - 1, 1 - figures["ratio_min"], figures["sampler_gap_max"]) < 1e-4
    assert figures["ratio"] == pytest.approx(1, abs=1e-5) and figures["sampler_kl"] < 1e-8
    assert figures["clipped_low"] == figures["clipped_high"] == 0
    assert (figures["tokens"], figures["sequences"]) == (ROWS * PLAIN.max_new_tokens, ROWS)
    # The truncations did leave out tokens, and only where they were asked for.
    kept = {name: answer.kept for name, (_, _, answer) in zip(SAMPLING, rollouts(), strict=True)}
    assert {name for name in kept if kept[name] is None} == {"0.6", "1", "1.3", "greedy"}
    assert (np.bitwise_count(kept["top_k"]).sum(axis=1) == 5).all() and kept["all"].shape == (14, 2)


@pytest.mark.parametrize("row", [0, 2, 6])
def test_a_wrong_temperature_is_seen_in_the_ratio(row):
    wrong = first_pass()["temperature"] * np.where(np.arange(ROWS) == row, 1.02, 1)
    figures, _ = passed(first_pass() | {"temperature": wrong.astype(np.float32)})
    assert max(figures["ratio_max"] - 1, 1 - figures["ratio_min"]) > 1e-3


def test_without_the_kept_sets_or_with_the_padded_vocabulary_the_ratio_is_not_1():
    whole, _ = passed(first_pass() | {"kept": np.zeros_like(first_pass()["kept"])})
    padded, _ = passed(first_pass(), known=None)
    assert whole["ratio_min"] < 0.9 and padded["ratio_min"] < 0.99


def test_a_token_that_could_not_have_been_drawn_has_the_least_ratio_and_no_gradient():
    """As if the sampler had been another one: nothing is infinite but the gap."""
    kept = first_pass()["kept"].copy()
    place = LENGTHS[3] - 1 + 4
    target = first_pass()["targets"][3, place]
    kept[3, place, target // 32] &= ~np.uint32(1 << target % 32)
    figures, gradient = passed(first_pass() | {"kept": kept})
    assert figures["ratio_min"] == pytest.approx(math.exp(-20)) and math.isfinite(figures["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_on_the_first_pass_the_gradient_is_that_of_reinforce():
    """Of -A log p over the tokens, from all logits, the distribution written out once more."""
    batch = first_pass()
    allowed = np.zeros((ROWS, SEQ, CONFIG.vocab_size), bool)
    for id in range(KNOWN):
        allowed[:, :, id] = (batch["kept"][:, :, id // 32] >> np.uint32(id % 32) & 1) | (batch["kept"] == 0).all(axis=2)
    divisor = np.where(batch["temperature"] > 0, batch["temperature"], 1)[:, None, None]

    @jax.jit
    @jax.grad
    def reinforce(params):
        model = FUNCTIONS.bind(params, weights()[1])
        logits = model.logits(model(*(batch[name] for name in ("tokens", "segment_ids", "positions"))).hidden) / divisor
        log_probs = jax.nn.log_softmax(jnp.where(allowed, logits, -1e30), axis=2)
        log_probs = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=2)[..., 0]
        real = batch["loss_mask"] == 1
        return -jnp.sum(jnp.where(real, batch["advantages"] * log_probs, 0)) / real.sum().astype(np.float32)

    # Of weights that come to about 1 at most.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), passed(batch)[1], reinforce(weights()[0]))


@pytest.mark.parametrize("name", ["dapo", "grpo"])
def test_masked_tokens_are_in_no_numerator_and_no_denominator(name):
    """Tools' words, an answer left out, prompts and padding: whatever stands there, all figures and gradients are the same."""
    batch = off_policy()
    real, counted = batch["loss_mask"] == 1, np.arange(ROWS) != TRUNCATED
    other = dict(batch)
    for key in ("advantages", "sampler_log_probs", "old_log_probs", "reference_log_probs"):
        other[key] = np.where(real, batch[key], [[np.nan], [np.inf], [-np.inf], [7]] * 2).astype(np.float32)
    other["targets"] = np.where(real, batch["targets"], 61)
    other["kept"] = np.where(real[..., None], batch["kept"], np.uint32(4))
    other["temperature"] = np.where(counted, batch["temperature"], 0.1).astype(np.float32)
    other["tokens"] = np.where(counted[:, None] & (batch["segment_ids"] > 0), batch["tokens"], 5)
    both = [gradient_function(name)(weights()[0], each) for each in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert (int(both[0][1]["tokens"]), int(both[0][1]["sequences"])) == (real.sum(), ROWS - 1)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(both[0][0]))


def placed(mesh_name):
    return place_batch(off_policy(), mesh_of(mesh_name))


@functools.cache
def trained(mesh_name, accumulation):
    """Metrics and parameters after a step of the objective whose weight is not its tokens."""
    mesh, optimizer = mesh_of(mesh_name), optax.sgd(0.1)
    objective = policy_objective(policy_gradient_member("grpo", kl_weight=0.1), block=20, known=KNOWN)
    step = make_train_step(FUNCTIONS, optimizer, objective, mesh, seed=0, accumulation=accumulation)
    abstract = abstract_state(FUNCTIONS, optimizer, mesh)
    given = abstract._replace(step=np.int32(0), params=weights()[0], buffers=weights()[1])  # SGD has no state
    state = jax.device_put(given, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    state, metrics = step(state, placed(mesh_name))
    return jax.tree.map(np.asarray, (metrics, state.params))


@pytest.mark.parametrize("mesh_name, accumulation", [("one device", 4), ("replicas and parts of sequences", 2)])
def test_figures_and_updates_are_the_same_on_every_mesh_and_in_micro_batches(mesh_name, accumulation):
    (metrics, params), (expected, expected_params) = trained(mesh_name, accumulation), trained("one device", 1)
    assert set(metrics) == set(expected) >= {
        "loss", "ratio", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "sampler_gap", "sampler_gap_max", "sampler_kl",
        "kl", "entropy", "tokens", "sequences",
    }  # fmt: skip
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, expected_params)


def test_the_figures_are_those_of_the_tokens_one_by_one():
    """From the log-probabilities of a pass of its own, on the host."""
    batch, metrics = off_policy(), trained("one device", 1)[0]
    log_probs, real = policy_log_probs("one device"), off_policy()["loss_mask"] == 1
    ratio = np.exp((log_probs - batch["old_log_probs"])[real])
    gap = (batch["old_log_probs"] - batch["sampler_log_probs"])[real]
    apart = (batch["reference_log_probs"] - log_probs)[real]
    positive = batch["advantages"][real] > 0
    found = {
        "ratio": ratio.mean(), "ratio_min": ratio.min(), "ratio_max": ratio.max(), "sampler_gap": np.abs(gap).mean(),
        "sampler_gap_max": np.abs(gap).max(), "sampler_kl": (np.exp(gap) - 1 - gap).mean(),
        "kl": (np.exp(apart) - 1 - apart).mean(), "clipped_low": ((ratio < 0.8) & ~positive).mean(),
        "clipped_high": ((ratio > 1.2) & positive).mean(), "tokens": real.sum(), "sequences": ROWS - 1,
    }  # fmt: skip
    for name, value in found.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert 0 < metrics["clipped_low"] < 0.5 and 0 < metrics["entropy"] < math.log(KNOWN)


@functools.cache
def policy_log_probs(mesh_name):
    step = make_policy_log_probs_step(FUNCTIONS, mesh_of(mesh_name), block=20, known=KNOWN)
    return np.asarray(step(*weights(), placed(mesh_name)))


@pytest.mark.parametrize("mesh_name", ["one device", "replicas and parts of sequences"])
def test_log_probs_of_a_policy_are_the_samplers_own_in_the_order_of_the_sequence(mesh_name):
    real = first_pass()["loss_mask"] == 1
    found = policy_log_probs(mesh_name)
    assert found.shape == (ROWS, SEQ) and found.dtype == np.float32
    np.testing.assert_allclose(found[real], first_pass()["sampler_log_probs"][real], atol=1e-4)


def test_evaluation_over_replicas_has_the_figures_of_one_device():
    mesh_name = "replicas and parts of sequences"
    objective = policy_objective(policy_gradient_member("dapo"), block=20, known=KNOWN)
    step = make_eval_step(FUNCTIONS, objective, mesh_of(mesh_name))
    figures = {name: float(value) for name, value in step(*weights(), placed(mesh_name)).figures().items()}
    assert figures == pytest.approx(passed(off_policy())[0], rel=2e-5)
