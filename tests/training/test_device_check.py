"""Every so many steps one runs in a second program, with the TPU compiler's own checker of the devices in it."""

import functools
import runpy

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from lfm_jax.configuration import ConfigError
from lfm_jax.models import Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, activation_sharding, aot, make_mesh
from lfm_jax.sharding.flags import checker_for
from lfm_jax.training import (
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    abstract_state,
    loop,
    make_optimizer,
    make_train_step,
    next_token_objective,
)

single = functools.cache(lambda: runpy.run_path(str(ROOT / "tests" / "training" / "test_loop.py")))


def test_the_training_step_compiles_with_the_checker_in_it():
    """Over four chips; the program with the checker is a larger one."""
    pytest.importorskip("libtpu")
    model = ModelConfig(
        vocab_size=256, embed_dim=128, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=64,
        mlp_dim=128,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(), aot.tpu_devices("v5p:2x2x1"))
    functions = functional(lambda rngs: Decoder(model, rngs=rngs))
    optimizer, sizes = make_optimizer(OptimizerConfig(), 100), []
    array = lambda dtype: jax.ShapeDtypeStruct((8, 256), dtype, sharding=activation_sharding(mesh, ("batch", "seq")))
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = array(jnp.float32)
    for options in (None, checker_for(mesh.devices.flat[0])):
        step = make_train_step(
            functions, optimizer, next_token_objective(LossConfig()), mesh, seed=0, compiler_options=options
        )
        traced = step.trace(abstract_state(functions, optimizer, mesh), batch)
        sizes.append(traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis().generated_code_size_in_bytes)
    assert sizes[1] > 1.1 * sizes[0]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_generation_for_which_it_is_not_known_is_refused(topology):
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="can be had for TPU v5p alone, not for TPU(7x| v[56] lite); leave it None"):
        checker_for(aot.tpu_devices(topology)[0])


def test_without_a_tpu_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--config\.train\.device_check_every: .* alone, not for cpu; leave it None"):
        single()["run"](tmp_path, config=TrainConfig(steps=2, device_check_every=1))


def test_a_number_of_steps_below_one_is_refused():
    with pytest.raises(ValueError, match="device_check_every must be at least 1, or None, got 0"):
        TrainConfig(steps=1, device_check_every=0)


def test_the_steps_that_are_due_run_in_the_other_program(tmp_path, monkeypatch):
    """With another option of this machine's compiler in the checker's place."""
    made, ran = loop.make_train_step, []

    def make(*arguments, compiler_options=None, **named):
        step = made(*arguments, compiler_options=compiler_options, **named)
        return lambda *given: (ran.append(compiler_options), step(*given))[1]

    options = {"xla_llvm_disable_expensive_passes": True}
    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(loop, "checker_for", lambda device: options)
    trained = single()["run"](tmp_path, config=TrainConfig(steps=7, device_check_every=3))
    assert ran == [None, None, options, None, None, options, None] and int(trained.state.step) == 7
