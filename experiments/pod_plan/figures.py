"""The figures of one layout: memory, traffic, seconds, and what follows from them."""

import math
from typing import Any

from etils import epath

from experiments.pod_plan import compilation
from experiments.pod_plan.collectives import Torus
from experiments.pod_plan.compilation import Job
from experiments.pod_plan.estimate import Estimate, estimate
from experiments.pod_plan.hlo import Program
from experiments.pod_plan.kernel_times import KernelTimes
from experiments.pod_plan.search import mesh_text
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.sharding.chips import CHIPS, Chip

DAY = 86_400


def device_count(topology: str) -> int:
    """JAX devices of a topology: v5e:16x16 has 256, tpu7x:2x2x1 has 8.

    >>> device_count("v5e:16x16"), device_count("tpu7x:2x2x1")
    (256, 8)
    """
    kind, _, shape = topology.partition(":")
    return math.prod(map(int, shape.split("x"))) * CHIPS[kind].devices_per_chip


def measure(job: Job, folder: epath.Path, total_tokens: int, compile_seconds: float) -> dict[str, Any]:
    """Compiles the job, or takes it from the folder, and estimates it.

    Returns:
      A flat mapping of figures; those that follow from the program are left out where there is none, and `problem` says why. The
      tables in it are `breakdown`, `kernels` and `collectives`.
    """
    chip = CHIPS[job.topology.partition(":")[0]]
    devices = job.devices or device_count(job.topology)
    found = compilation.compile_step(job, folder / "programs", compile_seconds)
    fits = found.text is not None and found.peak_bytes <= chip.hbm_capacity
    problem = found.problem
    if found.text is not None and not fits:
        problem = "does not fit"
    row = {
        "topology": job.topology, "devices": devices, "seq_len": job.seq_len, "rows": job.rows, "mesh": mesh_text(job.mesh),
        "accumulation": job.accumulation, "remat": job.compute.remat, "scan_layers": job.compute.scan_layers,
        "fits": fits, "problem": problem, "peak_bytes": found.peak_bytes, "capacity_bytes": chip.hbm_capacity, **found.memory,
        "compile_seconds": found.seconds, "seconds_per_step": None,
    }  # fmt: skip
    if found.text is None:
        return row
    times = KernelTimes(chip, folder / "kernels", compile_seconds)
    estimated = estimate(Program(found.text), Torus(chip, found.coordinates), times)
    return row | _speed(job, chip, devices, estimated, total_tokens) | _tables(estimated, times)


def _speed(job: Job, chip: Chip, devices: int, estimated: Estimate, total_tokens: int) -> dict[str, Any]:
    memory_seconds = estimated.hbm_bytes / chip.hbm_bytes
    seconds = max(estimated.seconds, memory_seconds)
    tokens = job.rows * job.seq_len
    chips = devices / chip.devices_per_chip
    share = tokens / devices
    flops = {causal: training_flops_per_token(job.model, job.seq_len, causal=causal) * share for causal in (True, False)}
    waits = {kind: sum(value for (operation, _), value in estimated.operations.items() if _is_wait(operation) == kind)
             for kind in ("HBM", "links")}  # fmt: skip
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_chip": tokens / seconds / chips,
        "mfu_share": flops[True] / chip.flops / seconds,
        "mfu_full_square_share": flops[False] / chip.flops / seconds,
        "days": total_tokens / tokens * seconds / DAY,
        "chip_hours": total_tokens / tokens * seconds / 3600 * chips,
        "seconds_waiting_for_hbm": waits["HBM"],
        "seconds_waiting_for_links": waits["links"],
        "seconds_of_hbm_traffic": memory_seconds,
        "model_flops_per_device": flops[True],
        "compiled_matmul_flops_per_device": estimated.flops,
        "hbm_traffic_bytes": estimated.hbm_bytes,
        "interconnect_bytes": sum(each["bytes"] for each in estimated.collectives.values()),
        "loops_of_unknown_length": estimated.unknown_loops,
        "seconds_guessed": sum(estimated.guessed.values()),
    }


def _is_wait(operation: str) -> str | None:
    if not operation.startswith("waiting for "):
        return None
    return "HBM" if operation == "waiting for HBM" else "links"


def _tables(estimated: Estimate, times: KernelTimes) -> dict[str, Any]:
    breakdown = sorted(estimated.operations.items(), key=lambda item: -item[1])
    return {
        "breakdown": [
            {"operation": operation, "place": place, "seconds": seconds, "share": seconds / estimated.seconds}
            for (operation, place), seconds in breakdown
            if seconds > 0
        ],
        "collectives": [{"kind": kind, **figures} for kind, figures in estimated.collectives.items()],
        "kernels": list(times.rows.values()),
        "kernels_without_schedule": sum(not row["schedule_read"] for row in times.rows.values()),
    }


def totals(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step in five parts: matmuls, kernels, other work of the core, waiting for HBM, waiting for links."""
    parts = dict.fromkeys(("matmuls", "kernels", "other work", "waiting for HBM", "waiting for links"), 0.0)
    for entry in row["breakdown"]:
        operation = entry["operation"]
        if _is_wait(operation):
            parts[f"waiting for {_is_wait(operation)}"] += entry["seconds"]
        elif operation.startswith("kernel "):
            parts["kernels"] += entry["seconds"]
        else:
            parts["matmuls" if operation == "matmul" else "other work"] += entry["seconds"]
    return parts


