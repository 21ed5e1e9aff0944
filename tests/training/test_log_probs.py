"""Log-probabilities of targets, block by block, against a softmax over all logits, in both directions and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training.cross_entropy import linear_log_probs

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
