"""What the TPU compiler says about a program, without a TPU: cycles, bytes, and the final schedule of Pallas kernels.

libtpu takes its options from the environment once in a process, so each measurement runs in a process of its own:
`measure(module, job)` starts one that calls `module.build(job)` for programs and compiles them.
"""

import dataclasses
import glob
import importlib
import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.processes import run_module


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles (instruction words, one a cycle when nothing stalls) of a kernel's final schedule.

    step: of one grid step, without its inner loops; loops: of one pass of each inner loop. Every branch is counted as if it were
    taken, so a kernel that does something at its first or last step only is faster than this.
    """

    step: int
    loops: tuple[int, ...]


def measure(module: str, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Compiles the programs that `module.build(job)` gives by name: {name: (function, arguments, kernel)}.

    kernel: the name of the one Pallas kernel in the program, whose schedule is read; None where there is no need of it.

    Returns:
      By program: `estimated_cycles` and `bytes` of XLA's own instructions (a kernel counts with its cost estimate in the latter),
      `in_vmem` (see `operands_in_vmem`), and for a kernel its `step` and `loops` (see `Schedule`) and `block_bytes`.

    Raises:
      RuntimeError: the compilation failed; the text ends with the reason.
    """
    with tempfile.TemporaryDirectory() as dump:
        options = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"} if job.get("schedules") else None
        try:
            return run_module(__name__, {"module": module, "job": job, "dump": dump}, environment=options)
        except RuntimeError as error:
            raise RuntimeError(f"compiling {job} failed:\n{error}") from error


def parse_schedule(text: str) -> Schedule:
    """Reads a `final_bundles.txt`: each bundle's line has a `>` for every loop around it, and LB where a loop's body begins."""
    step, loops = 0, []
    for line in text.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+((?:[A-Z]{2} ?)*)\s*:\s*(>*) *\{", line)
        if bundle is None:
            continue
        marks, depth = bundle[1].split(), len(bundle[2])
        step += depth == 1
        if depth == 2 and "LB" in marks:
            loops.append(0)
        if depth == 2:
            loops[-1] += 1
    return Schedule(step, tuple(loops))


def estimated_cycles(hlo: str) -> int | None:
    """The sum of the compiler's estimates over the instructions of a compiled program without loops.

    None where the compiler gives one of them up, which it says with the largest integer.
    """
    estimates = [int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', hlo)]
    return sum(estimates) if max(estimates, default=0) < 2**62 else None


def operands_in_vmem(hlo: str) -> dict[str, list[bool]]:
    """By kernel, for its operands and then its results: whether XLA keeps the array in VMEM, so that it costs no HBM traffic."""
    array = r"\w+\[[\d,]*\](?:\{[^}]*\})?"
    layouts = dict(re.findall(rf"(%[\w.-]+) = ({array})", hlo))
    found = {}
    call = r'%([\w-]+?)(?:\.\d+)? = (\S.*?) custom-call\((.*?)\), custom_call_target="tpu_custom_call"'
    for name, results, operands in re.findall(call, hlo):
        arrays = [layouts.get(operand, "") for operand in operands.split(", ")] + re.findall(array, results)
        found[name] = ["S(1)" in layout for layout in arrays]
    return found


def block_bytes(jaxpr) -> list[int]:
    """Bytes that the pipeline of the one Pallas call in `jaxpr` moves, by operand and then by result: a block is moved when its
    index changes from one grid step to the next, without what lies behind the array's end."""
    (call,) = _pallas_calls(jaxpr)
    mapping = call.params["grid_mapping"]
    return [_moved_bytes(mapping.grid, block) for block in mapping.block_mappings]


def _pallas_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _pallas_calls(inner)


def _moved_bytes(grid, block) -> int:
    import jax
    import numpy as np

    indices = np.array(list(itertools.product(*map(range, grid))), np.int32)
    index_map = jax.jit(jax.vmap(lambda *at: jax.core.eval_jaxpr(block.index_map_jaxpr.jaxpr, block.index_map_jaxpr.consts, *at)))
    blocks = np.stack([np.asarray(value) for value in index_map(*indices.T)], axis=1)
    moved = np.any(np.diff(blocks, axis=0, prepend=-1) != 0, axis=1)
    array = block.array_aval
    sizes = [int(getattr(size, "block_size", 1 if size is None else size)) for size in block.block_shape]
    extent = np.minimum(np.array(array.shape) - blocks * np.array(sizes), sizes)
    return int(np.sum(np.prod(extent[moved], axis=1))) * array.dtype.itemsize


def _read_schedule(dump: str, kernel: str) -> dict[str, Any]:
    """The kernel's schedule from the compiler's dump, which is emptied for the next program."""
    named = [path for path in glob.glob(f"{dump}/*-{kernel}.*final_bundles.txt") if "schedule-analysis" not in path]
    schedule = parse_schedule(Path(max(named, key=os.path.getsize)).read_text())
    for path in glob.glob(f"{dump}/*"):
        os.remove(path)
    return dataclasses.asdict(schedule)


def _worker(module: str, job: dict[str, Any], dump: str) -> dict[str, dict[str, Any]]:
    import jax

    from lfm_jax.sharding import aot

    results = {}
    for name, (function, arguments, kernel) in importlib.import_module(module).build(job).items():
        compiled = aot.compile_for(function, arguments)
        hlo = compiled.as_text()
        result = {"estimated_cycles": estimated_cycles(hlo), "bytes": compiled.cost_analysis()["bytes accessed"]}
        result["in_vmem"] = operands_in_vmem(hlo)
        if kernel is not None:
            result |= _read_schedule(dump, kernel) | {"block_bytes": block_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)}
        results[name] = result
    return results


if __name__ == "__main__":
    print(json.dumps(_worker(**json.load(sys.stdin))))
