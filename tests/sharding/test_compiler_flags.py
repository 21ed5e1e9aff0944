"""The TPU compiler knows every flag of the table, and a user's own come first."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from jax._src.hardware_utils import TpuVersion

from lfm_jax.sharding import flags
from lfm_jax.sharding.chips import CHIPS
from lfm_jax.sharding.flags import FLAGS, add_to_environment, as_arguments, flags_for

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
# A gradient whose parameters are gathered and whose sum is scattered, on four chips.
PROGRAM = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from lfm_jax.sharding import MeshConfig, aot, make_mesh
sharding = NamedSharding(make_mesh(MeshConfig(), aot.tpu_devices(sys.argv[1])), PartitionSpec("fsdp"))
array = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=sharding)
aot.compile_for(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2).astype(jnp.float32)), (array, array))
"""


def compiled(topology, arguments):
    environment = {**os.environ, "LIBTPU_INIT_ARGS": arguments}
    return subprocess.run([sys.executable, "-c", PROGRAM, topology], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_compiler_knows_every_flag(generation):
    pytest.importorskip("libtpu")
    done = compiled(CHIPS[generation].topology, as_arguments(flags_for(generation, slices=2)))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compiler_refuses_a_flag_that_it_does_not_know():
    pytest.importorskip("libtpu")
    done = compiled("v5e:2x2", "--xla_tpu_no_such_flag=true")
    assert done.returncode != 0 and "xla_tpu_no_such_flag" in done.stdout + done.stderr


def test_a_flag_is_said_once_for_a_generation_with_its_reason_and_source():
    pairs = [(flag.name, generation) for flag in FLAGS for generation in flag.generations]
    assert len(pairs) == len(set(pairs)) and {generation for _, generation in pairs} == set(GENERATIONS)
    assert all(flag.reason and flag.source for flag in FLAGS)


def test_more_slices_add_flags():
    assert flags_for("v5p").items() < flags_for("v5p", slices=2).items()
    assert flags_for("v4") == {}


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr(flags.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, TpuVersion.v6e))


def test_on_a_tpu_host_flags_are_added_and_those_given_stay(tpu):
    environment = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false --xla_of_mine=1"}
    add_to_environment(environment)
    first, second, *rest = environment["LIBTPU_INIT_ARGS"].split()
    assert (first, second) == ("--xla_enable_async_all_gather=false", "--xla_of_mine=1")
    table = flags_for("v6e")
    del table["xla_enable_async_all_gather"]
    assert " ".join(rest) == as_arguments(table)
    again = dict(environment)
    add_to_environment(again)
    assert again == environment


def test_on_several_slices_those_flags_are_added_as_well(tpu):
    environment = {"MEGASCALE_NUM_SLICES": "2"}
    add_to_environment(environment)
    assert environment["LIBTPU_INIT_ARGS"] == as_arguments(flags_for("v6e", slices=2))


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(flags.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
    environment = {}
    add_to_environment(environment)
    assert environment == {}
