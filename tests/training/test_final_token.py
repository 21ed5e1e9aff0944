"""Final-token preference optimisation against its formula over single positions, and of a decoder against forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.models import Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import place_batch
from lfm_jax.training.final_token import (
    FinalTokenConfig,
    final_token_losses,
    final_token_objective,
    make_final_token_logits_step,
)
from lfm_jax.training.state import parameter_shardings

PAIRS, VOCAB, CHOICES = 6, 11, 3
OTHER = FinalTokenConfig(margin=1.5, temperature=0.7, tether=0.3, target_tether=0.2, tolerance=0.25)
MODEL = ModelConfig(
    vocab_size=64, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)
SEQ = 16


def _positions(choices=(3, 1, 2, 3, 0, 2)):
    """Of some positions fewer tokens are chosen, and of one none."""
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(VOCAB)[: CHOICES + 1] for _ in range(PAIRS)])
    mask = np.arange(CHOICES) < np.asarray(choices)[:, None]
    chosen, rejected = np.where(mask, tokens[:, :CHOICES], 0), tokens[:, CHOICES]  # 0 may be the rejected one as well
    logits, reference = 2 * rng.normal(size=(2, PAIRS, VOCAB))
    return logits, reference, chosen, mask, rejected


def _formula(config, logits, reference, chosen, rejected):
    """Of one position, with the ids of its chosen tokens."""
    preference = 0.0
    for token in chosen:
        missing = config.margin - (logits[token] - logits[rejected])
        preference += min(max(missing / config.margin, 0), 1) * np.log1p(np.exp(missing / config.temperature)) / len(chosen)
    targets = {*chosen, rejected}
    others = [(logits[token] - reference[token]) ** 2 for token in range(len(logits)) if token not in targets]
    excess = [max(abs(logits[token] - reference[token]) - config.tolerance, 0) ** 2 for token in targets]
    return preference + config.tether * np.mean(others) + config.target_tether * np.mean(excess)


@pytest.mark.parametrize("config", [FinalTokenConfig(), OTHER])
def test_values_and_gradients_are_those_of_the_formula(config):
    """The weight has a gradient as well; the reference has none, nor has padding."""
    given = _positions()
    with jax.enable_x64(True):
        arrays = [jnp.asarray(array) for array in given]
        loss = lambda logits, reference: final_token_losses(config, logits, reference, *arrays[2:]).sums().loss
        gradient, of_reference = jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(*arrays[:2]))
        found = jax.device_get(jax.jit(lambda *given: final_token_losses(config, *given))(*arrays))
    assert not of_reference.any()
    for row, (logits, reference, chosen, mask, rejected) in enumerate(zip(*given, strict=True)):
        ids = chosen[mask].tolist()
        assert found.weight[row] == bool(ids)
        if not ids:
            assert not gradient[row].any() and not found.loss[row] and not any(m[row] for m in found.metrics.values())
            continue
        of = lambda logits, reference=reference, ids=ids, rejected=rejected: _formula(config, logits, reference, ids, rejected)
        np.testing.assert_allclose(found.loss[row], of(logits), rtol=1e-12)
        differences = [(of(logits + step) - of(logits - step)) / 2e-6 for step in 1e-6 * np.eye(VOCAB)]
        np.testing.assert_allclose(gradient[row], differences, rtol=1e-6, atol=1e-8)
        shares, leads = np.exp(logits) / np.exp(logits).sum(), logits[ids] - logits[rejected]
        wanted = {
            "chosen_win": np.mean(leads > 0), "satisfied": np.mean(leads >= config.margin), "lead": leads.mean(),
            "rejected_probability": shares[rejected], "chosen_probability": shares[ids].sum(),
        }  # fmt: skip
        for name, value in wanted.items():
            np.testing.assert_allclose(found.metrics[name][row], value, rtol=1e-12, err_msg=name)


def test_beyond_the_margin_nothing_is_learnt_and_the_tethers_pull_back():
    """Token 0 is rejected, token 1 chosen, and by the reference it leads by more than the margin."""
    given = jnp.array([[1]]), jnp.ones((1, 1)), jnp.array([0])
    gradient_of = jax.jit(jax.grad(lambda *each: final_token_losses(FinalTokenConfig(), *each, *given).sums().loss))
    reference = jnp.array([[-1.25, 1.25, 0.0, 0.0, 0.0]])
    by = lambda *change: np.asarray(gradient_of(reference + jnp.array([change]), reference))[0]
    assert not by(0.0, 0.0, 0.0, 0.0, 0.0).any() and not by(-0.4, 0.5, 0.0, 0.0, 0.0).any()
    np.testing.assert_allclose(by(0.0, 0.0, 0.6, -0.3, 0.0), 0.4 * 2 * np.array([0, 0, 0.6, -0.3, 0]) / 3, rtol=1e-6)
    np.testing.assert_allclose(by(-1.0, 0.6, 0.0, 0.0, 0.0), 0.05 * 2 * np.array([-0.5, 0.1, 0, 0, 0]) / 2, rtol=1e-5)
    within = by(0.4, -0.4, 0.0, 0.0, 0.0)
    assert within[0] > 0 > within[1] and not within[2:].any(), "the rejected one falls, the chosen one rises"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0}, "margin and temperature must be positive, got 0 and 1.0"),
        ({"temperature": -1}, "margin and temperature must be positive, got 2.0 and -1"),
        ({"tether": -0.1}, "must not be negative, got -0.1, 0.05 and 0.5"),
    ],
)
def test_settings_that_make_no_loss_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FinalTokenConfig(**changes)


@pytest.fixture(scope="module")
def decoder():
    functions = functional(lambda rngs: Decoder(MODEL, rngs=rngs))
    return functions, *functions.init(jax.random.key(0))


def _batch():
    """Eight rows: texts of all lengths, and one row of padding; behind a text stands noise, which nothing may see."""
    rng = np.random.default_rng(1)
    lengths = [1, 2, 5, SEQ, 9, 12, 3, 0]
    batch = {name: rng.integers(0, 64, (8, SEQ), dtype=np.int32) for name in ("tokens", "targets")}
    column = np.arange(SEQ)[None]
    inside = column < np.array(lengths)[:, None]
    batch["segment_ids"] = inside.astype(np.int32)
    batch["positions"] = np.where(inside, column, 0).astype(np.int32)
    batch["loss_mask"] = (column == np.array(lengths)[:, None] - 1).astype(np.float32)
    batch["chosen"] = np.full((8, 8), -1, np.int32)
    for row, length in enumerate(lengths):
        if length:
            others = np.setdiff1d(np.arange(64), batch["targets"][row, length - 1])
            batch["chosen"][row, : 1 + row] = rng.permutation(others)[: 1 + row]
    batch["reference_logits"] = rng.normal(size=(8, 64)).astype(np.float32)
    return batch, lengths


def _sums_and_gradient(functions, params, buffers, batch, mesh):
    def sums(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = final_token_objective(FinalTokenConfig())(functions.bind(params, buffers), batch, jax.random.key(0))
        return found.loss, found

    compiled = jax.jit(jax.grad(sums, has_aux=True))
    params = jax.tree.map(jax.device_put, params, parameter_shardings(functions, mesh))
    gradient, found = compiled(params, place_batch(batch, mesh))
    return jax.device_get(found), jax.device_get(gradient)


@pytest.fixture(scope="module")
def alone(decoder):
    batch, _ = _batch()
    return _sums_and_gradient(*decoder, batch, make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1]))


def test_a_rows_logits_are_those_of_its_text_alone(decoder, alone):
    functions, params, buffers = decoder
    batch, lengths = _batch()
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    found = np.asarray(make_final_token_logits_step(functions, mesh)(params, buffers, place_batch(batch, mesh)))

    @jax.jit
    def every(tokens):
        model = functions.bind(params, buffers)
        return model.logits(model(tokens).hidden)

    texts, rows = every(np.where(batch["segment_ids"] > 0, batch["tokens"], 0)), []
    for row, length in enumerate(lengths[:-1]):
        logits = np.asarray(texts)[row, length - 1]
        np.testing.assert_allclose(found[row], logits, rtol=1e-4, atol=1e-5)
        ids, rejected = batch["chosen"][row, : 1 + row].tolist(), int(batch["targets"][row, length - 1])
        rows.append(_formula(FinalTokenConfig(), np.float64(logits), batch["reference_logits"][row], ids, rejected))
    assert alone[0].weight == 7 and alone[0].loss == pytest.approx(sum(rows), rel=1e-5)


def test_split_over_rows_sequences_and_vocabulary_it_is_the_same(decoder, alone):
    batch, _ = _batch()
    other = _sums_and_gradient(*decoder, batch, make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2)))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5), alone, other)


def test_there_are_never_logits_of_a_whole_sequence(decoder):
    functions, params, buffers = decoder
    batch, _ = _batch()
    objective = lambda params: final_token_objective(FinalTokenConfig())(functions.bind(params, buffers), batch, None).loss
    program = str(jax.make_jaxpr(jax.grad(objective))(params))
    assert "f32[8,1,64]" in program and f"[8,{SEQ},64]" not in program and f"[{8 * SEQ},64]" not in program
