"""A mixture of SwiGLU experts behind a sigmoid router; no token is dropped."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lfm_jax.arrays import Hidden
from lfm_jax.kernels import grouped_matmul
from lfm_jax.models.config import ComputeConfig, MoEConfig
from lfm_jax.models.layers import PROJECTED, compute_dtype, parameter, project
from lfm_jax.sharding import (
    Pieces,
    exchange_rows,
    gather_shards,
    map_shards,
    shard_index,
    sum_and_scatter_shards,
    sum_shards,
)


class ExpertBias(nnx.Variable):
    """Added to the router's scores for the choice alone. It balances the load and carries no gradient."""


class Routed(NamedTuple):
    """What a router chose. counts: tokens that chose each expert, [experts] float32, without padding; experts: of each token,
    [batch, seq, top_k] int32."""

    counts: jax.Array
    experts: jax.Array


def _copies(x: jax.Array, tokens: jax.Array, places: jax.Array) -> jax.Array:
    """Rows of x, [tokens, embed], as often as they are chosen: row i of [copies, embed] is that of tokens[i]. places: where the
    copies of each token went, [top_k, tokens]. Nothing is sent back by scattering: `_sums` gathers."""
    del places
    return x.at[tokens].get(mode="promise_in_bounds")


def _sums(rows: jax.Array, tokens: jax.Array, places: jax.Array) -> jax.Array:
    """The sum of each token's copies, in float32: the transpose of `_copies`."""
    del tokens
    # One by one: a reduction over an axis as short as top_k takes the TPU five times as long.
    return sum(rows.at[place].get(mode="promise_in_bounds").astype(jnp.float32) for place in places).astype(rows.dtype)


def _transposed(function, transpose):
    """`function(x, tokens, places)` whose gradient is `transpose` with the same places."""
    differentiable = jax.custom_vjp(function)
    differentiable.defvjp(
        lambda x, *where: (function(x, *where), where), lambda where, gradient: (transpose(gradient, *where), None, None)
    )  # fmt: skip
    return differentiable


_spread, _collect = _transposed(_copies, _sums), _transposed(_sums, _copies)


def _by_expert(experts: jax.Array, count: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """Sorts the copies of tokens by expert; those of an id that is none of 0 to count - 1 go to the end.

    Args:
      experts: [top_k, tokens] int32.
    Returns:
      Which copy (of them all, flat) is in each place; (token in each place, places of each token's copies), for `_spread` and
      `_collect`; and the copies of each expert, [count].
    """
    ids = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1)
    order = jnp.argsort(ids, stable=True)
    where = order % experts.shape[1], jnp.argsort(order).reshape(experts.shape)
    return order, where, jnp.sum(ids[None, :] == jnp.arange(count)[:, None], axis=1, dtype=jnp.int32)


def _weighted(weights: jax.Array, order: jax.Array, where: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The weights [top_k, tokens] in the order of the sorted copies, [copies, 1]."""
    return _spread(weights.reshape(-1), order, where[1].reshape(1, -1))[:, None]


def _hidden(rows: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array, implementation: str) -> jax.Array:
    """silu(gate(row)) * up(row), [copies, mlp] float32."""
    both = grouped_matmul(rows, (gate, up), sizes, implementation=implementation)
    gates, ups = (checkpoint_name(array, PROJECTED).astype(jnp.float32) for array in both)
    return jax.nn.silu(gates) * ups


def expert_mlp(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, implementation: str
) -> jax.Array:
    """sum_k weights[k, t] * MLP_{experts[k, t]}(x[t]) as grouped matmuls over the tokens' copies sorted by expert.

    A copy is weighted before its last matmul: the gradient of the weight then comes with that of the hidden layer, and neither
    the copies' outputs nor the matmul that makes them are needed again.

    Args:
      x: [tokens, embed]; experts: [top_k, tokens] int32, where an id that is none of those here adds nothing;
      weights: [top_k, tokens] float32.
      gate, up: [experts, embed, mlp]; down: [experts, mlp, embed].
      implementation: of `grouped_matmul`.
    """
    order, where, sizes = _by_expert(experts, gate.shape[0])
    hidden = _hidden(_spread(x, *where), gate, up, sizes, implementation) * _weighted(weights, order, where)
    (out,) = grouped_matmul(hidden.astype(x.dtype), (down,), sizes, implementation=implementation)
    return _collect(out, *where)


def _gathered(config: MoEConfig, implementation: str, x, experts, weights, gate, up, down) -> jax.Array:
    """Devices that share the experts get each other's tokens, compute what their own experts add, and sum it up at home."""
    x = gather_shards(x, "expert", axis=0)
    experts, weights = (gather_shards(array, "expert", axis=1) for array in (experts, weights))
    experts = experts - gate.shape[0] * shard_index("expert")
    return sum_and_scatter_shards(expert_mlp(x, experts, weights, gate, up, down, implementation), "expert", axis=0)


def _exchanged(config: MoEConfig, implementation: str, x, experts, weights, gate, up, down) -> jax.Array:
    """Every copy of a token travels to the device that has its expert and back home, where it is weighted.

    All copies might go to one device, so each has room for the copies of all.
    """
    owned, (top_k, tokens) = gate.shape[0], experts.shape
    order, where, sizes = _by_expert(experts, config.num_experts)
    outgoing, incoming, groups = _pieces(gather_shards(sizes[None], "expert", axis=0), owned, shard_index("expert"))
    room = config.num_experts // owned * tokens * min(top_k, owned)
    rows = exchange_rows(_spread(x, *where), "expert", room, outgoing, incoming)
    hidden = _hidden(rows, gate, up, groups, implementation).astype(x.dtype)
    (out,) = grouped_matmul(hidden, (down,), groups, implementation=implementation)
    out = exchange_rows(out, "expert", top_k * tokens, incoming, outgoing)
    return _collect((out.astype(jnp.float32) * _weighted(weights, order, where)).astype(x.dtype), *where)


def _pieces(sizes: jax.Array, owned: int, device: jax.Array) -> tuple[Pieces, Pieces, jax.Array]:
    """What this device sends and gets, a piece for each expert, and the copies that its own experts get.

    It has its own copies sorted by expert, and those for its experts sorted by expert, then by the device that they come from.

    Args:
      sizes: [devices, experts], copies that each device has for each expert.
      owned: experts of a device.
    """
    devices, experts = sizes.shape
    total = jnp.sum(sizes, axis=0)
    among_owned = (jnp.cumsum(total.reshape(devices, owned), axis=1) - total.reshape(devices, owned)).reshape(1, experts)
    at_home = jnp.cumsum(sizes, axis=1) - sizes
    abroad = jnp.cumsum(sizes, axis=0) - sizes + among_owned
    own = lambda table: jax.lax.dynamic_slice_in_dim(table, device * owned, owned, axis=table.ndim - 1)
    outgoing = Pieces(at_home[device], abroad[device], sizes[device])
    incoming = Pieces(*(own(table).reshape(-1) for table in (abroad, at_home, sizes)))
    return outgoing, incoming, own(total)


_OVER_DEVICES = {"gather": _gathered, "all_to_all": _exchanged}


def _on_shard(config: MoEConfig, implementation: str, exchange: str, x, experts, weights, gate, up, down) -> jax.Array:
    """`expert_mlp` where this device has a part of the tokens, of the experts, and of the width of each.

    Args:
      x: [batch, seq, embed]; experts, weights: [top_k, batch, seq].
    """
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    experts, weights = (array.reshape(config.experts_per_token, -1) for array in (experts, weights))
    if gate.shape[0] < config.num_experts:
        out = _OVER_DEVICES[exchange](config, implementation, x, experts, weights, gate, up, down)
    else:
        out = expert_mlp(x, experts, weights, gate, up, down, implementation)
    if gate.shape[2] < config.mlp_dim:
        out = sum_shards(out, "mlp")
    return out.reshape(shape)


class MoE(nnx.Module):
    """Router and experts (LFM2-MoE; transformers `Lfm2MoeSparseMoeBlock`).

    Scores are sigmoids of the router's logits. The top k are chosen on score + bias and weighted by the scores alone, divided by
    their sum (+ 1e-6) if `normalize_weights`, times `scaling_factor`. The router works in float32, and so do its
    products, which TPUs would take in bfloat16 by default.
    """

    def __init__(self, embed: int, config: MoEConfig, compute: ComputeConfig, *, residual_gain: float, rngs: nnx.Rngs):
        self.config, self.dtype = config, compute_dtype(compute)
        self.implementation, self.exchange = compute.grouped_matmul, compute.expert_exchange
        experts, mlp = config.num_experts, config.mlp_dim
        self.router = parameter(rngs, (embed, experts), ("embed", None), embed, jnp.dtype(jnp.float32))
        self.gate = parameter(rngs, (experts, embed, mlp), ("expert", "embed", "mlp"), embed, self.dtype)
        self.up = parameter(rngs, (experts, embed, mlp), ("expert", "embed", "mlp"), embed, self.dtype)
        self.down = parameter(rngs, (experts, mlp, embed), ("expert", "mlp", "embed"), mlp, self.dtype, residual_gain)
        if config.expert_bias:
            self.expert_bias = ExpertBias(jnp.zeros(experts), axes=(None,))

    def route(self, x: Hidden, replayed: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The experts of each token, int32, their weights, float32, and what the router chose; [batch, seq, top_k] each.

        Args:
          replayed: experts in place of the router's choice, [batch, seq, top_k] int32, those of a token all negative where it
            goes as the router says. Their weights are made of the router's own scores, and have its gradient, either way.
        """
        logits = project(x.astype(jnp.float32), self.router[...], precision="highest")
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.expert_bias[...][None, None, :] if self.config.expert_bias else scores
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(choice), self.config.experts_per_token)
        experts = chosen if replayed is None else jnp.where(replayed < 0, chosen, replayed)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-6)
        return experts, weights * self.config.scaling_factor, chosen

    def __call__(self, x: Hidden, valid: jax.Array | None, replayed: jax.Array | None = None) -> tuple[Hidden, Routed]:
        """The output, and the router's own choice, also where other experts are `replayed`. valid: False for padding."""
        experts, weights, choice = self.route(x, replayed)
        token, copies = ("batch", "seq", None), (None, "batch", "seq")
        matrices = [matrix[...].astype(self.dtype) for matrix in (self.gate, self.up, self.down)]
        # Each device sorts and multiplies its own tokens: a sort over the whole batch would move all of them.
        widening, narrowing = ("expert", None, "mlp"), ("expert", "mlp", None)
        by_choice = [jnp.moveaxis(array, -1, 0) for array in (experts, weights)]
        out = map_shards(
            functools.partial(_on_shard, self.config, self.implementation, self.exchange), [x, *by_choice, *matrices],
            [token, copies, copies, widening, widening, narrowing], token,
        )  # fmt: skip
        chosen = jax.nn.one_hot(choice, self.config.num_experts, dtype=jnp.float32)
        if valid is not None:
            chosen = chosen * valid[:, :, None, None].astype(jnp.float32)
        return out, Routed(jnp.sum(chosen, axis=(0, 1, 2)), choice)
