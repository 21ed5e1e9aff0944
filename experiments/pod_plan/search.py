"""Which layout of a training step on a slice is the fastest that fits, and what to do where none does."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

from experiments.pod_plan.config import Config
from lfm_jax.models import ModelConfig
from lfm_jax.models.accounting import parameter_count
from lfm_jax.sharding import CHUNKS, MeshConfig, mesh_sizes
from lfm_jax.sharding.chips import CHIPS

IN_LOOPS = " in loops"  # behind a layout whose layers are passes of a loop


@dataclasses.dataclass(frozen=True)
class Layout:
    """mesh: devices along each axis; accumulation: micro-batches of a step; remat: what the backward pass computes again.

    scan_layers: whether layers are passes of a loop (`ComputeConfig`).
    """

    mesh: MeshConfig
    accumulation: int
    remat: str
    scan_layers: bool = False

    def __str__(self) -> str:
        return f"{mesh_text(self.mesh)}, {self.accumulation} x {self.remat}{IN_LOOPS * self.scan_layers}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """rows, seq_len: of a step; devices: that it is split over."""

    rows: int
    seq_len: int
    devices: int


Trial = dict[str, Any]  # the figures of one layout: at least `fits`, and `peak_bytes` and `seconds_per_step`, which may be None


def mesh_text(mesh: MeshConfig) -> str:
    """The axes that are not 1; -1 is what the others leave."""
    sizes = {name: size for name, size in dataclasses.asdict(mesh).items() if size != 1}
    return " ".join(f"{name}={'all' if size == -1 else size}" for name, size in sizes.items()) or "one device"


def starting_mesh(model: ModelConfig, topology: str) -> MeshConfig:
    """Replicas, each over as few whole axes of the torus as leave half of the HBM to activations.

    What a device of a replica holds beside them are its part of the weights in bfloat16 and of their gradient in float32, 6 bytes
    a parameter; the state itself is split over all devices (see `MeshConfig`). Half of the HBM for those is a choice.
    """
    kind, _, shape = topology.partition(":")
    chip, held = CHIPS[kind], 6 * parameter_count(model)
    sizes = list(itertools.accumulate((1, chip.devices_per_chip, *map(int, shape.split("x"))), operator.mul))
    return MeshConfig(data=-1, fsdp=next((size for size in sizes if held / size <= chip.hbm_capacity / 2), sizes[-1]))


def split_sequences(layout: Layout, batch: Batch) -> Layout:
    """The layout with the smallest `context` at which a micro-batch has rows for all devices, if its own is too small for that.

    A replica of the model stays over as many devices where it can: what `context` takes, a given `fsdp` gives, since large arrays
    are split over both. Where no size does, the layout comes back as it is, for the compilation to say why.
    """
    mesh = layout.mesh
    for context in range(mesh.context, batch.devices + 1, mesh.context):
        given = math.gcd(context // mesh.context, mesh.fsdp) if mesh.fsdp > 0 else 1
        wider = dataclasses.replace(mesh, context=context, fsdp=mesh.fsdp // given)
        try:
            data, fsdp, expert, *_ = mesh_sizes(wider, batch.devices)
        except ValueError:  # no divisor of the devices
            continue
        whole = context == 1 or batch.seq_len % (CHUNKS * context) == 0
        if whole and batch.rows % (layout.accumulation * data * fsdp * expert) == 0:
            return dataclasses.replace(layout, mesh=wider)
    return layout


def search(config: Config, batch: Batch, first: Layout, attempt: Callable[[Layout], Trial]) -> dict[Layout, Trial]:
    """Tries layouts as `config.search` says, the first one first, each as `split_sequences` has it; returns all of them."""
    choices = {
        "mesh": (first.mesh, *config.meshes),
        "accumulation": (first.accumulation, *config.accumulations),
        "remat": (first.remat, *config.remats),
        "scan_layers": (first.scan_layers, *config.scan_layers),
    }
    tried: dict[Layout, Trial] = {}

    def run(proposed: Layout) -> Layout:
        layout = split_sequences(proposed, batch)
        if layout not in tried:
            tried[layout] = attempt(layout)
        return layout

    if config.search == "full":
        for values in itertools.product(*choices.values()):
            run(Layout(*values))
        return tried
    if config.search == "first":
        outermost_first = (choices[name] for name in ("scan_layers", "remat", "accumulation"))
        for scan_layers, remat, accumulation in itertools.product(*outermost_first):
            if tried[run(Layout(first.mesh, accumulation, remat, scan_layers))]["fits"]:
                break
        return tried
    at = first  # as proposed: with more micro-batches, `context` is found anew
    for name, values in choices.items():
        proposed = {run(option): option for option in (dataclasses.replace(at, **{name: value}) for value in values)}
        trials = {layout: tried[layout] for layout in proposed}
        at = proposed.get(best(trials) or _smallest(trials), at)
    return tried


def best(tried: dict[Layout, Trial]) -> Layout | None:
    """The fastest that fits; None if none does."""
    fitting = {layout: trial for layout, trial in tried.items() if trial["fits"]}
    return min(fitting, key=lambda layout: fitting[layout]["seconds_per_step"], default=None)


def _smallest(tried: dict[Layout, Trial]) -> Layout | None:
    known = {layout: trial for layout, trial in tried.items() if trial["peak_bytes"] is not None}
    return min(known, key=lambda layout: known[layout]["peak_bytes"], default=None)


def ladder(first: Layout, tried: dict[Layout, Trial]) -> list[dict[str, Any]]:
    """What each layout that was tried saves against the first, the most first; those that need more are left out."""
    start = tried[first]["peak_bytes"]
    if start is None:
        return []
    rows = []
    for layout, trial in tried.items():
        peak = trial["peak_bytes"]
        if layout == first or peak is None or peak >= start:
            continue
        changes = [
            f"{name} {mesh_text(new) if name == 'mesh' else new}"
            for name in ("mesh", "accumulation", "remat", "scan_layers")
            if (new := getattr(layout, name)) != getattr(first, name)
        ]
        rows.append({"remedy": ", ".join(changes), "saved_bytes": start - peak, "peak_bytes": peak, "fits": trial["fits"]})
    return sorted(rows, key=lambda row: -row["saved_bytes"])
