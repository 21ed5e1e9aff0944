"""Values, and gradients by the same logits, of preference and policy-gradient losses are those of TRL's own code, in float64."""

import collections
import contextlib
import importlib
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.training import (
    Answers,
    Rollouts,
    overlong_penalty,
    policy_gradient_member,
    policy_gradient_sums,
    preference_losses,
    preference_member,
)

trl = pytest.importorskip("trl")

ROWS, SEQ, VOCAB = 6, 7, 11
MAX_TOKENS = 10


@pytest.fixture(autouse=True)
def _float64():
    import torch

    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


def _equal(found, expected, rtol=1e-9):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-13)


def _tensor(values):
    import torch

    return torch.tensor(np.array(values))


def _log_probs(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=2)[..., 0]


def _draw(seed):
    """(logits, tokens, mask, near) for ROWS answers, one with a gap; near() is other log-probabilities, not far from theirs."""
    rng = np.random.default_rng(seed)
    logits, tokens = 1.5 * rng.normal(size=(ROWS, SEQ, VOCAB)), rng.integers(0, VOCAB, (ROWS, SEQ))
    mask = np.arange(SEQ) < rng.permutation([[1], [2], [3], [5], [6], [7]])
    mask[np.argmax(mask.sum(axis=1)), 2:4] = False
    logits, tokens, mask = map(jnp.asarray, (logits, tokens, mask))
    return logits, tokens, mask, lambda: _log_probs(logits, tokens) + 0.4 * jnp.asarray(rng.normal(size=mask.shape))


class _Process:
    """Stands for accelerate's Accelerator in a single process."""

    device, num_processes, is_main_process, autocast = "cpu", 1, False, contextlib.nullcontext
    gather = gather_for_metrics = staticmethod(lambda values: values)
    reduce = staticmethod(lambda values, reduction: values)


def _trainer(kind, **settings):
    """A trainer of TRL's that has what its loss reads, and no model."""
    trainer = object.__new__(kind)
    arguments = types.SimpleNamespace(report_to=(), steps_per_generation=1, delta=None, **settings.pop("args", {}))
    vars(trainer).update(
        model=types.SimpleNamespace(training=True), accelerator=_Process(), state=types.SimpleNamespace(global_step=0),
        aux_loss_enabled=False, args=arguments, _metrics={"train": collections.defaultdict(list)}, **settings,
    )  # fmt: skip
    return trainer


def _model(logits):
    """What a model with TRL's fused head returns, if it has these logits for all tokens but the first."""
    import torch

    def model(labels, **inputs):
        targets = labels[:, 1:]
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        kept = torch.zeros_like(log_probs)
        return types.SimpleNamespace(
            log_probs=log_probs.masked_fill(targets == -100, 0), entropy=kept, mean_logits=kept, is_top1=kept.bool()
        )

    return model


_PREFERENCE = {
    "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo", "hinge": "hinge", "robust": "robust", "exo": "exo_pair",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard",
}  # fmt: skip


def _pairs(chosen, rejected):
    """(leaf, model's inputs) of TRL: chosen answers first, then the rejected, each with a prompt of one token."""
    import torch

    leaf = _tensor(np.concatenate([chosen[0], rejected[0]])).requires_grad_()
    first = torch.zeros(2 * ROWS, 1).long()
    tokens, mask = (_tensor(np.concatenate([chosen[i], rejected[i]])).long() for i in (1, 2))
    return leaf, {
        "input_ids": torch.cat([first, tokens], 1), "attention_mask": torch.cat([first + 1, mask], 1),
        "completion_mask": torch.cat([first, mask], 1),
    }  # fmt: skip


def _ours(config, chosen, rejected, references):
    """((mean loss, metrics), gradient by the logits [2 rows, seq, vocab])."""

    def mean(pair):
        answers = [
            Answers(_log_probs(logits, tokens), mask, reference)
            for logits, (_, tokens, mask, _), reference in zip(pair, (chosen, rejected), references, strict=True)
        ]
        sums = preference_losses(config, *answers).sums()
        return sums.loss / sums.weight, {name: value / sums.weight for name, value in sums.metrics.items()}

    found, gradient = jax.value_and_grad(mean, has_aux=True)((chosen[0], rejected[0]))
    return found, np.concatenate(gradient)


def _dpo(config, chosen, rejected, references, loss_types, loss_weights):
    """(loss, gradient, metrics) of DPOTrainer."""
    summed = [
        _tensor(jnp.sum(jnp.where(answers[2], reference, 0), axis=1))
        for answers, reference in zip((chosen, rejected), references, strict=True)
    ]
    leaf, inputs = _pairs(chosen, rejected)
    trainer = _trainer(
        trl.DPOTrainer, loss_types=loss_types, loss_weights=loss_weights, beta=config.beta, f_divergence_type="reverse_kl",
        label_smoothing=config.label_smoothing, ld_alpha=None, precompute_ref_logps=True, use_weighting=False,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs |= {"ref_chosen_logps": summed[0], "ref_rejected_logps": summed[1]}
    loss = trainer._compute_loss(_model(leaf), inputs, return_outputs=False)
    loss.backward()
    return loss.item(), leaf.grad, trainer._metrics["train"]


@pytest.mark.parametrize("name", _PREFERENCE)
def test_preference_losses(name):
    config = preference_member(name, beta=0.7)
    pair = _draw(1), _draw(2)
    references = [answers[3]() for answers in pair]
    (loss, metrics), gradient = _ours(config, *pair, references)
    expected, expected_gradient, logged = _dpo(config, *pair, references, [_PREFERENCE[name]], [1.0])
    _equal(loss, expected)
    _equal(gradient, expected_gradient)
    same = {"chosen_log_prob": "logps/chosen", "rejected_log_prob": "logps/rejected"}
    if not config.length_normalized:  # TRL's rewards are of sums, whatever the loss
        same |= {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected"}
        same |= {"reward_margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    for ours, theirs in same.items():
        _equal(metrics[ours], logged[theirs][0])


def test_dpo_with_an_sft_term_where_answers_are_equally_long():
    """Elsewhere TRL's term is a mean over the tokens of all chosen answers of a micro-batch, which does not add up."""
    config = preference_member("dpo", beta=0.7, sft_weight=0.3)
    chosen, rejected = _draw(1), _draw(2)
    chosen = (*chosen[:2], jnp.asarray(np.arange(SEQ) < np.full((ROWS, 1), 4)), chosen[3])
    references = [answers[3]() for answers in (chosen, rejected)]
    (loss, _), gradient = _ours(config, chosen, rejected, references)
    expected, expected_gradient, _ = _dpo(config, chosen, rejected, references, ["sigmoid", "sft"], [1.0, 0.3])
    _equal(loss, expected)
    _equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("name", "kind", "smoothing"),
    [("simpo", "simpo", 0), ("simpo", "simpo", 0.2), ("dpo", "sigmoid", 0.2), ("hinge", "hinge", 0), ("ipo", "ipo", 0)],
)
def test_losses_without_a_reference(monkeypatch, name, kind, smoothing):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo = importlib.import_module("trl.experimental.cpo")
    config = preference_member(name, beta=2.0, reference_free=True, label_smoothing=smoothing)
    chosen, rejected = _draw(1), _draw(2)
    (loss, metrics), gradient = _ours(config, chosen, rejected, (None, None))
    leaf, inputs = _pairs(chosen, rejected)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    log_probs = _model(leaf)(labels=labels).log_probs.sum(1)
    if config.length_normalized:
        log_probs = log_probs / inputs["completion_mask"].sum(1)
    trainer = _trainer(
        cpo.CPOTrainer, alpha=0.0, beta=2.0, loss_type=kind, simpo_gamma=config.margin, label_smoothing=config.label_smoothing
    )
    losses, rewards, _ = trainer.cpo_loss(*log_probs.chunk(2))
    losses.mean().backward()
    _equal(loss, losses.mean().item())
    _equal(gradient, leaf.grad)
    _equal(metrics["reward_chosen"], rewards.mean().item())


_POLICY_GRADIENT = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": MAX_TOKENS},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo"},
}
# Ranges that some of the ratios are beyond.
_OURS = {
    "dr_grpo": {"max_tokens": MAX_TOKENS}, "gspo": {"clip_low": 0.05, "clip_high": 0.1}, "cispo": {"ratio_cap": 1.3},
}  # fmt: skip


def _trl_policy_gradient(config, settings, logits, tokens, rollouts):
    """(loss, gradient by the logits, metrics) of GRPOTrainer."""
    import torch

    leaf = _tensor(logits).requires_grad_()
    mask, old = _tensor(rollouts.mask).long(), _tensor(rollouts.old_log_probs)
    importance = torch.exp(old - _tensor(rollouts.sampler_log_probs)).clamp(max=config.importance_cap or math.inf)
    settings = {"importance_sampling_level": "token"} | settings
    trainer = _trainer(
        trl.GRPOTrainer, args={"use_bias_correction_kl": config.kl_by_ratio}, beta=config.kl_weight, epsilon_low=config.clip_low,
        epsilon_high=config.ratio_cap or config.clip_high, use_vllm=config.importance_cap is not None, top_entropy_quantile=1.0,
        vllm_importance_sampling_correction=True, off_policy_mask_threshold=None, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, **settings,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1).long(), "prompt_mask": torch.ones(ROWS, 1).long(), "completion_ids": _tensor(tokens),
        "completion_mask": torch.ones(ROWS, SEQ).long(), "tool_mask": mask, "advantages": _tensor(rollouts.advantages),
        "old_per_token_logps": old, "ref_per_token_logps": _tensor(rollouts.reference_log_probs),
        "importance_sampling_ratio": importance, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trainer._compute_loss(_model(leaf), inputs)
    loss.backward()
    return loss.item(), leaf.grad, trainer._metrics["train"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"importance_cap": 1.2}, {"kl_weight": 0.1}, {"kl_weight": 0.1, "kl_by_ratio": False, "importance_cap": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("name", _POLICY_GRADIENT)
def test_policy_gradient_losses(name, changes, per_token):
    config = policy_gradient_member(name, **_OURS.get(name, {}) | changes)
    logits, tokens, mask, near = _draw(3)
    advantages = np.random.default_rng(4).normal(size=(ROWS, SEQ) if per_token else ROWS)
    rollouts = Rollouts(jnp.asarray(advantages), mask, near(), near(), near())

    def mean(logits):
        sums = policy_gradient_sums(config, _log_probs(logits, tokens), rollouts)
        return sums.loss / sums.weight, sums.metrics

    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(logits)
    expected, expected_gradient, logged = _trl_policy_gradient(config, _POLICY_GRADIENT[name], logits, tokens, rollouts)
    _equal(value, expected)
    _equal(gradient, expected_gradient)
    if config.ratio == "token":  # with one ratio for a sequence TRL's shares are of sequences
        low, high = (0, "cispo_clip_ratio") if name == "cispo" else (logged["clip_ratio/low_mean"][0], "clip_ratio/high_mean")
        _equal(metrics["clipped_low"] / metrics["tokens"], low, rtol=1e-6)  # TRL has them in float32
        _equal(metrics["clipped_high"] / metrics["tokens"], logged[high][0], rtol=1e-6)
        assert metrics["clipped_high"] > 0


@pytest.mark.parametrize(("name", "counted"), [("grpo", ROWS), ("dr_grpo", ROWS), ("gspo", ROWS), ("dapo", ROWS - 1)])
def test_an_answer_that_is_left_out_is_in_some_denominators_of_trls(name, counted):
    """There a truncated answer makes those of the others weigh less; here it is in none."""
    config = policy_gradient_member(name, **_OURS.get(name, {}))
    logits, tokens, mask, near = _draw(3)
    rollouts = Rollouts(jnp.asarray(np.random.default_rng(4).normal(size=ROWS)), mask.at[2].set(False), near(), near(), near())
    sums = policy_gradient_sums(config, _log_probs(logits, tokens), rollouts)
    expected, _, _ = _trl_policy_gradient(config, _POLICY_GRADIENT[name], logits, tokens, rollouts)
    _equal(sums.loss / sums.weight * (ROWS - 1) / counted, expected)


def test_the_overlong_penalty():
    lengths = [0, 70, 80, 85, 90, 100, 130]
    penalty = importlib.import_module("trl.rewards").get_soft_overlong_punishment(100, 20)
    expected = penalty(completion_ids=[[1] * length for length in lengths])
    np.testing.assert_allclose(overlong_penalty(jnp.array(lengths), max_tokens=100, buffer=20), expected)
