"""Policy-gradient losses against loops over single tokens, sums against the whole, and the traps of masks and denominators."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.training import (
    PolicyGradientConfig,
    Rollouts,
    group_advantages,
    overlong_penalty,
    policy_gradient_member,
    policy_gradient_sums,
)

MEMBERS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
BATCH, SEQ = 6, 8
MAX_TOKENS = 10


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# Ranges that some of the ratios of `_rollouts` are beyond.
_SETTINGS = {
    "dr_grpo": {"max_tokens": MAX_TOKENS}, "gspo": {"clip_low": 0.05, "clip_high": 0.1}, "cispo": {"ratio_cap": 1.3},
}  # fmt: skip


def _member(name, **changes):
    return policy_gradient_member(name, **_SETTINGS.get(name, {}) | changes)


def _rollouts(seed=0, spread=0.4, per_token=False):
    """(log_probs, rollouts): answers with a tool's words amid them; what is not the policy's own is infinite, or no number."""
    rng = np.random.default_rng(seed)
    mask = np.arange(SEQ) < np.array([[8], [1], [5], [7], [3], [6]])
    mask[0, 3:5] = mask[3, 2] = False
    log_probs = -rng.exponential(1.0, (BATCH, SEQ))
    others = [np.where(mask, log_probs + scale * rng.normal(size=mask.shape), np.nan) for scale in (spread, spread, 0.2)]
    advantages = rng.normal(size=(BATCH, SEQ) if per_token else BATCH)
    advantages[1] = 0
    arrays = [advantages, mask, *others]
    return jnp.asarray(np.where(mask, log_probs, -np.inf)), Rollouts(*map(jnp.asarray, arrays))


def _formula(config, log_probs, rollouts):
    """(numerator, denominator), token by token."""
    policy, sampler, old, reference = (
        np.asarray(array)
        for array in (log_probs, rollouts.sampler_log_probs, rollouts.old_log_probs, rollouts.reference_log_probs)
    )
    rows = []
    for row in range(BATCH):
        places = np.flatnonzero(rollouts.mask[row])
        if not places.size:
            continue
        mean = np.mean([policy[row, t] - old[row, t] for t in places])
        losses = []
        for t in places:
            weight = math.exp(mean if config.ratio == "sequence" else policy[row, t] - old[row, t])
            a = float(rollouts.advantages[row] if rollouts.advantages.ndim == 1 else rollouts.advantages[row, t])
            if config.surrogate == "cispo":
                loss = -min(weight, config.ratio_cap) * a * policy[row, t]
            else:
                loss = -min(weight * a, min(max(weight, 1 - config.clip_low), 1 + config.clip_high) * a)
            if config.importance_cap:
                loss *= min(math.exp(old[row, t] - sampler[row, t]), config.importance_cap)
            d = reference[row, t] - policy[row, t]
            losses.append(loss + config.kl_weight * (math.exp(d) - 1 - d) * (weight if config.kl_by_ratio else 1))
        rows.append(losses)
    tokens = sum(map(sum, rows))
    return {
        "sequence_mean": (sum(np.mean(losses) for losses in rows), len(rows)),
        "token_mean": (tokens, sum(map(len, rows))),
        "constant": (tokens, len(rows) * MAX_TOKENS),
    }[config.aggregation]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"importance_cap": 1.2}, {"kl_weight": 0.1}, {"kl_weight": 0.1, "kl_by_ratio": False, "importance_cap": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("name", MEMBERS)
def test_every_variant_is_its_formula_token_by_token(name, changes, per_token):
    log_probs, rollouts = _rollouts(per_token=per_token)
    config = _member(name, **changes)
    found = policy_gradient_sums(config, log_probs, rollouts)
    np.testing.assert_allclose((found.loss, found.weight), _formula(config, log_probs, rollouts), rtol=1e-12)


def _gradient(config, log_probs, rollouts):
    """Of the mean loss, by the log-probabilities."""

    def mean(log_probs):
        sums = policy_gradient_sums(config, log_probs, rollouts)
        return sums.loss / sums.weight

    return np.asarray(jax.grad(mean)(log_probs))


@pytest.mark.parametrize("name", MEMBERS)
def test_on_the_first_pass_every_ratio_is_1_and_the_gradient_is_the_advantage(name):
    """Equal for all variants but for the share of a token, which is what they differ in."""
    log_probs, rollouts = _rollouts()
    rollouts = rollouts._replace(sampler_log_probs=log_probs, old_log_probs=None)
    config = _member(name)
    found = policy_gradient_sums(config, log_probs, rollouts)
    assert found.lowest["ratio"] == found.highest["ratio"] == 1
    assert found.highest["sampler_gap"] == found.metrics["sampler_gap"] == found.metrics["sampler_kl"] == 0
    assert found.metrics["clipped_low"] == found.metrics["clipped_high"] == 0
    mask = np.asarray(rollouts.mask)
    lengths = mask.sum(axis=1, keepdims=True)
    share = {
        "sequence_mean": 1 / (BATCH * lengths), "token_mean": 1 / mask.sum(), "constant": 1 / (BATCH * MAX_TOKENS)
    }[config.aggregation]  # fmt: skip
    expected = -np.asarray(rollouts.advantages)[:, None] * share * mask
    np.testing.assert_allclose(_gradient(config, log_probs, rollouts), expected, rtol=1e-12)


def _laid_out(*rows):
    """Values of the first tokens of the first row in arrays of the usual shape, and the mask of these; one program serves all."""
    arrays = [np.pad(np.asarray(row, float)[None], ((0, BATCH - 1), (0, SEQ - len(row)))) for row in rows]
    return [*map(jnp.asarray, arrays), jnp.zeros((BATCH, SEQ), bool).at[0, : len(rows[0])].set(True)]


def test_a_clipped_token_has_no_gradient_and_cispos_has():
    """Two tokens whose ratio has gone up with A > 0, one that has gone down: the second and third are beyond the range."""
    sampler = np.array([-1.0, -2.0, -3.0])
    log_probs, old, advantages, mask = _laid_out(sampler + np.log([1.1, 1.4, 0.7]), sampler, [1.0, 1.0, -1.0])
    rollouts = Rollouts(advantages, mask, old)
    dapo, cispo = policy_gradient_member("dapo"), policy_gradient_member("cispo", ratio_cap=1.2)
    gradient = lambda config, rollouts: _gradient(config, log_probs, rollouts)[0, :3]
    np.testing.assert_allclose(gradient(dapo, rollouts), [-1.1 / 3, 0, 0], atol=1e-15)
    np.testing.assert_allclose(gradient(cispo, rollouts), [-1.1 / 3, -1.2 / 3, 0.7 / 3])
    # The other way round nothing is clipped: the policy comes back.
    back = rollouts._replace(advantages=-rollouts.advantages)
    np.testing.assert_allclose(gradient(dapo, back), [1.1 / 3, 1.4 / 3, -0.7 / 3])
    found = policy_gradient_sums(dapo, log_probs, rollouts)
    assert (found.metrics["clipped_low"], found.metrics["clipped_high"]) == (1, 1)
    assert policy_gradient_sums(cispo, log_probs, rollouts).metrics["clipped_high"] == 1


@pytest.mark.parametrize("name", MEMBERS)
def test_tools_words_and_padding_have_no_gradient_and_every_token_of_an_answer_has(name):
    log_probs, rollouts = _rollouts(spread=0.01)
    gradient = _gradient(_member(name, kl_weight=0.1), log_probs, rollouts)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient != 0, rollouts.mask)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_answer_that_is_left_out_is_in_no_sum(name):
    """A truncated one, say: the rest has the same loss, weight, metrics and gradient as without it."""
    log_probs, rollouts = _rollouts()
    config = _member(name, kl_weight=0.1, importance_cap=2.0)
    left_out = rollouts._replace(mask=rollouts.mask.at[2].set(False))
    found = policy_gradient_sums(config, log_probs, left_out)
    np.testing.assert_allclose((found.loss, found.weight), _formula(config, log_probs, left_out), rtol=1e-12)
    mask = np.asarray(left_out.mask)
    assert (found.metrics["tokens"], found.metrics["sequences"]) == (int(mask.sum()), BATCH - 1)
    gradient, before = (_gradient(config, log_probs, known) for known in (left_out, rollouts))
    np.testing.assert_array_equal(gradient != 0, mask & (before != 0))


def test_a_batch_without_any_token_has_no_weight():
    log_probs, rollouts = _rollouts()
    found = policy_gradient_sums(_member("grpo"), log_probs, rollouts._replace(mask=jnp.zeros_like(rollouts.mask)))
    assert found.loss == found.weight == found.metrics["tokens"] == found.metrics["sequences"] == 0
    assert (found.lowest["ratio"], found.highest["ratio"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("name", MEMBERS)
def test_sums_over_micro_batches_are_those_of_the_batch(name):
    log_probs, rollouts = _rollouts()
    config = _member(name, kl_weight=0.1, importance_cap=2.0)
    whole = policy_gradient_sums(config, log_probs, rollouts)
    parts = [
        policy_gradient_sums(config, *jax.tree.map(lambda rows, part=part: rows[part], (log_probs, rollouts)))
        for part in (slice(0, 2), slice(2, 4), slice(4, None))
    ]
    for field, combine in (("loss", sum), ("weight", sum), ("metrics", sum), ("lowest", min), ("highest", max)):
        jax.tree.map(
            lambda total, *terms, combine=combine: np.testing.assert_allclose(combine(terms), total, rtol=1e-12),
            getattr(whole, field),
            *(getattr(part, field) for part in parts),
        )


def test_the_samplers_log_probabilities_are_the_old_ones_unless_others_are_given():
    log_probs, rollouts = _rollouts()
    config = _member("dapo")
    of_sampler = policy_gradient_sums(config, log_probs, rollouts._replace(old_log_probs=None))
    same = rollouts._replace(old_log_probs=rollouts.sampler_log_probs)
    assert of_sampler.loss == policy_gradient_sums(config, log_probs, same).loss
    assert of_sampler.loss != policy_gradient_sums(config, log_probs, rollouts).loss


def test_no_gradient_goes_to_what_is_known():
    log_probs, rollouts = _rollouts()
    config = _member("dapo", kl_weight=0.1, importance_cap=2.0)
    floats = ("advantages", "sampler_log_probs", "old_log_probs", "reference_log_probs")
    loss = lambda known: policy_gradient_sums(config, log_probs, rollouts._replace(**known)).loss
    gradient = jax.grad(loss)({field: getattr(rollouts, field) for field in floats})
    assert not any(np.asarray(leaf).any() for leaf in gradient.values())


def test_metrics_are_sums_over_the_policys_own_tokens():
    log_probs, rollouts = _rollouts()
    entropy = jnp.asarray(np.random.default_rng(1).exponential(1.0, (BATCH, SEQ)))
    found = policy_gradient_sums(_member("dapo"), log_probs, rollouts, entropy=entropy)
    mask = np.asarray(rollouts.mask)
    own = lambda array: np.asarray(array)[mask]
    ratio = np.exp(own(log_probs) - own(rollouts.old_log_probs))
    gap = own(rollouts.old_log_probs) - own(rollouts.sampler_log_probs)
    d = own(rollouts.reference_log_probs) - own(log_probs)
    advantages = own(np.broadcast_to(np.asarray(rollouts.advantages)[:, None], mask.shape))
    expected = {
        "tokens": mask.sum(),
        "sequences": BATCH,
        "clipped_low": np.sum((ratio < 0.8) & (advantages < 0)),
        "clipped_high": np.sum((ratio > 1.28) & (advantages > 0)),
        "ratio": ratio.sum(),
        "sampler_gap": np.abs(gap).sum(),
        "sampler_kl": np.sum(np.exp(gap) - gap - 1),
        "kl": np.sum(np.exp(d) - d - 1),
        "entropy": own(entropy).sum(),
    }
    assert found.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-12, err_msg=name)
        assert value > 0, name
    np.testing.assert_allclose(found.lowest["ratio"], ratio.min())
    np.testing.assert_allclose((found.highest["ratio"], found.highest["sampler_gap"]), (ratio.max(), np.abs(gap).max()))


def test_the_corrected_kl_term_has_the_gradient_of_the_divergence():
    """By the logits, over all sequences of one token, as often as the policy draws them; without the ratio it is another's."""
    rng = np.random.default_rng(0)
    policy, reference = (np.log(rng.dirichlet(np.ones(BATCH))) for _ in range(2))
    first = np.arange(SEQ) < np.ones((BATCH, 1))
    rows = lambda values: jnp.asarray(np.where(first, values[:, None], np.nan))
    rollouts = Rollouts(jnp.zeros(BATCH), jnp.asarray(first), rows(policy), None, rows(reference))

    def by_logits(by_ratio):
        config = PolicyGradientConfig(kl_weight=1.0, kl_by_ratio=by_ratio)
        by_log_probs = np.exp(policy) * BATCH * _gradient(config, rows(policy), rollouts)[:, 0]
        return by_log_probs - np.exp(policy) * by_log_probs.sum()

    kl = np.exp(policy) @ (policy - reference)
    expected = np.exp(policy) * (policy - reference - kl)
    np.testing.assert_allclose(by_logits(True), expected, rtol=1e-10)
    assert np.abs(by_logits(False) - expected).max() > 0.01


def test_a_ratio_beyond_all_measure_stays_finite():
    log_probs, sampler, reference, mask = _laid_out([-1.0, -2000.0], [-2000.0, -1.0], [-2000.0, -1.0])
    rollouts = Rollouts(-jnp.ones(BATCH), mask, sampler, None, reference)
    sums = policy_gradient_sums(_member("dapo", kl_weight=1.0), log_probs, rollouts)
    assert np.isfinite(sums.loss)
    np.testing.assert_allclose((sums.lowest["ratio"], sums.highest["ratio"]), (math.exp(-20), math.exp(20)))


def test_sums_are_in_float32_at_least():
    log_probs, rollouts = _rollouts()
    lower = lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float64 else leaf
    with jax.enable_x64(False):
        shapes = jax.eval_shape(
            lambda *inputs: policy_gradient_sums(_member("dapo", kl_weight=0.1), *inputs),
            *jax.tree.map(lower, (log_probs, rollouts)),
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.3, 0.9, 0.2, -1.0]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_differences_from_the_groups_mean(scale):
    found = group_advantages(jnp.asarray(REWARDS), scale=scale)
    for group, rewards in enumerate(REWARDS):
        spread = {"group": np.std(rewards, ddof=1) + 1e-4, "batch": np.std(REWARDS, ddof=1) + 1e-4, "none": 1}[scale]
        np.testing.assert_allclose(found.values[group], (rewards - rewards.mean()) / spread, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.varied, [True, False, True])


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    found = group_advantages(jnp.asarray(REWARDS), scale="none", leave_one_out=True).values
    expected = [[reward - np.delete(rewards, i).mean() for i, reward in enumerate(rewards)] for rewards in REWARDS]
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_answer_that_could_not_be_scored_is_compared_with_nothing(scale):
    """One that could not leaves the group as without it, and a group of which one or none could teaches nothing."""
    nan = math.nan
    rewards = jnp.array([[1.0, 0.0, nan, 3.0], [nan, nan, nan, nan], [nan, 5.0, nan, nan]])
    found = group_advantages(rewards, scale=scale, leave_one_out=True)
    kept = np.array([1.0, 0.0, 3.0])
    spread = {"group": np.std(kept, ddof=1) + 1e-4, "batch": np.std([1, 0, 3, 5], ddof=1) + 1e-4, "none": 1}[scale]
    expected = [kept[i] - np.delete(kept, i).mean() for i in range(3)]
    np.testing.assert_allclose(found.values[0], np.insert(expected, 2, 0) / spread, rtol=1e-12)
    assert not found.values[1:].any()
    np.testing.assert_array_equal(found.varied, [True, False, False])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1e6 / 3])
def test_a_group_of_equal_rewards_has_no_advantage_whatever_the_rounding(reward):
    """0.1 is not the mean of seven times 0.1 in float32."""
    found = group_advantages(jnp.full((2, 7), reward, jnp.float32))
    assert found.values.dtype == jnp.float32
    assert not found.values.any()
    assert not found.varied.any()


def test_a_group_without_variance_is_pulled_to_the_reference_and_pushed_nowhere():
    """It is in the denominators, unless its mask is 0."""
    log_probs, rollouts = _rollouts()
    advantages = group_advantages(jnp.array([[1.0, 1.0], [0.0, 1.0], [2.0, 4.0]])).values.reshape(-1)
    rollouts = rollouts._replace(advantages=advantages)
    assert not _gradient(_member("grpo"), log_probs, rollouts)[:2].any()
    assert _gradient(_member("grpo", kl_weight=0.1), log_probs, rollouts)[:2].any(axis=1).all()
    assert policy_gradient_sums(_member("grpo"), log_probs, rollouts).weight == BATCH


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_advantages_need_two_answers_to_a_prompt(shape):
    with pytest.raises(ValueError, match=r"\[groups, answers\] with at least 2 answers to a prompt, got shape \(4,"):
        group_advantages(jnp.zeros(shape))


def test_the_overlong_penalty_goes_down_over_the_buffer():
    lengths = jnp.array([0, 70, 80, 85, 90, 100, 130])
    np.testing.assert_allclose(overlong_penalty(lengths, max_tokens=100, buffer=20), [0, 0, 0, -0.25, -0.5, -1, -1])


@pytest.mark.parametrize("buffer", [0, 100])
def test_an_overlong_buffer_that_is_none_is_refused(buffer):
    with pytest.raises(ValueError, match=f"at least 1 token and less than max_tokens 100, got {buffer}"):
        overlong_penalty(jnp.array([1]), max_tokens=100, buffer=buffer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_low": 1.0}, "clip_low must be at least 0 and less than 1, clip_high not negative, got 1.0 and 0.28"),
        ({"surrogate": "cispo"}, "ratio_cap is of surrogate 'cispo', which needs it; got None with 'cispo'"),
        ({"ratio_cap": 5.0}, "ratio_cap is of surrogate 'cispo', which needs it; got 5.0 with 'clip'"),
        ({"aggregation": "constant"}, "max_tokens is of aggregation 'constant', which needs it; got None with 'constant'"),
        ({"max_tokens": 0, "aggregation": "constant"}, "max_tokens must be positive, got 0"),
        ({"importance_cap": 0.0}, "importance_cap must be positive, got 0.0"),
        ({"kl_weight": -0.1}, "kl_weight must not be negative, got -0.1"),
    ],
)
def test_settings_that_make_no_loss_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradientConfig(**changes)


def test_what_a_loss_needs_must_be_given():
    log_probs, rollouts = _rollouts()
    with pytest.raises(ValueError, match="kl_weight is 0.1, but there are no reference_log_probs"):
        policy_gradient_sums(_member("grpo", kl_weight=0.1), log_probs, rollouts._replace(reference_log_probs=None))
    with pytest.raises(ValueError, match="importance_cap weighs by old_log_probs over the sampler's, and there are none"):
        policy_gradient_sums(_member("grpo", importance_cap=2.0), log_probs, rollouts._replace(old_log_probs=None))


def test_an_unknown_variant_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no policy-gradient loss 'drgrpo'. Did you mean 'dr_grpo'"):
        policy_gradient_member("drgrpo")
