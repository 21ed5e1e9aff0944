"""The short-convolution kernel against its floor and against XLA, by the TPU compiler's own schedules; needs no TPU."""

import dataclasses
import math

from etils import epath

from experiments.benchmarks import tpu_compiler
from experiments.results import write_results
from lfm_jax.configuration import nearest
from lfm_jax.models import preset
from lfm_jax.sharding.chips import CHIPS

KERNELS = {"forward": "short_conv", "backward": "short_conv_grad"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """chips: names in `lfm_jax.sharding.chips`; presets: whose convolutions (equal ones are measured once).

    seq, batches: of the presets' rows; long_seq: of one more row, a single sequence through the last preset's convolution.
    document_length: tokens of an average document in the rows with packed segments.
    """

    chips: tuple[str, ...]
    presets: tuple[str, ...]
    seq: int = 4096
    batches: tuple[int, ...] = (2, 8)
    long_seq: int = 131_072
    document_length: int = 512

    def __post_init__(self):
        unknown = [name for name in self.chips if name not in CHIPS or CHIPS[name].topology is None]
        if unknown:
            raise ValueError(f"chips: {unknown[0]!r} is none. {nearest(unknown[0], [n for n, c in CHIPS.items() if c.topology])}")
        for name in self.presets:
            preset(name)  # raises where there is none


def build(job: dict) -> dict:
    """The programs of one shape on one chip: the kernels alone, or XLA's version of them and the whole block both ways."""
    import jax
    import jax.numpy as jnp

    from lfm_jax.kernels import short_conv, short_conv_tpu
    from lfm_jax.kernels.short_conv_reference import reference_backward, short_conv_reference
    from lfm_jax.models.layers import project
    from lfm_jax.sharding import aot

    batch, seq, channels, width = job["shape"]
    device = jax.sharding.SingleDeviceSharding(aot.tpu_devices(CHIPS[job["chip"]].topology)[0])
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    planes, taps, plane = array(3, batch, seq, channels), array(width, channels, dtype=jnp.float32), array(batch, seq, channels)
    gradients = plane, array(batch, width - 1, channels)
    if job["schedules"]:
        flags = array(batch, seq, dtype=jnp.int32)
        cases = {"": (planes, taps, None, None, None), " packed": (planes, taps, None, flags, None)}
        programs = {}
        for case, inputs in cases.items():
            programs[f"forward{case}"] = short_conv_tpu.forward, inputs, KERNELS["forward"]
            programs[f"backward{case}"] = short_conv_tpu.backward, (*inputs, *gradients), KERNELS["backward"]
        return programs

    def block(implementation):
        """in_proj, gate, convolution, gate, out_proj."""

        def forward(x, in_proj, taps, out_proj):
            bcx = project(x, in_proj).transpose(2, 0, 1, 3)
            return project(short_conv(bcx, taps, implementation=implementation)[0], out_proj)

        def both(x, in_proj, taps, out_proj, dy):
            y, transpose = jax.vjp(forward, x, in_proj, taps, out_proj)
            return y, transpose(dy)

        arguments = plane, array(channels, 3, channels), taps, array(channels, channels)
        return {
            f"block forward {implementation}": (forward, arguments, None),
            f"block both {implementation}": (both, (*arguments, plane), None),
        }

    inputs = planes, taps, None, None, None
    return {
        "xla forward": (short_conv_reference, inputs, None),
        "xla backward": (reference_backward, (*inputs, *gradients), None),
        **block("pallas"),
        **block("reference"),
    }


def least_bytes(shape: tuple[int, ...], direction: str, packed: bool, value_bytes: int = 2) -> int:
    """Every input read once and every output written once, in values of so many bytes; taps and their gradient in float32."""
    batch, seq, channels, width = shape
    planes = {"forward": 3 + 1, "backward": 3 + 1 + 3}[direction]
    taps = {"forward": 1, "backward": 2}[direction] * 4 * width * channels
    return value_bytes * planes * batch * seq * channels + taps + 4 * batch * seq * packed


def _masked_share(config: Config, width: int, direction: str, chunk_time: int) -> float:
    """The share of a kernel's inner passes that meet a document's border, for borders at random."""
    reach = {"forward": width - 2, "backward": 2 * width - 3}[direction]
    return min(1.0, (chunk_time + reach) / config.document_length)


def _kernel_row(config: Config, name: str, shape: tuple[int, ...], direction: str, packed: bool, programs: dict) -> dict:
    import jax
    import jax.numpy as jnp

    from lfm_jax.kernels import short_conv_tpu

    batch, seq, channels, width = shape
    chip = CHIPS[name]
    bcx = jax.ShapeDtypeStruct((3, batch, seq, channels), jnp.bfloat16)
    plan = short_conv_tpu.make_plan(bcx, width, biased=False, segmented=packed, backward=direction == "backward")
    plain = programs[direction]
    program = programs[f"{direction} packed"] if packed else plain
    passes = plan.block_time // plan.chunk_time
    bundles = program["step"] + passes * sum(plain["loops"])
    if packed:
        # The last loop of the packed kernel holds both its plain and its masked body.
        extra = sum(program["loops"]) - sum(plain["loops"]) - plain["loops"][-1]
        bundles += round(passes * _masked_share(config, width, direction, plan.chunk_time) * max(0, extra))
    rows, columns, steps = plan.grid
    cycles = bundles * steps * math.ceil(rows * columns / chip.cores)
    least = least_bytes(shape, direction, packed)
    moved = sum(program["block_bytes"])
    memory = moved * chip.clock_hz / chip.hbm_bytes
    return {
        "chip": name, "batch": batch, "seq": seq, "channels": channels, "width": width, "direction": direction, "packed": packed,
        "least_bytes": least, "kernel_bytes": moved, "bytes_over_least": moved / least,
        "bundles_per_step": bundles, "grid_steps": rows * columns * steps, "compute_cycles": cycles,
        "memory_cycles": round(memory), "compute_over_memory": cycles / memory, "kernel_cycles": max(cycles, round(memory)),
    }  # fmt: skip


def _ratio(xla_cycles: int | None, kernel_cycles: int) -> float | None:
    return None if xla_cycles is None else xla_cycles / kernel_cycles


def _block_row(name: str, shape: tuple[int, ...], part: str, kernel_rows: list[dict], schedules: dict, programs: dict) -> dict:
    """The whole block both ways. Its kernels are charged with the HBM traffic that is left: XLA keeps what fits in VMEM."""
    chip = CHIPS[name]
    pallas, xla = (programs[f"block {part} {implementation}"] for implementation in ("pallas", "reference"))
    cycles = pallas["estimated_cycles"]
    for row in kernel_rows:
        in_vmem = pallas["in_vmem"].get(KERNELS[row["direction"]])
        if in_vmem is not None:
            moved = schedules[row["direction"]]["block_bytes"]
            hbm = sum(size for size, free in zip(moved, in_vmem, strict=True) if not free)
            cycles += max(row["compute_cycles"], round(hbm * chip.clock_hz / chip.hbm_bytes))
    return {
        "chip": name, **dict(zip(("batch", "seq", "channels", "width"), shape, strict=True)), "part": part,
        "kernel_block_cycles": cycles, "xla_block_cycles": xla["estimated_cycles"],
        "kernel_block_bytes": round(pallas["bytes"]), "xla_block_bytes": round(xla["bytes"]),
        "xla_over_kernel": _ratio(xla["estimated_cycles"], cycles),
    }  # fmt: skip


def _shape_rows(config: Config, name: str, shape: tuple[int, ...]) -> tuple[list[dict], list[dict]]:
    """(kernel rows, block rows) of one shape on one chip."""
    job = {"chip": name, "shape": shape}
    schedules = tpu_compiler.measure(__name__, job | {"schedules": True})
    programs = tpu_compiler.measure(__name__, job | {"schedules": False})
    plain, packed = (
        [_kernel_row(config, name, shape, direction, packed, schedules) for direction in KERNELS] for packed in (False, True)
    )
    for row in plain:
        xla = programs[f"xla {row['direction']}"]
        row |= {"xla_bytes": round(xla["bytes"]), "xla_cycles": xla["estimated_cycles"]}
        row["xla_over_kernel"] = _ratio(row["xla_cycles"], row["kernel_cycles"])
    blocks = [_block_row(name, shape, part, plain, schedules, programs) for part in ("forward", "both")]
    return plain + packed, blocks


def _shapes(config: Config) -> list[tuple[int, int, int, int]]:
    convolutions = dict.fromkeys((preset(name).embed_dim, preset(name).conv_width) for name in config.presets)
    shapes = [(batch, config.seq, *convolution) for batch in config.batches for convolution in convolutions]
    return [*shapes, (1, config.long_seq, *shapes[-1][2:])]


def _shape_text(row: dict) -> str:
    return f"{row['batch']} x {row['seq']:,} x {row['channels']}, {row['width']}"


def _markdown(rows: list[dict], blocks: list[dict]) -> str:
    """The two tables, for documentation."""
    lines = [
        "| chip | batch x seq x channels, width | direction | packed | bytes / least | compute / memory cycles | kernel cycles "
        "| XLA bytes / least | XLA cycles | XLA / kernel |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    count = lambda cycles: "not estimated" if cycles is None else f"{cycles:,}"
    times = lambda ratio, digits: "" if ratio is None else f"{ratio:.{digits}f}"
    for row in rows:
        xla = ["", "", ""]
        if not row["packed"]:
            xla = [times(row["xla_bytes"] / row["least_bytes"], 2), count(row["xla_cycles"]), times(row["xla_over_kernel"], 1)]
        cells = [
            row["chip"], _shape_text(row), row["direction"], "yes" if row["packed"] else "no", f"{row['bytes_over_least']:.3f}",
            f"{row['compute_over_memory']:.2f}", f"{row['kernel_cycles']:,}", *xla,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| chip | batch x seq x channels, width | block | cycles with the kernel | cycles with XLA | XLA / kernel |",
        "|---|---|---|---|---|---|",
    ]
    for row in blocks:
        part = {"forward": "forward", "both": "forward and backward"}[row["part"]]
        ratio = times(row["xla_over_kernel"], 2)
        cells = [row["chip"], _shape_text(row), part, f"{row['kernel_block_cycles']:,}", count(row["xla_block_cycles"]), ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict], blocks: list[dict], path: epath.Path) -> None:
    """Above: the kernel's memory and compute time and XLA's time, over the least memory time. Below: the whole block."""
    from matplotlib.figure import Figure

    chips = list(dict.fromkeys(row["chip"] for row in rows))
    figure = Figure(figsize=(3 + 3 * len(chips), 2 + 0.4 * len(rows) / len(chips)), layout="constrained")
    axes = figure.subplots(2, len(chips), squeeze=False, sharey="row", sharex="row")
    for column, chip in enumerate(chips):
        own = [row for row in rows if row["chip"] == chip and not row["packed"]]
        names = [f"{_shape_text(row)} {row['direction']}" for row in own]
        for key, text in (("memory_cycles", "kernel: memory"), ("compute_cycles", "kernel: compute"), ("xla_cycles", "XLA")):
            known = [(row[key] * row["bytes_over_least"] / row["memory_cycles"], name)
                     for row, name in zip(own, names, strict=True) if row[key] is not None]  # fmt: skip
            axes[0, column].plot(*zip(*known, strict=True), "o", label=text)
        axes[0, column].set(title=chip, xscale="log", xlabel="cycles / memory time of the least bytes")
        own = [row for row in blocks if row["chip"] == chip and row["xla_over_kernel"] is not None]
        names = [f"{_shape_text(row)} {'forward' if row['part'] == 'forward' else 'both ways'}" for row in own]
        axes[1, column].barh(names, [row["xla_over_kernel"] for row in own], color="tab:green")
        axes[1, column].set(xlabel="whole block: XLA / with the kernel")
        for row in (0, 1):
            axes[row, column].axvline(1, color="black", linewidth=0.8)
            axes[row, column].tick_params(axis="y", labelsize=7)
            axes[row, column].grid(alpha=0.3)
    for row in (0, 1):
        axes[row, 0].invert_yaxis()
    axes[0, 0].legend(frameon=False, fontsize=8)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json, the tables as short_conv.md and the plot short_conv.png."""
    from rich.progress import track

    jobs = [(chip, shape) for chip in config.chips for shape in _shapes(config)]
    rows, blocks = [], []
    for chip, shape in track(jobs, description="compiling"):
        kernel_rows, block_rows = _shape_rows(config, chip, shape)
        rows += kernel_rows
        blocks += block_rows
    (workdir / "short_conv.md").write_text(_markdown(rows, blocks))
    _plot(rows, blocks, workdir / "short_conv.png")
    figures = {
        "kernels": rows,
        "blocks": blocks,
        "most_bytes_over_least": max(row["bytes_over_least"] for row in rows),
        "most_compute_over_memory": max(row["compute_over_memory"] for row in rows),
        "least_xla_over_kernel_block": min(row["xla_over_kernel"] for row in blocks if row["xla_over_kernel"]),
    }
    write_results(workdir, figures, config)
