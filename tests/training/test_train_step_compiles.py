"""The whole training step through the TPU compiler (Mosaic and XLA), for chips that are not there."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lfm_jax.models import ComputeConfig, Decoder, functional, preset
from lfm_jax.sharding import MeshConfig, activation_sharding, aot, make_mesh
from lfm_jax.training import (
    FinalTokenConfig,
    LossConfig,
    OptimizerConfig,
    abstract_state,
    final_token_objective,
    make_final_token_logits_step,
    make_log_probs_step,
    make_optimizer,
    make_policy_log_probs_step,
    make_train_step,
    next_token_objective,
    policy_gradient_member,
    policy_objective,
    preference_member,
    preference_objective,
)

pytest.importorskip("libtpu")

# The first blocks of the smallest preset, one of them attention, in one tile's width: what is compiled is the same, but sooner.
MODEL = dataclasses.replace(
    preset("nano"), layer_types=preset("nano").layer_types[:3], embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=64,
    mlp_dim=256, vocab_size=512,
)  # fmt: skip
ROWS_PER_CHIP, SEQ = 2, 512
AXES = ("batch", "seq")
PRE_TRAINING = next_token_objective(LossConfig(z_loss=1e-4, block=256))


def _abstract(mesh, more=(), rows=ROWS_PER_CHIP):
    """(the model, its optimizer, their state, a batch of so many rows for each device). more: arrays beside the usual ones."""
    # "auto" would be float32 here: what is traced on a CPU does not know yet what it is compiled for.
    compute = ComputeConfig(dtype="bfloat16", short_conv="pallas", remat="dots")
    functions = functional(lambda rngs: Decoder(MODEL, compute, rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(), 100)
    batch = {
        name: jax.ShapeDtypeStruct((rows * mesh.size, *shape), dtype, sharding=activation_sharding(mesh, AXES[: 1 + len(shape)]))
        for name, dtype, shape in (*_arrays(""), *more)
    }
    return functions, optimizer, abstract_state(functions, optimizer, mesh), batch


def _compiled(topology, chips, mesh_config, accumulation, slices=1, objective=PRE_TRAINING, more=()):
    """Forward, backward, clipping and AdamW, from shapes with shardings alone."""
    mesh = make_mesh(mesh_config, aot.tpu_devices(topology, slices)[:chips])
    functions, optimizer, state, batch = _abstract(mesh, more, ROWS_PER_CHIP * accumulation)
    step = make_train_step(functions, optimizer, objective, mesh, seed=0, accumulation=accumulation)
    return state, step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()


def _arrays(prefix):
    ids = [(f"{prefix}{name}", jnp.int32, (SEQ,)) for name in ("tokens", "targets", "segment_ids", "positions")]
    return [*ids, (f"{prefix}loss_mask", jnp.float32, (SEQ,))]


def _of_tokens(*names):
    return [(name, jnp.float32, (SEQ,)) for name in names]


# Of each: the loss, what its batch has beside the usual arrays, and the step that computes what is kept of another model.
POST_TRAINING = {
    "pairs": (
        preference_objective(preference_member("dpo_norm"), block=256),
        [*_arrays("rejected_"), *_of_tokens("reference_log_probs", "rejected_reference_log_probs")],
        functools.partial(make_log_probs_step, block=256),
    ),
    "final tokens": (
        final_token_objective(FinalTokenConfig()),
        [("reference_logits", jnp.float32, (MODEL.vocab_size,)), ("chosen", jnp.int32, (16,))],
        make_final_token_logits_step,
    ),
    "policy gradients": (
        policy_objective(policy_gradient_member("dapo"), block=256, known=None),
        [*_of_tokens("advantages", "sampler_log_probs", "old_log_probs"), ("temperature", jnp.float32, ())],
        functools.partial(make_policy_log_probs_step, block=256, known=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["final tokens", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("pairs", "policy gradients"))]
)
def test_steps_of_post_training_compile_on_16_chips(name):
    """On a mesh of replicas that share parameters and split matrices, training in two micro-batches, as on a pod."""
    objective, more, make_step = POST_TRAINING[name]
    mesh_config = MeshConfig(data=2, fsdp=4, tensor=2)
    _, compiled = _compiled("v5e:4x4", 16, mesh_config, 2, objective=objective, more=more)
    mesh = make_mesh(mesh_config, aot.tpu_devices("v5e:4x4"))
    functions, _, state, batch = _abstract(mesh, more)
    looked = make_step(functions, mesh).trace(state.params, state.buffers, batch).lower(lowering_platforms=("tpu",)).compile()
    kernels = [program.as_text().count('custom_call_target="tpu_custom_call"') for program in (compiled, looked)]
    assert kernels == [2 * 3 + 2, 3]  # as below, and forward alone: both answers of a pair are read together


@pytest.mark.parametrize(
    "topology, chips, mesh_config, accumulation",
    [
        pytest.param("v5e:2x2", 1, MeshConfig(), 1, marks=pytest.mark.heavy),
        pytest.param("v5e:2x2", 4, MeshConfig(data=2, fsdp=1, tensor=2), 1, marks=pytest.mark.heavy),
        ("v5e:4x4", 16, MeshConfig(data=2, fsdp=4, tensor=2), 2),
        ("v5p:2x2x4", 16, MeshConfig(fsdp=8, context=2), 1),
    ],
)
def test_training_step_with_pallas_compiles_on_16_chips(topology, chips, mesh_config, accumulation):
    state, compiled = _compiled(topology, chips, mesh_config, accumulation)
    text = compiled.as_text()
    # Two convolutions: forward, forward again in the backward pass ("dots" keeps only matmuls), and backward. Attention's output
    # is kept as well, and its backward pass is one kernel.
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * 3 + 2
    assert ("all-reduce" in text or "reduce-scatter" in text) == (chips > 1)
    # The state leaves with the shardings that it came with, in the memory that it came in.
    wrong = [
        jax.tree_util.keystr(path)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(compiled.output_shardings[0]), strict=True
        )
        if not sharding.is_equivalent_to(leaf.sharding, len(leaf.shape))
    ]
    assert not wrong
    memory, outputs = compiled.memory_analysis(), compiled.output_shardings
    # New are the metrics, each in a tile, and a table of all results.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 512 * len(outputs[1]) + 1024


def test_two_slices_meet_once_a_step_and_send_no_more_than_they_must():
    """Whatever the micro-batches: what crosses the data-centre network is not in the loop over them, nor in any other.

    A chip of a slice of four sends its share: of the gradient a quarter, a float32 each, of the new parameters an eighth, in
    bfloat16. That is 1.25 bytes a parameter; metrics and what is too small to be split come on top.
    """
    state, compiled = _compiled("v5e:2x2", 8, MeshConfig(data=2), 2, slices=2)
    program = compiled.as_text()
    _, _, outside_of_loops = program.partition("\nENTRY ")
    sent = lambda text: [line for line in text.splitlines() if " send(" in line and "xla_megascale_runtime" in line]
    assert " while(" in outside_of_loops and sent(program) and sent(program) == sent(outside_of_loops)
    arrays = [re.search(r"= \((f32|bf16)\[([\d,]*)\]", line).groups() for line in sent(program)]
    sizes = [{"f32": 4, "bf16": 2}[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays]
    assert 1.2 < sum(sizes) / sum(leaf.size for leaf in jax.tree.leaves(state.params)) < 1.4
