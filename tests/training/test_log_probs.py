"""Log-probabilities of targets, block by block, against a softmax over all logits, in both directions and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training.cross_entropy import drawn_log_probs, linear_log_probs

HIDDEN, HEAD = np.random.default_rng(0).normal(size=(4, 6, 8)), np.random.default_rng(1).normal(size=(40, 8))
TARGETS = np.random.default_rng(2).integers(0, 40, (4, 6)).astype(np.int32)
SLOPES = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)


def _plain(hidden, head):
    logits = jnp.einsum("bte,ve->btv", hidden, head)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=-1)[..., 0]


def _both_ways(function, hidden, head):
    value, transpose = jax.vjp(function, hidden, head)
    return value, *transpose(jnp.asarray(SLOPES))


@pytest.mark.parametrize("block", [1, 5, 24, 100])
def test_values_and_gradients_are_those_of_a_softmax_over_all_logits(block):
    given = [jnp.asarray(array, jnp.float32) for array in (HIDDEN, HEAD)]
    blocked = jax.jit(lambda *each: _both_ways(lambda *two: linear_log_probs(*two, TARGETS, block=block), *each))
    for found, expected in zip(blocked(*given), _both_ways(_plain, *given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_split_over_rows_sequences_and_vocabulary_it_is_the_same():
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    place = lambda array, *spec: jax.device_put(jnp.asarray(array, jnp.float32), NamedSharding(mesh, PartitionSpec(*spec)))
    given = place(HIDDEN, "data", "context"), place(HEAD, "tensor")

    @jax.jit
    def blocked(*each):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _both_ways(lambda *two: linear_log_probs(*two, TARGETS, block=5), *each)

    expected = _both_ways(_plain, *(jnp.asarray(array, jnp.float32) for array in (HIDDEN, HEAD)))
    for found, wanted in zip(blocked(*given), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_low_precision_comes_out_as_float32_and_gradients_in_their_own_types():
    hidden, head = (jnp.asarray(array, jnp.bfloat16) for array in (HIDDEN, HEAD))
    value, *gradients = _both_ways(lambda *two: linear_log_probs(*two, TARGETS, block=7), hidden, head)
    assert value.dtype == jnp.float32 and {each.dtype for each in gradients} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, _plain(*(each.astype(jnp.float32) for each in (hidden, head))), atol=0.05)


KNOWN = 37
TEMPERATURE = np.array([[0.6], [1.0], [1.3], [0.0]]) * np.array([1, 1, 1, 0.5, 1, 1])  # of each token; 0 counts as 1
KEPT = np.random.default_rng(4).random((4, 6, 40)) < 0.3
np.put_along_axis(KEPT, TARGETS[..., None], True, axis=2)
KEPT[:, 1] = KEPT[0, 0] = False  # which keeps all
KEPT[3, 5, TARGETS[3, 5]] = False  # a token that could not be drawn
OUT = (TARGETS >= KNOWN) | (np.arange(24).reshape(4, 6) == 23)


def _packed(kept):
    """Bit sets by Python's integers."""
    sets = [[sum(1 << int(id) for id in np.flatnonzero(ids)) for ids in row] for row in kept]
    return np.array([[[each >> 32 * word & 0xFFFFFFFF for word in range(2)] for each in row] for row in sets], np.uint32)


def _drawn_plain(hidden, head):
    """(log-probabilities, entropies) from all logits in float64."""
    logits = np.einsum("bte,ve->btv", hidden, head) / np.where(TEMPERATURE > 0, TEMPERATURE, 1)[..., None]
    allowed = (KEPT | ~KEPT.any(axis=2, keepdims=True)) & (np.arange(40) < KNOWN)
    log_probs = scipy.special.log_softmax(np.where(allowed, logits, -np.inf), axis=2)
    probs = np.exp(log_probs)
    return np.take_along_axis(log_probs, TARGETS[..., None], axis=2)[..., 0], scipy.special.entr(probs).sum(axis=2)


def _drawn_slopes(hidden, head):
    """The gradients of the sum of SLOPES times the log-probabilities, from the softmax's own, (onehot - p) / temperature."""
    divisor = np.where(TEMPERATURE > 0, TEMPERATURE, 1)[..., None]
    logits = np.einsum("bte,ve->btv", hidden, head) / divisor
    allowed = (KEPT | ~KEPT.any(axis=2, keepdims=True)) & (np.arange(40) < KNOWN)
    probs = scipy.special.softmax(np.where(allowed, logits, -np.inf), axis=2)
    by_logits = SLOPES[..., None] * ((np.arange(40) == TARGETS[..., None]) - probs) * allowed / divisor
    return np.einsum("btv,ve->bte", by_logits, head), np.einsum("btv,bte->ve", by_logits, hidden)


def _drawn_both_ways(hidden, head, temperature, kept, block):
    drawn = lambda hidden, head: drawn_log_probs(hidden, head, TARGETS, temperature, kept, known=KNOWN, block=block)
    (log_probs, entropy), transpose = jax.vjp(drawn, hidden, head)
    return log_probs, entropy, *transpose(type(drawn(hidden, head))(jnp.asarray(SLOPES), jnp.ones_like(entropy)))


def _assert_drawn(found, rtol=1e-5):
    wanted = *_drawn_plain(HIDDEN, HEAD), *_drawn_slopes(HIDDEN, HEAD)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-5)
    assert (np.isneginf(np.asarray(found[0])) == OUT).all() and OUT.sum() > 1


@pytest.mark.parametrize("block", [5, 24])
def test_the_distribution_drawn_from_has_temperature_and_only_what_was_kept_and_is_known(block):
    given = (*(jnp.asarray(array, jnp.float32) for array in (HIDDEN, HEAD, TEMPERATURE)), _packed(KEPT))
    _assert_drawn(jax.jit(lambda *each: _drawn_both_ways(*each, block))(*given))


@pytest.mark.parametrize("tensor", [2, 4])
def test_split_over_rows_sequences_and_vocabulary_it_is_drawn_from_the_same(tensor):
    """Parts of the vocabulary of 10 begin amid a word of the bit sets."""
    mesh = make_mesh(MeshConfig(data=4 // tensor, context=2, tensor=tensor))
    place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    hidden, head, temperature = (np.asarray(array, np.float32) for array in (HIDDEN, HEAD, TEMPERATURE))
    rows = ("data", "context")
    given = place(hidden, *rows), place(head, "tensor"), place(temperature, *rows), place(_packed(KEPT), *rows)

    @jax.jit
    def blocked(*each):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return _drawn_both_ways(*each, 5)

    _assert_drawn(blocked(*given))


def test_one_temperature_a_row_is_that_of_all_its_tokens():
    given = [jnp.asarray(array, jnp.float32) for array in (HIDDEN, HEAD)]
    by_row, each = np.float32([0.6, 1, 1.3, 2]), np.float32([0.6, 1, 1.3, 2])[:, None].repeat(6, axis=1)
    drawn = jax.jit(lambda temperature: drawn_log_probs(*given, TARGETS, temperature, known=None, block=7))
    jax.tree.map(np.testing.assert_array_equal, drawn(by_row), drawn(each))
    logits = np.einsum("bte,ve->btv", HIDDEN, HEAD) / each[..., None]
    expected = np.take_along_axis(scipy.special.log_softmax(logits, axis=2), TARGETS[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(drawn(by_row).of_targets, expected, rtol=1e-5, atol=1e-5)
