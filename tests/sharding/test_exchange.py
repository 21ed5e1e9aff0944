"""Rows exchanged between devices against a loop over the pieces, and back again for the gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.sharding import MeshConfig, Pieces, exchange_rows, make_mesh, map_shards

DEVICES, PIECES, ROWS, ROOM = 4, 2, 16, 40


def _pieces():
    """Random pieces (some empty) with gaps between them, at the sender and at the receiver, of any order there.

    Returns [sender, receiver, piece]: first row at the sender, first row at the receiver, rows.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 3, (DEVICES, DEVICES, PIECES))
    packed = lambda sizes, gap: np.cumsum(sizes + gap) - sizes
    at_sender = np.stack([packed(sizes[device].ravel(), 0).reshape(DEVICES, PIECES) for device in range(DEVICES)])
    at_receiver = np.zeros_like(sizes)
    for device in range(DEVICES):
        shuffled = rng.permutation(DEVICES * PIECES)
        flat = np.empty(DEVICES * PIECES, int)
        flat[shuffled] = packed(sizes[:, device].ravel()[shuffled], 1)
        at_receiver[:, device] = flat.reshape(DEVICES, PIECES)
    return at_sender, at_receiver, sizes


def _exchanged(x, at_sender, at_receiver, sizes):
    out = np.full((DEVICES, ROOM, *x.shape[2:]), np.nan, np.float32)
    for sender, receiver, piece in np.ndindex(sizes.shape):
        start, goal, count = (table[sender, receiver, piece] for table in (at_sender, at_receiver, sizes))
        out[receiver, goal : goal + count] = x[sender, start : start + count]
    return out


def test_rows_arrive_where_they_are_sent_and_gradients_go_back():
    at_sender, at_receiver, sizes = _pieces()
    x, direction = (np.random.default_rng(1).normal(size=(DEVICES, rows, 3)).astype(np.float32) for rows in (ROWS, ROOM))
    flat = lambda table: jnp.asarray(table.reshape(-1), jnp.int32)
    turned = [flat(table.swapaxes(0, 1)) for table in (at_receiver, at_sender, sizes)]
    tables = [flat(at_sender), flat(at_receiver), flat(sizes), *turned]

    def on_shard(x, *tables):
        return exchange_rows(x, "expert", ROOM, Pieces(*tables[:3]), Pieces(*tables[3:]))

    def loss(x):
        axes = [("batch", None), *[("batch",)] * 6]
        out = map_shards(on_shard, [x, *tables], axes, ("batch", None))
        return jnp.sum(jnp.where(jnp.isnan(out), 0, out) * direction.reshape(-1, 3)), out

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, expert=DEVICES), jax.devices()[:DEVICES])):
        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x.reshape(-1, 3)))
    expected = _exchanged(x, at_sender, at_receiver, sizes)
    np.testing.assert_array_equal(np.asarray(out).reshape(expected.shape), expected)
    back = np.zeros_like(x)
    for sender, receiver, piece in np.ndindex(sizes.shape):
        start, goal, count = (table[sender, receiver, piece] for table in (at_sender, at_receiver, sizes))
        back[sender, start : start + count] = direction[receiver, goal : goal + count]
    sent = np.isfinite(np.asarray(gradient)).reshape(x.shape)
    assert sent.sum() == 3 * sizes.sum()
    np.testing.assert_array_equal(np.where(sent, np.asarray(gradient).reshape(x.shape), 0), back)
