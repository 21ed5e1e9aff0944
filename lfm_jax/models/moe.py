"""A mixture of SwiGLU experts behind a sigmoid router; no token is dropped."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.arrays import Hidden
from lfm_jax.models.config import MoEConfig
from lfm_jax.models.layers import parameter, project
from lfm_jax.sharding import gather_shards, map_shards, shard_index, sum_and_scatter_shards, sum_shards


class ExpertBias(nnx.Variable):
    """Added to the router's scores for the choice alone. It balances the load and carries no gradient."""


def expert_mlp(
    x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
    """sum_k weights[t, k] * MLP_{experts[t, k]}(x[t]) as three grouped matmuls over the tokens sorted by expert.

    Args:
      x: [batch, seq, embed]; experts: [batch, seq, top_k] int32, where an id that is none of those here adds nothing;
      weights: [batch, seq, top_k] float32.
      gate, up: [experts, embed, mlp]; down: [experts, mlp, embed].
    """
    top_k, embed, count = experts.shape[-1], x.shape[-1], gate.shape[0]
    here = (experts >= 0) & (experts < count)
    experts = jnp.where(here, experts, count).reshape(-1)  # the others go to the end, behind all groups
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.bincount(experts, length=count).astype(jnp.int32)
    grouped = x.reshape(-1, embed)[order // top_k]
    # What a grouped matmul leaves behind its last group need not be a number, nor what its gradient does.
    grouped = jnp.where((jnp.arange(experts.size) < jnp.sum(sizes))[:, None], grouped, 0)
    hidden = jax.nn.silu(jax.lax.ragged_dot(grouped, gate, sizes)) * jax.lax.ragged_dot(grouped, up, sizes)
    out = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)].reshape(*here.shape, embed)
    out = jnp.where(here[..., None], out.astype(jnp.float32), 0.0)
    return jnp.einsum("bske,bsk->bse", out, weights).astype(x.dtype)


def _on_shard(config: MoEConfig, x, experts, weights, gate, up, down):
    """`expert_mlp` where this device has a part of the tokens, of the experts, and of the width of each.

    Devices that share the experts get each other's tokens, compute what their own experts add to them, and sum it up at home.
    """
    owned = gate.shape[0]
    shared = owned < config.num_experts
    if shared:
        x, experts, weights = (gather_shards(array, "expert", axis=0) for array in (x, experts, weights))
        experts = experts - owned * shard_index("expert")
    out = expert_mlp(x, experts, weights, gate, up, down)
    if gate.shape[2] < config.mlp_dim:
        out = sum_shards(out, "mlp")
    return sum_and_scatter_shards(out, "expert", axis=0) if shared else out


class MoE(nnx.Module):
    """Router and experts (LFM2-MoE; transformers `Lfm2MoeSparseMoeBlock`).

    Scores are sigmoids of the router's logits. The top k are chosen on score + bias and weighted by the scores alone, divided by
    their sum (+ 1e-6) if `normalize_weights`, times `scaling_factor`. The router works in float32.
    """

    def __init__(self, embed: int, config: MoEConfig, *, residual_gain: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        experts, mlp = config.num_experts, config.mlp_dim
        self.router = parameter(rngs, (embed, experts), ("embed", None), embed, jnp.dtype(jnp.float32))
        self.gate = parameter(rngs, (experts, embed, mlp), ("expert", "embed", "mlp"), embed, dtype)
        self.up = parameter(rngs, (experts, embed, mlp), ("expert", "embed", "mlp"), embed, dtype)
        self.down = parameter(rngs, (experts, mlp, embed), ("expert", "mlp", "embed"), mlp, dtype, residual_gain)
        if config.expert_bias:
            self.expert_bias = ExpertBias(jnp.zeros(experts), axes=(None,))
        self.config = config
        self.dtype = dtype

    def route(self, x: Hidden) -> tuple[jax.Array, jax.Array]:
        """The chosen experts [batch, seq, top_k] int32 and their weights [batch, seq, top_k] float32."""
        logits = project(x.astype(jnp.float32), self.router[...])
        scores = jax.nn.sigmoid(logits)
        choice = scores + self.expert_bias[...][None, None, :] if self.config.expert_bias else scores
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(choice), self.config.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-6)
        return experts, weights * self.config.scaling_factor

    def __call__(self, x: Hidden, valid: jax.Array | None) -> tuple[Hidden, jax.Array]:
        """The output and the tokens that chose each expert, [experts] float32, padding (valid False) not counted."""
        experts, weights = self.route(x)
        token = ("batch", "seq", None)
        matrices = [matrix[...].astype(self.dtype) for matrix in (self.gate, self.up, self.down)]
        # Each device sorts and multiplies its own tokens: a sort over the whole batch would move all of them.
        widening, narrowing = ("expert", None, "mlp"), ("expert", "mlp", None)
        out = map_shards(
            functools.partial(_on_shard, self.config), [x, experts, weights, *matrices],
            [token, token, token, widening, widening, narrowing], token,
        )  # fmt: skip
        chosen = jax.nn.one_hot(experts, self.config.num_experts, dtype=jnp.float32)
        if valid is not None:
            chosen = chosen * valid[:, :, None, None].astype(jnp.float32)
        return out, jnp.sum(chosen, axis=(0, 1, 2))
