"""Flags of XLA's TPU compiler and runtime, by generation: the only table of them.

libtpu reads them from `LIBTPU_INIT_ARGS` when it is loaded, and ends the process at one that it does not know: a test has the
pinned libtpu compile with each list. None has been measured on this architecture; they are what the fastest public trainers
agree on. Left out are offloads of all-reduces to the SparseCore, which AXLearn reports to change losses (on v6e with JAX 0.6.2,
and on TPU v7).

A run on GPUs has XLA's defaults, and what `XLA_FLAGS` says: of the flags that circulate (docs/benchmarks/train_step.md) none has
been measured here. Most are about collectives, and on one GPU each moved a step of 0.5 s by 1 ms at most
(vorushin/tpuchat, gpu/REPORT.md, JAX 0.7.2).
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import jax
from jax._src import hardware_utils  # what jax itself looks with; there is no public way before the runtime is up

VARIABLE = "LIBTPU_INIT_ARGS"


class Flag(NamedTuple):
    """generations: the TPUs it is for. multislice: only where slices talk over the data-centre network."""

    name: str
    value: str
    generations: tuple[str, ...]
    reason: str
    source: str
    multislice: bool = False


_2D_AND_V5P = ("v5e", "v5p", "v6e")
_ALL = (*_2D_AND_V5P, "tpu7x")
_MAXTEXT = "MaxText, benchmarks/xla_flags_library.py"
_AXLEARN = "AXLearn, common/compiler_options.py"
_IRONWOOD = "tpu-recipes, gemma4-2b on Ironwood"

FLAGS = (
    Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", _2D_AND_V5P,
         "gradients are summed over replicas while the backward pass goes on", _MAXTEXT),
    Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", _2D_AND_V5P,
         "so that this pipelining also takes gradients of different sizes", _MAXTEXT),
    Flag("xla_tpu_enable_async_collective_fusion", "true", _2D_AND_V5P,
         "collectives run beside the matrix products that they are fused with", _MAXTEXT),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _2D_AND_V5P,
         "the same for the all-gathers of FSDP's parameters", _MAXTEXT),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", _2D_AND_V5P,
         "a collective may span several products, where one is too short to hide it", _MAXTEXT),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", _2D_AND_V5P,
         "the TensorCore computes while it drives a collective", _MAXTEXT),
    Flag("xla_enable_async_all_gather", "true", _ALL,
         "all-gathers start early and end late, which is what the latency-hiding scheduler needs", _MAXTEXT),
    Flag("xla_jf_spmd_threshold_for_windowed_einsum_mib", "1000000", _ALL,
         "no collective matmul: it cuts products into a loop of slivers (docs/benchmarks/pod_plan.md)", "MaxText and AXLearn"),
    Flag("xla_tpu_scoped_vmem_limit_kib", "98304", ("v6e",),
         "of 128 MiB of VMEM a fusion may take 96, for larger tiles (default 16)", "MaxText, llama3.1-8b on Trillium"),
    Flag("xla_tpu_scoped_vmem_limit_kib", "65536", ("tpu7x",),
         "of its VMEM a fusion may take 64 MiB, for larger tiles", _IRONWOOD),
    Flag("xla_tpu_bf16_emission_mode", "NATIVE_EMISSION", ("tpu7x",),
         "the vector unit computes in bfloat16 instead of going through float32", _IRONWOOD),
    Flag("xla_tpu_prefer_async_allgather_to_allreduce", "true", _ALL,
         "small shards are gathered beside work, not by sums of arrays filled up with zeros (docs/log.md)", _IRONWOOD),
    Flag("xla_tpu_enable_megascale_barrier", "true", _ALL,
         "slices enter a collective over the network together, so that none times out on a slower one", _AXLEARN, True),
    Flag("xla_tpu_enable_sunk_dcn_allreduce_done_with_host_reduction", "true", _ALL,
         "the sum over slices is waited for as late as it is used", _AXLEARN, True),
    Flag("megascale_grpc_premap_memory_bytes", str(16 << 30), _ALL,
         "host memory for transfers between slices: with the default of 4 GiB steps took twice as long", _AXLEARN, True),
)  # fmt: skip

# What makes the TPU compiler put its checker for silent corruption into a program: everything in it runs again, twice, and the
# program ends where the results differ (AXLearn, common/compiler_options.py). On a chip of one core (v5e, v6e) the code must be
# there twice, too (xla_tpu_sdc_replicate_llo); of that libtpu 0.0.42.1 dies at a training step ("sdc_id_offset >= 0").
_CHECKER = {
    "xla_tpu_enable_sdc_checker": "true", "xla_tpu_sdc_check_repeat_count": "2", "xla_tpu_sdc_check_halt_on_detection": "true"
}  # fmt: skip
_TPU_V5P = "TPU v5"
_DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")


def checker_for(device: jax.Device) -> dict[str, str]:
    """Options that compile a program with the TPU compiler's own checker of the devices in it.

    Raises:
      ValueError: the device is no TPU v5p.
    """
    if device.device_kind != _TPU_V5P:
        raise ValueError(f"the compiler's checker can be had for TPU v5p alone, not for {device.device_kind}; leave it None")
    return _CHECKER


def repeats_exactly(device: jax.Device, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a program that runs twice on a sound device gives the same bits.

    On GPUs XLA adds up a scatter by atomics, in any order (the gradient of an embedding is one), unless `XLA_FLAGS` has one of
    `--xla_gpu_deterministic_ops` and `--xla_gpu_exclude_nondeterministic_ops` (xla/xla.proto).
    """
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in environment.get("XLA_FLAGS", "").split())
    return device.platform != "gpu" or any(given.get(name, "false").lower() in ("", "true", "1") for name in _DETERMINISTIC)


def flags_for(generation: str, slices: int = 1) -> dict[str, str]:
    """Names and values for a TPU generation ("v5e", "v5p", "v6e", "tpu7x"); empty for one that the table does not have."""
    return {flag.name: flag.value for flag in FLAGS if generation in flag.generations and (slices > 1 or not flag.multislice)}


def as_arguments(flags: dict[str, str]) -> str:
    """As libtpu reads them.

    >>> as_arguments({"xla_enable_async_all_gather": "true"})
    '--xla_enable_async_all_gather=true'
    """
    return " ".join(f"--{name}={value}" for name, value in flags.items())


def add_to_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """On a TPU host, adds what the table has for it; a flag that is set already keeps its value. Elsewhere does nothing.

    To be called before anything touches a device.
    """
    chips, generation = hardware_utils.num_available_tpu_chips_and_device_id()
    if not chips:
        return
    given = environment.get(VARIABLE, "").split()
    names = {argument.lstrip("-").partition("=")[0] for argument in given}
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    missing = {name: value for name, value in flags_for(generation.name, slices).items() if name not in names}
    environment[VARIABLE] = " ".join([*given, as_arguments(missing)]).strip()
