"""The next-token loss against PyTorch, formulas, and itself on the same documents laid out otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.extend.core import jaxprs_in_params

from lfm_jax.models import Decoder, DecoderOutput, ModelConfig, MoEConfig, functional
from lfm_jax.training import LossConfig, next_token_objective

VOCAB = 61
CONFIG = ModelConfig(
    vocab_size=VOCAB, tokenizer_vocab_size=50, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_dim=24,
)  # fmt: skip
UNTIED_MOE = dataclasses.replace(
    CONFIG, tie_embeddings=False, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=1)
)
LENGTHS = (5, 1, 4, 7, 3)  # of the documents
LAYOUT = ((0, 1, 2), (3, 4))  # documents of each packed row of 12


@functools.cache
def _model(config=CONFIG):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), functions.abstract_params)
    return functions, params, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), functions.abstract_buffers)


def _documents():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 50, size), rng.integers(0, 50, size), rng.integers(1, 4, size) / 2) for size in LENGTHS]


def _batch(layout, seq):
    """Documents of (tokens, targets, weights) behind each other in rows; what is left over is padding of arbitrary content."""
    rows = len(layout)
    batch = {
        "tokens": np.full((rows, seq), 33, np.int32),
        "targets": np.full((rows, seq), 44, np.int32),
        "segment_ids": np.zeros((rows, seq), np.int32),
        "positions": np.zeros((rows, seq), np.int32),
        "loss_mask": np.zeros((rows, seq), np.float32),
    }
    for row, members in enumerate(layout):
        start = 0
        for number, member in enumerate(members, 1):
            tokens, targets, weights = _documents()[member]
            values = (tokens, targets, number, np.arange(len(tokens)), weights)
            for name, value in zip(batch, values, strict=True):
                batch[name][row, start : start + len(tokens)] = value
            start += len(tokens)
    return jax.tree.map(jnp.asarray, batch)


PACKED = _batch(LAYOUT, 12)
PADDED = _batch([(0,), (1,), (2,), (3,), (4,)], 9)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums_and_gradient(functions, loss_config, params, buffers, batch):
    def loss(params):
        sums = next_token_objective(loss_config)(functions.bind(params, buffers), batch, jax.random.key(0))
        return sums.loss, sums

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return sums, gradient


def _evaluate(model_config, loss_config, batch):
    """Sums, and the gradient of the summed loss."""
    functions, params, buffers = _model(model_config)
    return _sums_and_gradient(functions, loss_config, params, buffers, batch)


@functools.cache
def _hidden():
    """Of `PACKED`, and the logits."""
    functions, params, buffers = _model()

    @jax.jit
    def forward(params, batch):
        bound = functions.bind(params, buffers)
        hidden = bound(batch["tokens"], batch["segment_ids"], batch["positions"]).hidden
        return hidden, bound.logits(hidden)

    return jax.tree.map(np.asarray, forward(params, PACKED))


def _assert_same(ours, theirs, tolerance=2e-5):
    """Each array within `tolerance` of its largest value: both sides are float32 sums, in another order."""
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(b).max()))
    jax.tree.map(near, ours, theirs)


@pytest.mark.parametrize("block, z_loss", [(512, 0.0), (5, 0.0), (512, 0.1), (5, 0.1)])
def test_loss_and_its_gradient_equal_torch_cross_entropy_over_the_whole_vocabulary(block, z_loss):
    """The gradients with respect to the head and to the hidden states, as a model returns them."""
    torch = pytest.importorskip("torch")
    config = LossConfig(block=block, z_loss=z_loss)
    sums, _ = _evaluate(CONFIG, config, PACKED)
    hidden, logits = _hidden()
    logits = torch.tensor(logits).reshape(-1, VOCAB)
    targets = torch.tensor(np.asarray(PACKED["targets"])).reshape(-1).long()
    weights = torch.tensor(np.asarray(PACKED["loss_mask"])).reshape(-1)
    cross_entropy = lambda logits: (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    whole_loss = lambda logits: cross_entropy(logits) + z_loss * (torch.logsumexp(logits, dim=-1) ** 2 * weights).sum()
    assert float(sums.loss) == pytest.approx(float(whole_loss(logits)), rel=1e-5)
    assert float(sums.metrics["nll"]) == pytest.approx(float(cross_entropy(logits)), rel=1e-5)
    assert (float(sums.metrics["nll"]) == float(sums.loss)) == (z_loss == 0)
    assert float(sums.weight) == float(weights.sum())

    class Head:
        """A model whose hidden states are given."""

        def __init__(self, table, hidden):
            self.head, self.hidden = table, hidden

        def __call__(self, tokens, segment_ids, positions):
            return DecoderOutput(self.hidden, None, None)

    loss = lambda *arrays: next_token_objective(config)(Head(*arrays), PACKED, jax.random.key(0)).loss
    embedding = _model()[1]["embed"]["embedding"]
    table = torch.tensor(np.asarray(embedding), requires_grad=True)
    states = torch.tensor(hidden, requires_grad=True)
    whole_loss(states.reshape(-1, CONFIG.embed_dim) @ table.T).backward()
    ours = jax.jit(jax.grad(loss, argnums=(0, 1)))(embedding, jnp.asarray(hidden))
    _assert_same(ours, (table.grad.numpy(), states.grad.numpy()))


def test_z_loss_is_the_squared_log_of_the_normalizer():
    sums, _ = _evaluate(CONFIG, LossConfig(z_loss=0.25), PACKED)
    square = scipy.special.logsumexp(_hidden()[1].astype(np.float64), axis=-1) ** 2
    expected = float(sums.metrics["nll"]) + 0.25 * np.sum(np.asarray(PACKED["loss_mask"], np.float64) * square)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [1, 5, 11])
def test_blocks_change_nothing(block):
    """Also those that do not divide the 24 tokens."""
    whole = _evaluate(CONFIG, LossConfig(z_loss=0.1), PACKED)
    _assert_same(_evaluate(CONFIG, LossConfig(z_loss=0.1, block=block), PACKED), whole)


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _shapes(inner)


def test_no_more_logits_than_a_block_of_them_ever_exist():
    functions, params, buffers = _model()
    traced = _sums_and_gradient.trace(functions, LossConfig(block=3), params, buffers, PACKED)
    logits = [shape for shape in _shapes(traced.jaxpr.jaxpr) if len(shape) > 1 and shape[-1] == VOCAB]
    assert (3, VOCAB) in logits
    assert max(np.prod(shape) for shape in logits) == 3 * VOCAB


@pytest.mark.parametrize("config", [CONFIG, UNTIED_MOE], ids=["dense", "moe"])
def test_packed_equals_padded_loss_and_grad(config):
    """Five documents in two rows of 12, and in five rows of 9."""
    loss = LossConfig(z_loss=0.1, block=5)
    _assert_same(_evaluate(config, loss, PACKED), _evaluate(config, loss, PADDED))


def test_loss_invariant_to_segment_relabelling():
    names = jnp.asarray([0, 7, 1, 1000])  # 0 stays padding
    relabelled = {**PACKED, "segment_ids": names[PACKED["segment_ids"]]}
    loss = LossConfig(block=5)
    jax.tree.map(np.testing.assert_array_equal, _evaluate(CONFIG, loss, relabelled), _evaluate(CONFIG, loss, PACKED))


def test_masked_tokens_take_no_part_in_loss_weight_or_gradient():
    """The last token of every row is masked, and the content of every masked target is arbitrary, even no id at all."""
    loss = LossConfig(z_loss=0.1)
    mask = PACKED["loss_mask"].at[:, 9].set(0.0)
    masked = _evaluate(CONFIG, loss, {**PACKED, "loss_mask": mask})
    other = {**PACKED, "loss_mask": mask, "targets": jnp.where(mask > 0, PACKED["targets"], -100)}
    jax.tree.map(np.testing.assert_array_equal, _evaluate(CONFIG, loss, other), masked)
    assert float(masked[0].weight) == float(mask.sum()) < float(PACKED["loss_mask"].sum())


def test_router_counts_are_of_tokens_without_padding():
    sums, _ = _evaluate(UNTIED_MOE, LossConfig(), PACKED)
    assert sums.router_counts.shape == (1, 4)
    assert float(sums.router_counts.sum()) == 2 * sum(LENGTHS)


@pytest.mark.parametrize(
    "settings, message",
    [({"z_loss": -1.0}, "z_loss must not be negative, got -1.0"), ({"block": 0}, "block must be at least 1 token, got 0")],
)
def test_impossible_settings_of_the_loss_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)
