"""Grouped matmuls by the TPU compiler's own schedules, and what surrounds them in a mixture of experts; needs no TPU."""

import dataclasses
import functools
import glob
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from experiments.benchmarks.processes import ROOT, run_module
from experiments.pod_plan import collectives, kernels
from experiments.pod_plan.collectives import Torus
from experiments.pod_plan.estimate import hbm_bytes
from experiments.pod_plan.hlo import Program
from experiments.results import write_results
from lfm_jax.configuration import nearest
from lfm_jax.kernels import grouped_matmul_tpu
from lfm_jax.models import preset
from lfm_jax.sharding.chips import CHIPS

IMPLEMENTATIONS = ("pallas", "ragged_dot", "megablox")
PASSES = ("product", "gradient of rows", "gradient of matrices")
_TILE_ROWS = 128  # of megablox: with more, groups that end within a tile cost more than is saved
_DUMPED = {
    ("pallas", "product"): "grouped_matmul", ("pallas", "gradient of rows"): "grouped_matmul",
    ("pallas", "gradient of matrices"): "grouped_matmul_gradient", ("megablox", "product"): "gmm",
    ("megablox", "gradient of rows"): "gmm", ("megablox", "gradient of matrices"): "tgmm",
    ("ragged_dot", "product"): "ragged-dot-none", ("ragged_dot", "gradient of rows"): "ragged-dot-none",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """chips: names in `lfm_jax.sharding.chips`; presets: with experts, whose first matmul is measured.

    tokens: of a device. meshes: (topology, devices that share the experts) of the block as a whole, for the first preset.
    """

    chips: tuple[str, ...]
    presets: tuple[str, ...]
    tokens: int = 8192
    meshes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.chips if name not in CHIPS or CHIPS[name].topology is None]
        if unknown:
            raise ValueError(f"chips: {unknown[0]!r} is none. {nearest(unknown[0], [n for n, c in CHIPS.items() if c.topology])}")
        dense = [name for name in self.presets if preset(name).moe is None]
        if dense:
            raise ValueError(f"presets: {dense[0]} has no experts")


def _programs(rows: int, groups: int, k: int, columns: int, array) -> dict[tuple[str, str], tuple[Any, tuple]]:
    """By (implementation, pass): a function and its arguments. array(*shape, dtype=) describes one."""
    import importlib

    import jax
    import jax.numpy as jnp

    # The package hides the module behind a function of its name.
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    tiled = functools.partial(functools.partial, preferred_element_type=jnp.bfloat16)
    lhs, rhs, out = array(rows, k), array(groups, k, columns), array(rows, columns)
    sizes = array(groups, dtype=jnp.int32)
    multiply = functools.partial(grouped_matmul_tpu._multiply, interpret=False)
    differentiated = lambda argument: lambda lhs, rhs, sizes, out: jax.vjp(jax.lax.ragged_dot, lhs, rhs, sizes)[1](out)[argument]
    return {
        ("pallas", "product"): (
            lambda lhs, rhs, sizes: multiply([lhs], [rhs], sizes, transposed=False), (lhs, rhs, sizes)),
        ("pallas", "gradient of rows"): (
            lambda out, rhs, sizes: multiply([out], [rhs], sizes, transposed=True), (out, rhs, sizes)),
        ("pallas", "gradient of matrices"): (
            functools.partial(grouped_matmul_tpu._multiply_groups, dtype=jnp.bfloat16, interpret=False), (lhs, out, sizes)),
        ("megablox", "product"): (tiled(megablox.gmm, tiling=(_TILE_ROWS, k, columns // 2)), (lhs, rhs, sizes)),
        ("megablox", "gradient of rows"): (
            tiled(megablox.gmm, tiling=(_TILE_ROWS, columns, k // 2), transpose_rhs=True), (out, rhs, sizes)),
        ("megablox", "gradient of matrices"): (
            lambda lhs, out, sizes: tiled(megablox.tgmm, tiling=(_TILE_ROWS, k, columns // 2))(lhs.swapaxes(0, 1), out, sizes),
            (lhs, out, sizes)),
        ("ragged_dot", "product"): (jax.lax.ragged_dot, (lhs, rhs, sizes)),
        ("ragged_dot", "gradient of rows"): (differentiated(0), (lhs, rhs, sizes, out)),
        ("ragged_dot", "gradient of matrices"): (differentiated(1), (lhs, rhs, sizes, out)),
    }  # fmt: skip


def _compile_kernels(job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each program: cycles of XLA's instructions, and the grid, tile and final bundles of its kernel."""
    import jax
    import jax.numpy as jnp

    from lfm_jax.sharding import aot

    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices(CHIPS[job["chip"]].topology)[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    found = []
    for (implementation, part), (function, arguments) in _programs(*job["shape"], array).items():
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # megablox knows no others
            program = Program(aot.compile_for(function, arguments).as_text())
        row = {"implementation": implementation, "pass": part}
        row["xla_cycles"] = sum(each.estimated_cycles or 0 for each in program.entry)
        calls = [kernels.read_kernel(each) for each in program.entry if kernels.is_kernel(each)]
        kernel = next((each for each in calls if each.grid), None)
        name = _DUMPED.get((implementation, part))
        if kernel is not None:
            dumped = re.compile(rf".*-{name}(\.\d+)?-\d+-final_bundles\.txt")
            text = max(filter(dumped.fullmatch, glob.glob(f"{job['dump']}/*")), key=os.path.getsize)
            (step,) = kernels.parse_bundles(Path(text).read_text()).loops
            tile = kernel.windows[0].block[0], kernel.windows[-1].block[-1]
            row |= {"grid": kernel.grid, "tile": tile}
            row |= {"step_bundles": step.own, "loop_bundles": [each.own for each in step.loops]}
        found.append(row)
        for path in glob.glob(f"{job['dump']}/*"):
            os.remove(path)
    return found


def _kernel_row(chip_name: str, name: str, shape: tuple[int, ...], found: dict[str, Any]) -> dict[str, Any]:
    """Cycles of a program: of its kernel the longest of bundles, matrix units and memory, and of XLA's instructions."""
    rows, groups, k, columns = shape
    chip = CHIPS[chip_name]
    per_cycle = chip.flops / chip.clock_hz
    floor = 2 * rows * k * columns / per_cycle
    least_bytes = 2 * (rows * (k + columns) + groups * k * columns)
    row = {"chip": chip_name, "preset": name, **dict(zip(("rows", "experts", "k", "columns"), shape, strict=True))}
    row |= {key: found[key] for key in ("implementation", "pass", "xla_cycles")}
    cycles = found["xla_cycles"]
    if "grid" in found:
        tile_rows, tile_columns = found["tile"]
        # Every group but the first begins within a tile, or a chunk of one, of the group before.
        step_rows = grouped_matmul_tpu.CHUNK_ROWS if found["loop_bundles"] else tile_rows
        passes = rows // step_rows + groups - 1
        visits = rows // tile_rows + groups - 1
        split = found["grid"][0]
        bundles = visits * found["step_bundles"] + passes * sum(found["loop_bundles"][:1])
        rounds = math.ceil(split / chip.cores) / split * chip.cores  # of blocks of columns, which the cores share
        unit = 2 * passes * step_rows * k * columns / per_cycle * rounds
        read = 2 * (rows * (k + columns) * split + groups * k * columns)
        memory = min(read, least_bytes * split) * chip.clock_hz / chip.hbm_bytes
        row |= {"bundle_cycles": round(bundles * math.ceil(split / chip.cores)), "unit_cycles": round(unit)}
        row |= {"memory_cycles": round(memory), "tile_rows": tile_rows, "tile_columns": tile_columns}
        cycles += max(row["bundle_cycles"], row["unit_cycles"], row["memory_cycles"])
    return row | {"cycles": round(cycles), "floor_cycles": round(floor), "floor_over_cycles": floor / cycles}


def _compile_block(job: dict[str, Any]) -> dict[str, Any]:
    """The mixture of experts of a preset, forward and backward, on devices that share the experts."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lfm_jax.models import ComputeConfig
    from lfm_jax.models.moe import ExpertBias, MoE
    from lfm_jax.sharding import MeshConfig, activation_sharding, aot, make_mesh, parameter_sharding

    config = preset(job["preset"])
    devices = list(aot.tpu_devices(job["topology"]))[: job["share"]]
    mesh = make_mesh(MeshConfig(fsdp=1, expert=job["share"]), devices)
    compute = ComputeConfig(dtype="bfloat16", expert_exchange=job["exchange"])
    moe = nnx.eval_shape(lambda: MoE(config.embed_dim, config.moe, compute, residual_gain=1.0, rngs=nnx.Rngs(0)))
    graphdef, bias, weights = nnx.split(moe, ExpertBias, ...)

    def both(weights, bias, x, gradient):
        out, transpose = jax.vjp(lambda weights, x: nnx.merge(graphdef, bias, weights)(x, None)[0], weights, x)
        return out, transpose(gradient)

    def place(leaf):
        value = leaf.get_value()
        axes = ("expert", *(None,) * (value.ndim - 1)) if value.ndim == 3 else (None,) * value.ndim
        dtype = jnp.bfloat16 if value.ndim == 3 else value.dtype
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, dtype, sharding=parameter_sharding(mesh, axes, value.shape)))

    state = jax.tree.map(place, (weights, bias), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    shape = job["share"], job["tokens"], config.embed_dim
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=activation_sharding(mesh, ("batch", "seq", None), shape))
    with jax.set_mesh(mesh):
        compiled = aot.compile_for(both, (*state, x, x))
    program = Program(compiled.as_text())
    entry = program.entry
    torus = Torus(CHIPS[job["topology"].partition(":")[0]], tuple(tuple(device.coords) for device in devices))
    moved = [collectives.measure(torus, *each) for one in entry for each in collectives.find(program, entry, one)]
    beside = [each for each in entry if not kernels.is_kernel(each) and not collectives.find(program, entry, each)]
    return {
        "link_bytes": sum(each.sent_bytes for each in moved), "link_seconds": sum(each.seconds for each in moved),
        "beside_bytes": sum(hbm_bytes(program, entry, each) for each in beside),
        "beside_cycles": sum(each.estimated_cycles or 0 for each in beside),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip


def _markdown(rows: list[dict[str, Any]], blocks: list[dict[str, Any]]) -> str:
    lines = ["| chip | preset | pass | implementation | tile | bundles | matrix unit | memory | of XLA | cycles "
             "| floor / cycles |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    count = lambda row, key: f"{row[key]:,}" if key in row else ""
    for row in rows:
        tile = f"{row['tile_rows']} x {row['tile_columns']}" if "tile_rows" in row else "none"
        cells = [row["chip"], row["preset"], row["pass"], row["implementation"], tile]
        cells += [count(row, key) for key in ("bundle_cycles", "unit_cycles", "memory_cycles", "xla_cycles", "cycles")]
        lines.append(f"| {' | '.join([*cells, format(row['floor_over_cycles'], '.2f')])} |")
    lines += ["", "| topology | devices that share | exchange | MB over links | ms on links | MB of HBM beside kernels "
              "| cycles beside kernels | temporary MB |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in blocks:
        cells = [row["topology"], str(row["share"]), row["exchange"], f"{row['link_bytes'] / 1e6:,.0f}"]
        cells += [f"{1e3 * row['link_seconds']:.2f}", f"{row['beside_bytes'] / 1e6:,.0f}", f"{row['beside_cycles']:,}"]
        lines.append(f"| {' | '.join([*cells, format(row['temporary_bytes'] / 1e6, ',.0f')])} |")
    return "\n".join(lines) + "\n"


def _measure(job: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as dump:
        options = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"} if "chip" in job else None
        return run_module(__name__, job | {"dump": dump}, environment=options)


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json and the tables as grouped_matmul.md."""
    from rich.progress import track

    rows, blocks = [], []
    for chip, name in track([(chip, name) for chip in config.chips for name in config.presets], description="kernels"):
        moe = preset(name).moe
        shape = config.tokens * moe.experts_per_token, moe.num_experts, preset(name).embed_dim, moe.mlp_dim
        rows += [_kernel_row(chip, name, shape, found) for found in _measure({"chip": chip, "shape": shape})]
    for topology, share in track(config.meshes, description="blocks"):
        for exchange in ("gather", "all_to_all") if share > 1 else ("gather",):
            job = {"preset": config.presets[0], "topology": topology, "share": share, "exchange": exchange}
            blocks.append(job | _measure(job | {"tokens": config.tokens}))
    (workdir / "grouped_matmul.md").write_text(_markdown(rows, blocks))
    ours = [row["floor_over_cycles"] for row in rows if row["implementation"] == "pallas"]
    write_results(workdir, {"kernels": rows, "blocks": blocks, "least_floor_over_cycles": min(ours, default=None)}, config)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    job = json.load(sys.stdin)
    print(json.dumps(_compile_kernels(job) if "chip" in job else _compile_block(job)))
