"""Blocks of splash attention's kernels, by the TPU compiler's own schedules; needs no TPU.

Each candidate's kernels are compiled, and the bundles of their final schedules counted branch by branch: what runs at every
step of the grid, what when a row of blocks begins or ends, and what for a block that the mask does not leave empty. Which of them
these are is known, so the time of any sequence follows: the largest of bundles, matrix unit and traffic.
"""

import dataclasses
import functools
import glob
import json
import math
import operator
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from experiments.benchmarks.processes import ROOT, run_module
from experiments.results import write_results
from lfm_jax.configuration import nearest
from lfm_jax.sharding.chips import CHIPS

Candidate = tuple[int, int, int, str]
KERNELS = ("fwd", "dkv", "dq", "fused")
# The head's dimension is the minor one of q, k and v ("h"), or the sequence is ("s").
_LAYOUTS = {"h": "HEAD_DIM_MINOR", "s": "SEQ_MINOR"}
_PLAIN = "hhh"
# What was taken for every shape before this was measured: each head alone, keys' and queries' gradients in a kernel each.
BEFORE: Candidate = (1024, 1024, 1024, _PLAIN)
_LANES, _SUBLANES = 128, 8
_MATRIX_UNIT = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}  # rows and columns of one
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3, "fused": 5}  # of queries, keys and head_dim, for a block
_CALLS, _SEQ = 8, 16_384  # of what is compiled: more than XLA can keep in VMEM
_SMALL = 256  # blocks of the kernels that are compiled with the one that is looked at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """chips: names in `lfm_jax.sharding.chips`; seqs: lengths of the packed sequences.

    shapes: (heads, heads of keys, head_dim, window); a window of 0 is none.
    causal, windowed: blocks to compare without a window and with one: (queries, keys, keys multiplied at once, a letter for the
      layout of each of q, k and v: "h" where the head's dimension is the minor one, "s" where the sequence is).
    """

    chips: tuple[str, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    seqs: tuple[int, ...]
    causal: tuple[Candidate, ...]
    windowed: tuple[Candidate, ...]

    def __post_init__(self):
        unknown = [name for name in self.chips if name not in CHIPS or CHIPS[name].topology is None]
        if unknown:
            raise ValueError(f"chips: {unknown[0]!r} is none. {nearest(unknown[0], [n for n, c in CHIPS.items() if c.topology])}")


@dataclasses.dataclass(frozen=True)
class Branches:
    """Bundles of one grid step: always; when a row of blocks begins and when it ends; for a block that is not empty."""

    always: int
    begin: int
    work: int
    end: int


def parse_branches(text: str) -> Branches:
    """Reads a `final_bundles.txt` of splash attention: the longest branch is the work, those around it begin and end a row.

    A branch stands between the jump past it and the bundle that closes the region of the jump's number; one that holds others is
    the software pipeline's own.
    """
    bundles = [line for line in text.splitlines() if re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2} ?)*\s*:", line)]
    opened: dict[str, int] = {}
    spans = []
    for index, line in enumerate(bundles):
        jump = re.search(r"sbr\.rel .*target = \$region(\d+)", line)
        if jump:
            opened[jump[1]] = index
        spans += [(opened.pop(region), index) for region in re.findall(r"empty region (\d+)", line) if region in opened]
    inner = sorted(span for span in spans if not any(span[0] < other[0] and other[1] < span[1] for other in spans))
    lengths = [end - start for start, end in inner]
    step = sum(bool(re.search(r":\s*>", line)) for line in bundles)
    work = lengths.index(max(lengths))
    return Branches(step - sum(lengths), sum(lengths[:work]), lengths[work], sum(lengths[work + 1 :]))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One sequence. group: heads whose queries share a call to the kernel; they share keys."""

    heads: int
    head_dim: int
    window: int
    seq: int
    group: int

    @property
    def queries(self) -> int:
        """Of one call, those of a place beside one another."""
        return self.seq * self.group

    @property
    def calls(self) -> int:
        """To the kernel, for all heads."""
        return self.heads // self.group

    def live(self, block_q: int, block_kv: int) -> np.ndarray:
        """[blocks of queries, blocks of keys], whether any of the queries sees any of the keys."""
        queries, keys = np.arange(0, self.queries, block_q)[:, None], np.arange(0, self.seq, block_kv)
        first, last = queries // self.group, (queries + block_q - 1) // self.group
        return (keys <= last) & (keys + block_kv > (first - self.window + 1 if self.window else 0))


def kernel_seconds(kernel: str, branches: Branches, problem: Problem, block_q: int, block_kv: int, name: str) -> float:
    """Of one kernel over the whole sequence and all heads, calls shared by the cores.

    A block that is not empty takes the bundles of its branch, or as long as the matrix unit has to do at its published peak, a
    narrow head filling a part of it: schedules do not wait for it, and some are shorter than that. Rows of 64 are moved padded to
    128 lanes, and what is broadcast over lanes or sublanes is moved as such. Partial sums of the fused backward pass are written
    for every block, empty or not, and added up after the kernel.
    """
    chip, unit = CHIPS[name], _MATRIX_UNIT[name]
    width = -(-problem.head_dim // unit) * unit
    multiplying = _PRODUCTS[kernel] * 2 * block_q * block_kv * width / (chip.flops / chip.clock_hz / chip.cores)
    live = problem.live(block_q, block_kv)
    if kernel in ("dkv", "fused"):
        live = live.T
    lines, working = len(live), int(live.sum())
    steps = live.size if kernel == "fused" else lines * int(live.sum(axis=1).max())
    cycles = steps * branches.always + lines * (branches.begin + branches.end) + working * max(branches.work, multiplying)
    row = 2 * -(-problem.head_dim // _LANES) * _LANES
    lanes, sublanes = 4 * _LANES, 4 * _SUBLANES  # for each row, of what is a number for each row
    after = 0
    if kernel in ("fwd", "dq"):  # queries stay, keys and their segments come by: places, segments; output and normalizer
        held = 2 * lanes + (2 * row + lanes if kernel == "fwd" else 3 * row + 8)
        moved = problem.queries * held + working * block_kv * (2 * row + sublanes)
    else:  # keys stay, queries come by with their gradients, places, segments, normalizer and products with the output
        moved = problem.seq * (4 * row + lanes) + working * block_q * (2 * row + 4 * sublanes)
        if kernel == "fused":
            moved += lines * problem.queries * row
            after = (lines + 1) * problem.queries * row
    compute = math.ceil(problem.calls / chip.cores) * cycles / chip.clock_hz
    return max(compute, problem.calls * moved / chip.hbm_bytes) + problem.calls * after / chip.hbm_bytes


Measured = dict[str, Branches | str]


def measure(chip: str, head_dim: int, window: int, candidates: Sequence[Candidate]) -> dict[Candidate, Measured]:
    """For each candidate by kernel its `Branches`, or in words why it does not compile."""
    with tempfile.TemporaryDirectory() as dump:
        # Without the expression for the pass the dump of one kernel has 100 MB and more.
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        job = {"chip": chip, "head_dim": head_dim, "window": window, "candidates": candidates, "dump": dump}
        found = run_module(__name__, job, environment={"LIBTPU_INIT_ARGS": flags})
    read = lambda each: each if isinstance(each, str) else Branches(**each)
    return {
        tuple(candidate): {kernel: read(each) for kernel, each in row.items()}
        for candidate, row in zip(candidates, found, strict=True)
    }


def _worker(chip: str, head_dim: int, window: int, candidates: list, dump: str) -> list[dict[str, Any]]:
    found = []
    for block_q, block_kv, compute, layouts in candidates:
        dkv = {"block_q_dkv": block_q, "block_kv_dkv": block_kv, "block_kv_dkv_compute": compute}
        blocks = {
            "fwd": {"block_q": block_q, "block_kv": block_kv, "block_kv_compute": compute},
            "dkv": dkv,
            "dq": {"block_q_dq": block_q, "block_kv_dq": block_kv},
            "fused": dkv | {"block_q_dq": None, "block_kv_dq": None, "use_fused_bwd_kernel": True},
        }
        schedules = functools.partial(_schedules, chip, head_dim, window, blocks, layouts, dump)
        found.append(schedules(["fwd", "fused"]) | schedules(["dkv", "dq"]))
    return found


def _schedules(chip: str, head_dim: int, window: int, blocks: dict, layouts: str, dump: str, kernels: list) -> dict[str, Any]:
    """The schedules of kernels compiled in one program, or singly where they do not fit: "VMEM" for one that does not."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    from lfm_jax.kernels import attention_tpu
    from lfm_jax.sharding import aot

    for path in glob.glob(f"{dump}/*"):
        os.remove(path)
    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices(CHIPS[chip].topology)[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    q_layout, k_layout, v_layout = (splash.QKVLayout[_LAYOUTS[letter]] for letter in layouts)
    small = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), _SMALL)
    taken = functools.reduce(operator.or_, (blocks[kernel] for kernel in kernels), small)
    sizes = splash.BlockSizes(**taken, q_layout=q_layout, k_layout=k_layout, v_layout=v_layout)
    call = attention_tpu.make_kernel(tuple(range(_SEQ)), 1, 1, window or None, sizes, False)

    def both_ways(query, key, value, segments, dout):
        one = lambda *arrays: call(*arrays, segment_ids=splash.SegmentIds(segments, segments))
        out, transpose = jax.vjp(jax.vmap(one), query, key, value)
        return out, transpose(dout)

    query, key = array(_CALLS, 1, _SEQ, head_dim), array(_CALLS, _SEQ, head_dim)
    try:
        aot.compile_for(both_ways, (query, key, key, array(_SEQ, dtype=jnp.int32), query))
    except jax.errors.JaxRuntimeError as error:
        if "vmem" not in str(error):
            raise
        if len(kernels) == 1:
            return {kernels[0]: "VMEM"}
        return {name: each for kernel in kernels
                for name, each in _schedules(chip, head_dim, window, blocks, layouts, dump, [kernel]).items()}  # fmt: skip
    found = {}
    for kernel in kernels:
        named = glob.glob(f"{dump}/*splash_mqa_{kernel.replace('fused', 'dkv')}_*final_bundles.txt")
        (path,) = [path for path in named if "schedule-analysis" not in path]
        found[kernel] = dataclasses.asdict(parse_branches(Path(path).read_text()))
    return found


def _chosen(problem: Problem) -> tuple[Candidate, Candidate, bool]:
    """What the library takes: blocks of the forward and of the backward pass, and whether that is one kernel."""
    from lfm_jax.kernels import attention_tpu

    sizes = attention_tpu.block_sizes(problem.queries, problem.seq, problem.head_dim, problem.window or None, problem.calls)
    forward = (sizes.block_q, sizes.block_kv, sizes.block_kv_compute, _PLAIN)
    backward = (sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute, _PLAIN)
    return forward, backward, sizes.use_fused_bwd_kernel


def _times(measured: dict[Candidate, Measured], problem: Problem, chip: str) -> dict[str, dict[Candidate, float]]:
    """Seconds of the forward pass and of the backward pass in two kernels and in one, by candidate, where it compiles."""
    parts = {"forward": ("fwd",), "two": ("dkv", "dq"), "one": ("fused",)}
    return {
        part: {
            candidate: sum(kernel_seconds(kernel, found[kernel], problem, *candidate[:2], chip) for kernel in kernels)
            for candidate, found in measured.items()
            if not any(isinstance(found[kernel], str) for kernel in kernels)
        }
        for part, kernels in parts.items()
    }


def _row(name: str, shape: tuple[int, int, int, int], seq: int, measured: dict[Candidate, Measured]) -> dict[str, Any]:
    """What the library takes for one shape on one chip, against the order before it and the best of the candidates."""
    heads, kv_heads, head_dim, window = shape
    together = Problem(heads, head_dim, window, seq, heads // kv_heads)
    apart = dataclasses.replace(together, group=1)
    times, before = _times(measured, together, name), _times(measured, apart, name)
    forward, backward, fused = _chosen(together)
    best = min(min(times["one"].values()), min(times["two"].values()))
    row = {
        "chip": name, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": window, "seq": seq,
        "forward_blocks": forward[:3], "backward_blocks": backward[:3], "fused": fused,
        "before_forward_seconds": before["forward"][BEFORE], "before_backward_seconds": before["two"][BEFORE],
        "forward_seconds": times["forward"][forward], "backward_seconds": times["one" if fused else "two"][backward],
        "best_forward_seconds": min(times["forward"].values()), "best_backward_seconds": best,
        "candidates": [{"blocks": each, **{part: found.get(each) for part, found in times.items()}} for each in measured],
    }  # fmt: skip
    total = lambda prefix: row[f"{prefix}forward_seconds"] + row[f"{prefix}backward_seconds"]
    return row | {"before_over_chosen": total("before_") / total(""), "chosen_over_best": total("") / total("best_")}


def _markdown(rows: list[dict], schedules: list[dict]) -> str:
    """The two tables, for documentation."""
    lines = [
        "| chip | heads / of keys x head_dim, window | sequence | before: forward, backward ms | blocks forward | backward "
        "| forward ms | backward ms | before / chosen | chosen / best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    blocks = lambda sizes: " x ".join(map(str, sizes[:2])) + f" / {sizes[2]}"
    for row in rows:
        ms = {key: f"{1e3 * value:.3f}" for key, value in row.items() if key.endswith("_seconds")}
        cells = [
            row["chip"], f"{row['heads']} / {row['kv_heads']} x {row['head_dim']}, {row['window'] or 'none'}", f"{row['seq']:,}",
            f"{ms['before_forward_seconds']}, {ms['before_backward_seconds']}", blocks(row["forward_blocks"]),
            blocks(row["backward_blocks"]) + (", one kernel" if row["fused"] else ", two kernels"),
            ms["forward_seconds"], ms["backward_seconds"], f"{row['before_over_chosen']:.2f}", f"{row['chosen_over_best']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| chip | head_dim, window | blocks | forward | keys and values | queries | all in one |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for each in schedules:
        layouts = "" if each["blocks"][3] == _PLAIN else f", {each['blocks'][3]}"
        cells = [each["chip"], f"{each['head_dim']}, {each['window'] or 'none'}", blocks(each["blocks"]) + layouts]
        for kernel in KERNELS:
            found = each[kernel]
            text = found if isinstance(found, str) else f"{found['work']:,} ({found['always']}; {found['begin'] + found['end']})"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json and the tables as attention.md."""
    from rich.progress import track

    kinds = dict.fromkeys((head_dim, window) for _, _, head_dim, window in config.shapes)
    rows, schedules = [], []
    for name, (head_dim, window) in track([(name, kind) for name in config.chips for kind in kinds], description="compiling"):
        shapes = [shape for shape in config.shapes if shape[2:] == (head_dim, window)]
        problems = [Problem(shape[0], head_dim, window, seq, shape[0] // shape[1]) for shape in shapes for seq in config.seqs]
        chosen = [blocks for problem in problems for blocks in _chosen(problem)[:2]]
        candidates = map(tuple, config.windowed if window else config.causal)
        measured = measure(name, head_dim, window, list(dict.fromkeys([BEFORE, *candidates, *chosen])))
        rows += [_row(name, shape, seq, measured) for shape in shapes for seq in config.seqs]
        for blocks, found in measured.items():
            plain = {kernel: each if isinstance(each, str) else dataclasses.asdict(each) for kernel, each in found.items()}
            schedules.append({"chip": name, "head_dim": head_dim, "window": window, "blocks": blocks, **plain})
    (workdir / "attention.md").write_text(_markdown(rows, schedules))
    figures = {
        "shapes": rows,
        "schedules": schedules,
        "least_before_over_chosen": min(row["before_over_chosen"] for row in rows),
        "most_chosen_over_best": max(row["chosen_over_best"] for row in rows),
    }
    write_results(workdir, figures, config)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(_worker(**json.load(sys.stdin))))
