"""The engine's programs through the TPU compiler, for a mesh that splits parameters and vocabulary, as a pod's trainer does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.generation import SamplingConfig, slots
from lfm_jax.generation.sampling import needs_of, settings_of
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, aot, make_mesh
from lfm_jax.training import OptimizerConfig, abstract_state, make_optimizer

pytest.importorskip("libtpu")

MODEL = ModelConfig(
    vocab_size=512, embed_dim=128, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=256
)
ROWS, SLOTS = 16, 64
# All that a request can ask for.
SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_new_tokens=32)
ASKED = {"needs": needs_of([SAMPLING]), "top": 20, "tell": slots.Tell(drawn=True, kept=True)}


def test_prompts_are_read_and_answered_on_16_chips():
    functions = functional(lambda rngs: Decoder(MODEL, ComputeConfig(dtype="bfloat16"), rngs=rngs))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2), aot.tpu_devices("v5e:4x4"))
    state = abstract_state(functions, make_optimizer(OptimizerConfig(), 100), mesh)
    program = slots.Program(functions, MODEL, jnp.bfloat16, 64)
    rows = jax.eval_shape(lambda: slots.empty_rows(program, ROWS, 128))
    taken = jax.eval_shape(lambda: slots.empty_slots(program, SLOTS, 256, 1, True))
    ids = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32)
    numbers = lambda value: np.full(ROWS, value, np.int32)
    entry = slots.Entry(settings_of([SAMPLING] * ROWS), numbers(32), numbers(-1)[:, None], np.zeros((ROWS, 512), bool))
    model = program, state.params, state.buffers
    with jax.set_mesh(mesh):
        traced = (
            slots.prefill.trace(*model, rows, ids, ids),
            slots.insert.trace(*model, taken, rows, numbers(0), numbers(0), entry, **ASKED),
            slots.decode.trace(*model, taken, np.ones(SLOTS, bool), np.bool_(False), steps=16, reach=128, **ASKED),
        )
        texts = [each.lower(lowering_platforms=("tpu",)).compile().as_text() for each in traced]
    assert all("all-reduce" in text or "all-gather" in text for text in texts)  # of what is split
