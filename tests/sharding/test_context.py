"""Sequences over devices: who has which chunk, and what stands before it."""

import jax
import numpy as np
import pytest

from lfm_jax.configuration import ConfigError
from lfm_jax.sharding import CHUNKS, MeshConfig, dealt_order, ends_before, make_mesh, map_shards, shard_count


def test_every_device_gets_the_same_share_of_causal_attention():
    mesh = make_mesh(MeshConfig(fsdp=1, context=8))
    order = dealt_order(96, mesh.shape["context"])
    assert sorted(order) == list(range(96))
    keys_seen = (order + 1).reshape(8, -1).sum(axis=1)
    assert len(set(keys_seen)) == 1
    np.testing.assert_array_equal(dealt_order(32, mesh.shape["context"])[:8], [0, 1, 30, 31, 2, 3, 28, 29])


def test_a_whole_sequence_stays_as_it_is():
    np.testing.assert_array_equal(dealt_order(7, 1), range(7))
    assert shard_count("seq") == 1


def test_a_sequence_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="a sequence of 24 does not divide into 2 chunks for each of context=8 devices; .*16"):
        dealt_order(24, 8)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_ends_before_are_those_of_the_chunk_before_in_the_sequence(shards):
    """Against the whole sequence in its order."""
    mesh = make_mesh(MeshConfig(data=8 // shards, fsdp=1, context=shards))
    batch, size = 8 // shards, 3
    rows = np.random.default_rng(0).normal(size=(batch, CHUNKS * shards * size, 2)).astype(np.float32)
    order = dealt_order(rows.shape[1], mesh.shape["context"])

    def on_shard(x):
        chunks = x.reshape(x.shape[0], CHUNKS, size, 2)
        return ends_before(chunks[:, :, -1:]).reshape(x.shape[0], CHUNKS, 2)

    with jax.set_mesh(mesh):
        axes = ("batch", "seq", None)
        found = jax.jit(lambda x: map_shards(on_shard, [x], [axes], axes))(jax.device_put(rows[:, order]))
    expected = np.zeros((batch, CHUNKS * shards, 2), np.float32)
    expected[:, 1:] = rows[:, size - 1 :: size][:, :-1]
    first_of_each_chunk = order[::size] // size
    np.testing.assert_array_equal(found, expected[:, first_of_each_chunk])
