"""Seconds of the Mosaic kernels of a program: the larger of schedule and memory traffic. Schedules are kept on disk."""

import dataclasses
import json
from typing import Any

from etils import epath

from experiments.pod_plan import kernels
from experiments.pod_plan.estimate import kernel_name
from experiments.pod_plan.hlo import Computation, Instruction
from experiments.pod_plan.kernels import Bundles, Kernel
from experiments.results import write_json
from lfm_jax.sharding.chips import Chip


class KernelTimes:
    """Times the kernels of programs for one chip. `rows` has, by kernel, the seconds of a call and how they were found.

    Args:
      folder: of the schedules that were measured before. seconds: that compiling one kernel may take.
    """

    def __init__(self, chip: Chip, folder: epath.Path, seconds: float):
        self.chip, self.folder, self.seconds = chip, folder, seconds
        self.rows: dict[str, dict[str, Any]] = {}
        self._read: dict[str, tuple[Kernel, Bundles | None]] = {}

    def __call__(self, computation: Computation, call: Instruction) -> float:
        """Seconds of one call."""
        key = kernels.fingerprint(call, self.chip.topology)
        if key not in self._read:
            self._read[key] = kernels.read_kernel(call), self._schedule(key, computation, call)
        kernel, bundles = self._read[key]
        memory = kernels.memory_bytes(kernel, computation, call) / self.chip.hbm_bytes
        if bundles is None:  # what its author says that it computes
            estimate = call.config["custom_call_config"].get("cost_estimate", {})
            compute, matched = float(estimate.get("flops", 0)) / self.chip.flops, False
        else:
            cycles, matched = kernels.compute_cycles(kernel, bundles, self.chip.cores)
            compute = cycles / self.chip.clock_hz
        self._note(kernel_name(call), compute, memory, bundles is not None, matched)
        return max(compute, memory)

    def _note(self, name: str, compute: float, memory: float, read: bool, matched: bool) -> None:
        """Of several shapes the costliest is shown."""
        row = {"kernel": name, "compute_seconds": compute, "memory_seconds": memory}
        row |= {"schedule_read": read, "loops_matched": matched}
        before = self.rows.get(name, {"compute_seconds": 0.0, "memory_seconds": 0.0})
        if max(compute, memory) >= max(before["compute_seconds"], before["memory_seconds"]):
            self.rows[name] = row

    def _schedule(self, key: str, computation: Computation, call: Instruction) -> Bundles | None:
        path = self.folder / f"{key}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            measured = kernels.measure(computation, call, self.chip, self.seconds)
            if measured is None:  # not kept: the next run tries again
                return None
            write_json(path, dataclasses.asdict(measured))
        return _bundles(json.loads(path.read_text()))


def _bundles(node: dict) -> Bundles:
    return Bundles(node["own"], tuple(map(_bundles, node["loops"])))
