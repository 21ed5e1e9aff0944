"""Compiling for TPUs that are not there: the TPU compiler runs on any Linux host where libtpu is installed.

    os.environ.update(aot.ENVIRONMENT)               # before the TPU compiler is first used in the process
    mesh = make_mesh(MeshConfig(), aot.tpu_devices("v5e:16x16"))
    compiled = aot.compile_for(function, arguments)  # jax.ShapeDtypeStruct with shardings over that mesh

The compiled program cannot run here, but it has its scheduled HLO and its memory and cost analysis.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

# Without these libtpu asks a metadata server what machine this is, and locks the machine's TPU. The accelerator type may be any:
# the topology decides what is compiled for.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """Descriptions of a topology's devices, to build a mesh or a sharding from.

    Args:
      topology: kind and shape, e.g. "v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2" or "tpu7x:2x2x1" (two devices a chip).
      slices: of that shape, which the data-centre network connects.

    Raises:
      RuntimeError: libtpu is not installed, or the environment lacks a variable of `ENVIRONMENT`.
      ValueError: libtpu knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError("compiling for TPUs needs libtpu, which is not installed; run: pip install libtpu")
    missing = sorted(set(ENVIRONMENT) - set(os.environ))
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} must be set before libtpu is loaded; see lfm_jax.sharding.aot.ENVIRONMENT for the values"
        )
    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no topology {topology!r}; write it like v5e:2x2 or v5p:2x2x1") from error


def compile_for(function: Callable, arguments: Sequence[Any], options: dict[str, str] | None = None) -> jax.stages.Compiled:
    """Compiles `function(*arguments)` for the TPUs that the arguments' shardings name.

    Args:
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings over devices of `tpu_devices`.
      options: of the compiler, by name.
    """
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile(compiler_options=options)
