"""The strict room: every test runs on eight CPU devices, without implicit promotion, without the network, warnings as errors.

All of it is set in the environment before jax is imported, so that the processes a test starts are in the same room. Warnings
that are no errors are listed in setup.cfg with the reason.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    # Most of the time goes into compiling programs that run once. Without optimisations, with XLA's older emitters and in one
    # piece that takes a third of the time, and what changes is in the roundings. A test of optimised programs asks for
    # `optimized_programs`. Eight devices share few cores: a collective may wait long for its last member, which is no deadlock.
    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    # The TPU compiler (libtpu) without a TPU: it must neither look for a machine nor lock one.
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)
# A program that several tests or processes need is compiled once in a run of the tests, and never taken from another one.
if "LFM_JAX_TEST_PROGRAMS" not in os.environ:
    os.environ["LFM_JAX_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="lfm_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["LFM_JAX_TEST_PROGRAMS"], ignore_errors=True)
os.environ.update(
    JAX_COMPILATION_CACHE_DIR=os.environ["LFM_JAX_TEST_PROGRAMS"], JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1"
)
# Seeds are fixed, and a slow machine is no failure.
hypothesis.settings.register_profile("strict_room", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("strict_room")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The folder of published files (papers' tables, corpora, chat templates) that some tests compare with."""
    folder = Path(os.environ.get("LFM_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no published data in {folder}: set LFM_JAX_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """A file's compiled programs go when it is done: kept, they crash a process that maps more regions than Linux allows."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def optimized_programs() -> Iterator[None]:
    """For a file about programs as users have them."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
