"""The expert bias beside the parameters: float32 whatever the model computes in, centred, and in the checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import OptimizerConfig, abstract_state, init_state, make_optimizer
from lfm_jax.training.checkpoint import Checkpoints
from lfm_jax.training.step import _balanced

CONFIG = ModelConfig(
    vocab_size=16, embed_dim=8, layer_types=("conv",), num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=0),
)  # fmt: skip


def test_expert_bias_is_float32_centred_and_in_the_checkpoint(tmp_path):
    functions = functional(lambda rngs: Decoder(CONFIG, ComputeConfig(dtype="bfloat16"), rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = init_state(functions, optimizer, make_mesh(MeshConfig(fsdp=2, expert=4)), seed=0)
    buffers = state.buffers
    for counts in ([9, 1, 1, 1], [5, 4, 2, 1], [0, 0, 8, 4]):
        buffers = _balanced(buffers, jnp.asarray([counts], jnp.float32), 1e-3)
    (bias,) = jax.tree.leaves(buffers)
    assert bias.dtype == jnp.float32
    # -1 1 1 1, -1 -1 1 1 and 1 1 -1 -1 thousandths, each less its mean.
    np.testing.assert_allclose(bias, np.array([-1.5, 0.5, 0.5, 0.5]) * 1e-3, atol=1e-9)
    np.testing.assert_allclose(jnp.sum(bias), 0, atol=1e-9)

    checkpoints = Checkpoints(epath.Path(tmp_path))
    checkpoints.save(state._replace(buffers=buffers), data_state={}, config={})
    checkpoints.wait()
    restored = checkpoints.restore(abstract_state(functions, optimizer, make_mesh(MeshConfig(fsdp=8)))).state
    jax.tree.map(np.testing.assert_array_equal, restored.buffers, buffers)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.buffers)} == {jnp.dtype("float32")}
