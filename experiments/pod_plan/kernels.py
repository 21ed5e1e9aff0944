"""Mosaic kernels in a compiled program: what each moves, read from its own body, and how long its final schedule is.

The compiler has no estimate for a kernel. Its body, which the program carries, says the grid, the blocks and the loops; its
schedule is had by compiling the same body alone with the compiler's dump switched on, one kernel at a time.
"""

import base64
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks.processes import ROOT, run_module
from experiments.pod_plan.hlo import VMEM, Array, Computation, Instruction, parse_arrays
from lfm_jax.sharding.chips import Chip

TARGET = "tpu_custom_call"
_NUMPY_TYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "s": "int", "u": "uint", "f": "float"}
_DUMPED = "ffi_call"  # what XLA names the instruction, and with it the dump
# In its program a kernel may find operands in VMEM; alone it needs room for their blocks.
_VMEM_KIB = 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Window:
    """axes: of the grid, on which the index of the block depends; block: its shape."""

    axes: tuple[int, ...]
    block: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a kernel's body. trips: passes, None where they depend on data; loops: those inside."""

    trips: int | None
    loops: tuple["Loop", ...]


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Bundles (instruction words, one a cycle when nothing stalls) of a loop of the final schedule, without those of the loops in
    it, which follow. Every branch is counted as if it were taken."""

    own: int
    loops: tuple["Bundles", ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Mosaic kernel as its body describes it.

    grid: steps along each axis; parallel: which of the axes two cores may share; ragged: an axis is as long as data says, and its
    bound is given here.
    row_blocks: of a ragged axis, the steps that it would take if every group ended with a block.
    prefetched: operands before those with a window; windows: by operand and then by result, None where the kernel copies itself.
    causal: of splash attention, whose grid has every block of queries and keys, which those of a window have not.
    """

    name: str
    grid: tuple[int, ...]
    parallel: tuple[bool, ...]
    ragged: bool
    prefetched: int
    windows: tuple[Window | None, ...]
    loops: tuple[Loop, ...]
    row_blocks: int = 0
    causal: bool = False

    @property
    def steps(self) -> int:
        return math.prod(self.grid)


def is_kernel(instruction: Instruction) -> bool:
    """Whether the instruction calls a Mosaic kernel."""
    return instruction.opcode == "custom-call" and f'custom_call_target="{TARGET}"' in instruction.rest


def read_kernel(instruction: Instruction) -> Kernel:
    """Decodes the body of a kernel's call; of one that MLIR does not understand only the name is known."""
    from jax.experimental.mosaic.dialects import tpu
    from jax.extend.mlir import ir
    from jax.interpreters import mlir

    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        try:
            module = ir.Module.parse(base64.b64decode(instruction.config["custom_call_config"]["body"]))
        except ir.MLIRError:
            return Kernel(instruction.name, (), (), False, 0, (), ())
        functions = {operation.attributes["sym_name"].value: operation for operation in module.body.operations}
        main = module.body.operations[0]
        attributes = main.attributes
        bounds = tuple(attributes["iteration_bounds"]) if "iteration_bounds" in attributes else ()
        # What an axis of unknown length walks over is a table among the operands, which is no shorter.
        operands = parse_arrays(instruction.attribute("operand_layout_constraints") or "")
        tables = [math.prod(array.shape) for array in operands if array.dtype == "s32" and len(array.shape) == 1]
        grid = tuple(max(tables, default=1) if bound < 0 else bound for bound in bounds)
        semantics = attributes["dimension_semantics"] if "dimension_semantics" in attributes else ["arbitrary"] * len(grid)
        windows = attributes["window_params"] if "window_params" in attributes else []
        windows = tuple(_window(window, functions, grid) for window in windows)
        rows = next((array.shape[0] for array in operands if len(array.shape) == 2), 0)
        name = attributes["sym_name"].value
        prefetched = attributes["scalar_prefetch"].value if "scalar_prefetch" in attributes else 0
        return Kernel(
            name=name,
            grid=grid,
            parallel=tuple("parallel" in str(each) for each in semantics),
            ragged=grid != bounds,
            prefetched=prefetched,
            windows=windows,
            loops=_loops(main.regions[0].blocks[0]),
            row_blocks=-(-rows // windows[0].block[0]) if grid != bounds and windows and windows[0] else 0,
            causal=name.startswith("splash") and all(
                blocks * window.block[-2] == array.shape[-2]
                for blocks, window, array in zip(_attention_blocks(name, grid), windows, operands[prefetched:], strict=False)
            ),
        )


def _attention_blocks(name: str, grid: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of queries and of keys in splash attention's grid: the gradient of keys and values walks over key blocks, heads and
    query blocks, the others over heads, query and key blocks."""
    return (grid[-1], grid[-3]) if "dkv" in name else (grid[-2], grid[-1])


def _window(attributes: Any, functions: dict[str, Any], grid: tuple[int, ...]) -> Window | None:
    if "transform_indices" not in attributes or "window_bounds" not in attributes:
        return None
    transform = functions[str(attributes["transform_indices"]).removeprefix("@")]
    used = _grid_axes(transform.regions[0].blocks[0], len(grid))
    return Window(tuple(sorted(used)), tuple(attributes["window_bounds"]))


def _grid_axes(block: Any, axes: int) -> set[int]:
    """The grid axes that an index map's results depend on: a block stays where only others advance."""
    from jax.extend.mlir import ir

    depends: dict[Any, set[int]] = {argument: {index} & set(range(axes)) for index, argument in enumerate(block.arguments)}
    for operation in block.operations:
        found = set().union(*(depends.get(operand, set()) for operand in operation.operands))
        if operation.name.endswith("return"):
            return found
        for result in operation.results:
            depends[ir.Value(result)] = found
    return set(range(axes))


def _loops(block: Any) -> tuple[Loop, ...]:
    """The loops in a block and in its branches, in order."""
    found = []
    for operation in block.operations:
        inner = tuple(loop for region in operation.regions for each in region.blocks for loop in _loops(each))
        if operation.name.endswith("scf.for"):
            low, high, step = map(_constant, list(operation.operands)[:3])
            trips = None if None in (low, high, step) else max(0, -(-(high - low) // step))
            found.append(Loop(trips, inner))
        elif operation.name.endswith("scf.while"):
            found.append(Loop(None, inner))
        else:
            found += inner
    return tuple(found)


def _constant(value: Any) -> int | None:
    """A loop's bound, where it is a constant or a sum or product of constants."""
    operation = getattr(value.owner, "operation", None) if hasattr(value.owner, "attributes") else None
    if operation is None:
        return None
    kind = operation.name.rpartition(".")[2]
    if kind == "constant":
        return operation.attributes["value"].value
    operands = [_constant(operand) for operand in operation.operands]
    if kind in ("index_cast", "extsi", "trunci"):
        return operands[0]
    if kind in ("addi", "muli", "subi") and None not in operands:
        left, right = operands
        return {"addi": left + right, "muli": left * right, "subi": left - right}[kind]
    return None


def parse_bundles(text: str) -> Bundles:
    """Reads a `final_bundles.txt` as a tree: a line has a `>` for every loop around it, and LB where a loop's body begins.

    An empty bundle has no marks; it belongs where the one before it stands.
    """
    root: list = [0, []]
    stack = [root]
    for line in text.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+((?:[A-Z]{2} ?)*)\s*:\s*(>*) *\{", line)
        if bundle is None:
            continue
        depth = len(bundle[2])
        if not depth and line[bundle.end() - 1 :].startswith("{}"):
            depth = len(stack) - 1
        begins = "LB" in bundle[1].split()
        del stack[(depth if begins else depth + 1) :]
        while len(stack) <= depth:
            inside = stack[-1][1]
            if begins or not inside:
                inside.append([0, []])
            stack.append(inside[-1])  # without LB: the way out of the loop before, marked as inside
        stack[-1][0] += 1
    frozen = lambda node: Bundles(node[0], tuple(map(frozen, node[1])))
    return frozen(root)


def compute_cycles(kernel: Kernel, bundles: Bundles, cores: int = 1) -> tuple[float, bool]:
    """Cycles of the whole call where nothing stalls, and whether the loops of body and schedule could be matched.

    Branches count as taken, but for the blocks that a causal mask leaves empty (`live_share`). Where a schedule's loop has no
    match, or depends on data, the longest loop of the body is assumed.
    """
    if kernel.steps > 1 and len(bundles.loops) == 1:
        (step,), around = bundles.loops, bundles.own
    else:
        step, around = bundles, 0
    inner, matched = _loop_cycles(step.loops, kernel.loops)
    shared = [size for size, parallel in zip(kernel.grid, kernel.parallel, strict=True) if parallel]
    split = math.ceil(math.prod(shared) / cores) / math.prod(shared) if shared else 1
    return around + kernel.steps * split * (step.own + inner) * live_share(kernel), matched


def _loop_cycles(bundles: tuple[Bundles, ...], loops: tuple[Loop, ...]) -> tuple[float, bool]:
    matched = len(bundles) == len(loops) and all(loop.trips is not None for loop in loops)
    if len(bundles) != len(loops):
        every = list(_all(loops))
        longest = max((loop.trips or 1 for loop in every), default=1)
        loops = (Loop(longest, ()),) * len(bundles)
    total = 0.0
    for schedule, loop in zip(bundles, loops, strict=True):
        inner, inner_matched = _loop_cycles(schedule.loops, loop.loops)
        total += (loop.trips or 1) * (schedule.own + inner)
        matched &= inner_matched
    return total, matched


def _all(loops: tuple[Loop, ...]):
    for loop in loops:
        yield loop
        yield from _all(loop.loops)


def live_share(kernel: Kernel) -> float:
    """The share of grid steps that do work.

    Which blocks a mask leaves empty is data that the program does not show. Where splash attention's grid has every block, the
    mask is taken to be causal: of n blocks of queries or of keys, whichever are fewer, (n + 1) / 2n work. A window has a shorter
    grid, of which all is counted.

    Our grouped matmul visits a block of rows once for each group in it, and takes in its loop the chunks that have rows of the
    group: each chunk once, and once more for every group that begins within one.
    """
    if kernel.name.startswith("grouped_matmul") and kernel.ragged:
        visits, chunks = kernel.grid[1], kernel.loops[0].trips
        return (kernel.row_blocks * chunks + visits - kernel.row_blocks) / (visits * chunks)
    if not kernel.causal:
        return 1.0
    blocks = min(_attention_blocks(kernel.name, kernel.grid))
    return (blocks + 1) / (2 * blocks)


def memory_bytes(kernel: Kernel, computation: Computation, call: Instruction) -> float:
    """Bytes that the call moves between HBM and VMEM: blocks times moves; nothing for arrays that XLA keeps in VMEM."""
    operands = [computation.instructions[name].arrays[0] for name in call.operands]
    arrays = [*operands[kernel.prefetched :], *call.arrays]
    estimate = float(call.config["custom_call_config"].get("cost_estimate", {}).get("bytes_accessed", 0))
    if len(arrays) != len(kernel.windows) or None in kernel.windows:
        return max(estimate, sum(array.bytes for array in arrays if array.space != VMEM))
    return sum(_moved(kernel, array, window) for array, window in zip(arrays, kernel.windows, strict=True) if array.space != VMEM)


def _moved(kernel: Kernel, array: Array, window: Window) -> float:
    """A block is moved when its index changes from one grid step to the next."""
    if len(window.block) != len(array.shape):
        return array.bytes
    size = math.prod(min(max(1, bound), extent) for bound, extent in zip(window.block, array.shape, strict=True))
    walked = kernel.grid[: max(window.axes) + 1] if window.axes else ()
    moved = math.prod(walked) * size * array.bytes / max(1, math.prod(array.shape))
    if kernel.ragged:  # steps of one group share a block: each is moved once for every pass over the axes it does not depend on
        passes = math.prod(steps for axis, steps in enumerate(walked) if axis not in window.axes)
        return min(moved, passes * array.bytes)
    return moved * live_share(kernel) if moved > array.bytes else moved


def fingerprint(call: Instruction, topology: str) -> str:
    """Equal for calls with equal schedules: same body, chip and shapes."""
    arguments = call.attribute("operand_layout_constraints")
    text = json.dumps([topology, call.config["custom_call_config"]["body"], call.result, arguments])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def measure(computation: Computation, call: Instruction, chip: Chip, seconds: float) -> Bundles | None:
    """The kernel's final schedule, by compiling it alone in a process of its own; None where that fails or takes too long."""
    config = {key: call.config[key] for key in ("custom_call_config", "scoped_memory_configs") if key in call.config}
    operands = [computation.instructions[name].arrays[0] for name in call.operands]
    job = {
        "topology": chip.topology,
        "operands": [(_numpy_type(each.dtype), each.shape) for each in operands],
        "results": [(_numpy_type(each.dtype), each.shape) for each in call.arrays],
        "config": config,
    }
    with tempfile.TemporaryDirectory() as dump:
        # Without the expression for the pass the dump of one kernel may have hundreds of MB.
        options = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        flags = {"LIBTPU_INIT_ARGS": options}
        try:
            run_module(__name__, job, seconds, flags)
        except (RuntimeError, TimeoutError):
            return None
        texts = [path for path in glob.glob(f"{dump}/*-{_DUMPED}.*final_bundles.txt") if "schedule-analysis" not in path]
        return parse_bundles(Path(max(texts, key=os.path.getsize)).read_text()) if texts else None


def _numpy_type(name: str) -> str:
    """bf16 as bfloat16, s32 as int32, f8e4m3fn as float8_e4m3fn."""
    if name in _NUMPY_TYPES:
        return _NUMPY_TYPES[name]
    if name.startswith("f8"):
        return f"float8_{name[2:]}"
    return _NUMPY_TYPES[name[0]] + name[1:]


def _compile_alone(job: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    from lfm_jax.sharding import aot

    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices(job["topology"])[0])
    array = lambda kind, shape: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(kind), sharding=device)
    results = [array(*each) for each in job["results"]]
    call = jax.ffi.ffi_call(
        TARGET, results, custom_call_api_version=1, legacy_backend_config=json.dumps(job["config"]), has_side_effect=True
    )
    operands = [array(*each) for each in job["operands"]]
    aot.compile_for(lambda *operands: call(*operands), operands, {"xla_tpu_scoped_vmem_limit_kib": str(_VMEM_KIB)})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _compile_alone(json.load(sys.stdin))
