"""Preference losses against formulas over single answers, their sums against the whole, and the traps of masks and lengths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from lfm_jax.sharding import MeshConfig, activation_sharding, make_mesh
from lfm_jax.training import Answers, PreferenceConfig, preference_losses, preference_member

MEMBERS = (
    "dpo", "dpo_norm", "simpo", "ipo", "hinge", "robust", "exo", "apo_zero", "apo_down", "nca", "bco", "sppo", "lfm2",
)  # fmt: skip
PAIRS, SEQ = 6, 7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _answers(seed, spread=0.7, **changes):
    """Answers of 1 to SEQ tokens somewhere in their rows; what is not of them is infinite, or no number."""
    rng = np.random.default_rng(seed)
    log_probs = -rng.exponential(1.0, (PAIRS, SEQ))
    reference = log_probs + spread * rng.normal(size=log_probs.shape)
    mask = np.zeros((PAIRS, SEQ))
    for row, length in enumerate(rng.permutation([1, 2, 3, 5, 6, SEQ])):
        start = rng.integers(0, SEQ - length + 1)
        mask[row, start : start + length] = 1
    answers = Answers(*map(jnp.asarray, (np.where(mask, log_probs, -np.inf), mask, np.where(mask, reference, np.nan))))
    return answers._replace(**changes)


CHOSEN, REJECTED = 1, 2  # the seeds of a test's answers


def _formula(name, beta, c, r, margin=0.0, e=0.0):
    """Of one pair, written as the papers do, with log-ratios c and r; e is the label smoothing."""
    z = beta * (c - r) - margin
    return {
        "dpo": lambda: (1 - e) * -log_expit(z) + e * -log_expit(-z),
        "ipo": lambda: (c - r - margin / beta - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0, 1 - z),
        "robust": lambda: ((1 - e) * -log_expit(z) + e * log_expit(-z)) / (1 - 2 * e),
        "exo": lambda: expit(z) * math.log(expit(z) / (1 - e)) + expit(-z) * math.log(expit(-z) / e),
        "apo_zero": lambda: 1 - expit(beta * c) + expit(beta * r),
        "apo_down": lambda: expit(beta * c) + 1 - expit(z),
        "nca": lambda: -log_expit(beta * c) - 0.5 * log_expit(-beta * c) - 0.5 * log_expit(-beta * r),
        "bco": lambda: -log_expit(beta * c) - log_expit(-beta * r),
        "sppo": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "lfm2": lambda: -log_expit(z) - 0.2 * log_expit(beta * c),
    }[{"dpo_norm": "dpo", "simpo": "dpo"}.get(name, name)]()


def _tokens(answers, row):
    kept = np.asarray(answers.mask)[row] > 0
    return np.asarray(answers.log_probs)[row, kept], np.asarray(answers.reference_log_probs)[row, kept]


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_its_formula_with_sums_and_with_means(name, length_normalized):
    config = preference_member(name, length_normalized=length_normalized, beta=0.8)
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    found = jax.device_get(preference_losses(config, chosen, rejected))
    mean = np.mean if length_normalized else np.sum
    for row in range(PAIRS):
        (chosen_policy, chosen_reference), (rejected_policy, rejected_reference) = _tokens(chosen, row), _tokens(rejected, row)
        c, r = mean(chosen_policy - chosen_reference), mean(rejected_policy - rejected_reference)
        if name == "simpo":
            c, r = mean(chosen_policy), mean(rejected_policy)
        expected = _formula(name, 0.8, c, r, config.margin, config.label_smoothing)
        np.testing.assert_allclose(found.loss[row], expected, rtol=1e-12)


def test_weights_margin_smoothing_and_the_sft_term_add_up():
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    config = PreferenceConfig(
        relative="hinge", relative_weight=0.7, absolute="anchor", absolute_weight=0.3, beta=2.0, margin=0.4, label_smoothing=0.2,
        sft_weight=0.5,
    )  # fmt: skip
    found = jax.device_get(preference_losses(config, chosen, rejected))
    for row in range(PAIRS):
        (policy, reference), other = _tokens(chosen, row), _tokens(rejected, row)
        c, r = np.mean(policy - reference), np.mean(other[0] - other[1])
        z = 2 * (c - r) - 0.4
        relative = 0.8 * max(0, 1 - z) + 0.2 * max(0, 1 + z)
        expected = 0.7 * relative - 0.3 * log_expit(2 * c) - 0.5 * np.mean(policy)
        np.testing.assert_allclose(found.loss[row], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=4, context=2), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str
)
@pytest.mark.parametrize("name", ["dpo", "dpo_norm"])
def test_the_loss_at_step_0_is_log_2_on_every_mesh(mesh, name):
    """Whatever the lengths, with a padded pair or not: a mean of micro-batches' or devices' means would not be."""
    rng = np.random.default_rng(0)
    mask = np.asarray(np.arange(4) < rng.integers(1, 5, (8, 1)), np.float32)
    mask[5] = 0
    same = jnp.asarray(-rng.exponential(1.0, (8, 4)), jnp.float32)
    mesh = make_mesh(mesh)
    answers = jax.device_put(Answers(same, jnp.asarray(mask), same), activation_sharding(mesh, ("batch", "seq")))

    @jax.jit
    def sums(answers):
        return preference_losses(preference_member(name), answers, answers).sums()

    found = sums(answers)
    assert found.loss.dtype == found.weight.dtype == jnp.float32
    assert float(found.weight) == 7
    np.testing.assert_allclose(found.loss / found.weight, math.log(2), rtol=1e-6)
    assert float(found.metrics["reward_margin"]) == float(found.metrics["kl"]) == float(found.metrics["accuracy"]) == 0


@pytest.mark.parametrize("name", MEMBERS)
def test_sums_over_micro_batches_are_those_of_the_batch(name):
    config = preference_member(name, sft_weight=0.3)
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    whole = preference_losses(config, chosen, rejected).sums()
    parts = [
        preference_losses(config, *jax.tree.map(lambda rows, part=part: rows[part], (chosen, rejected))).sums()
        for part in (slice(0, 2), slice(2, 4), slice(4, None))
    ]
    jax.tree.map(lambda total, *terms: np.testing.assert_allclose(sum(terms), total, rtol=1e-12), whole, *parts)


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "ipo", "lfm2"])
def test_where_padding_is_and_how_much_changes_nothing(name):
    """What a row has before and after the answer is in no sum, and the answer's length is that of its tokens."""
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    config = preference_member(name, sft_weight=0.1)
    wider = lambda rows: jnp.pad(rows, ((0, 0), (2, 3)))
    found = preference_losses(config, *jax.tree.map(wider, (chosen, rejected)))
    jax.tree.map(
        lambda value, expected: np.testing.assert_allclose(value, expected, rtol=1e-12),
        found,
        preference_losses(config, chosen, rejected),
    )


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_go_to_the_answers_tokens_alone_and_are_finite(name):
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)

    def loss(log_probs, references):
        pair = [
            answers._replace(log_probs=policy, reference_log_probs=reference)
            for answers, policy, reference in zip((chosen, rejected), log_probs, references, strict=True)
        ]
        return preference_losses(preference_member(name), *pair).sums().loss

    policies = [answers.log_probs for answers in (chosen, rejected)]
    by_policy, by_reference = jax.grad(loss, (0, 1))(policies, [answers.reference_log_probs for answers in (chosen, rejected)])
    for answers, gradient, zero in zip((chosen, rejected), by_policy, by_reference, strict=True):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient == 0, answers.mask == 0)
        assert not zero.any()


@pytest.mark.parametrize(("name", "by_length"), [("dpo", 0), ("dpo_norm", 1)])
def test_a_token_of_a_long_answer_counts_less_only_where_lengths_are_normalized(name, by_length):
    """At step 0 the gradient by each token of the chosen answer is -beta / 2, over the answer's length or not."""
    answers = _answers(CHOSEN)
    answers = answers._replace(reference_log_probs=answers.log_probs)
    config = preference_member(name)

    def loss(log_probs):
        return preference_losses(config, answers._replace(log_probs=log_probs), answers).sums().loss

    lengths = np.asarray(answers.mask).sum(axis=1, keepdims=True)
    expected = np.asarray(answers.mask) * -config.beta / 2 / lengths**by_length
    np.testing.assert_allclose(jax.grad(loss)(answers.log_probs), expected, rtol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_pair_without_an_answer_is_padding(name):
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    config = preference_member(name, sft_weight=0.3)
    empty = chosen._replace(mask=chosen.mask.at[2].set(0))
    found = preference_losses(config, empty, rejected)
    whole = preference_losses(config, chosen, rejected)
    jax.tree.map(lambda value, other: np.testing.assert_array_equal(value, other.at[2].set(0)), found, whole)
    loss = lambda log_probs: preference_losses(config, empty._replace(log_probs=log_probs), rejected).sums().loss
    assert not jax.grad(loss)(empty.log_probs)[2].any()


def test_metrics_are_those_of_each_answer():
    chosen, rejected = _answers(CHOSEN), _answers(REJECTED)
    found = jax.device_get(preference_losses(preference_member("dpo_norm"), chosen, rejected).metrics)
    for row in range(PAIRS):
        pair = [_tokens(answers, row) for answers in (chosen, rejected)]
        rewards = [5 * np.mean(policy - reference) for policy, reference in pair]
        ratios = np.concatenate([policy - reference for policy, reference in pair])
        expected = {
            "accuracy": rewards[0] > rewards[1],
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "reward_margin": rewards[0] - rewards[1],
            "chosen_log_prob": pair[0][0].sum(),
            "rejected_log_prob": pair[1][0].sum(),
            "chosen_length": len(pair[0][0]),
            "rejected_length": len(pair[1][0]),
            "kl": np.mean(np.exp(ratios) - 1 - ratios),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-10, err_msg=name)
    assert 0 < float(found["accuracy"].sum()) < PAIRS


def test_the_divergence_is_estimated_from_the_references_own_answers():
    """Over all sequences of one token, weighed by the reference: KL(reference || policy)."""
    rng = np.random.default_rng(3)
    policy, reference = (np.log(rng.dirichlet(np.ones(PAIRS))) for _ in range(2))
    first = np.arange(SEQ) < np.ones((PAIRS, 1))
    rows = lambda values: jnp.asarray(np.where(first, values[:, None], np.nan))
    answers = Answers(rows(policy), jnp.asarray(first, float), rows(reference))
    kl = preference_losses(preference_member("dpo_norm"), answers, answers).metrics["kl"]
    np.testing.assert_allclose(np.exp(reference) @ np.asarray(kl), np.exp(reference) @ (reference - policy), rtol=1e-12)


def test_without_a_reference_there_is_no_divergence():
    chosen, rejected = (_answers(seed, reference_log_probs=None) for seed in (CHOSEN, REJECTED))
    found = preference_losses(preference_member("simpo"), chosen, rejected)
    assert "kl" not in found.metrics
    assert found.loss.all()


def test_a_loss_of_ratios_needs_the_reference():
    without = _answers(CHOSEN, reference_log_probs=None)
    with pytest.raises(ValueError, match="give reference_log_probs of both answers, or set reference_free"):
        preference_losses(PreferenceConfig(), without, _answers(REJECTED))
    with pytest.raises(ValueError, match="give reference_log_probs of both answers, or set reference_free"):
        preference_losses(PreferenceConfig(), _answers(CHOSEN), without)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "beta must be positive, got 0"),
        ({"relative_weight": -1}, "weights must not be negative, got relative_weight -1, absolute_weight 1.0, sft_weight 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and less than 0.5, got 0.5"),
        ({"robust": True}, "robust and exo need a label_smoothing greater than 0, got 0"),
        ({"relative": "exo"}, "robust and exo need a label_smoothing greater than 0, got 0"),
        ({"relative": "exo", "robust": True, "label_smoothing": 0.1}, "exo has a use of its own for label_smoothing"),
        ({"relative": "none", "absolute": "nca", "margin": 1.0}, "margin 1.0 and label_smoothing 0.0 are of the relative term"),
        ({"relative": "none"}, "there is nothing to learn; set one"),
    ],
)  # fmt: skip
def test_settings_that_make_no_loss_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**changes)


def test_an_unknown_member_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no preference loss 'dpo_nrom'. Did you mean 'dpo_norm'"):
        preference_member("dpo_nrom")
