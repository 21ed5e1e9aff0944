"""Which layout of a training step on a slice is the fastest that fits, and what to do where none does."""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

from experiments.pod_plan.config import Config
from lfm_jax.models import ModelConfig
from lfm_jax.models.accounting import parameter_count
from lfm_jax.sharding import MeshConfig
from lfm_jax.sharding.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Layout:
    """mesh: devices along each axis; accumulation: micro-batches of a step; remat: what the backward pass computes again."""

    mesh: MeshConfig
    accumulation: int
    remat: str

    def __str__(self) -> str:
        return f"{mesh_text(self.mesh)}, {self.accumulation} x {self.remat}"


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


def search(config: Config, first: Layout, attempt: Callable[[Layout], Trial]) -> dict[Layout, Trial]:
    """Tries layouts as `config.search` says, the first one first; returns all that were tried."""
    choices = {
        "mesh": (first.mesh, *config.meshes),
        "accumulation": (first.accumulation, *config.accumulations),
        "remat": (first.remat, *config.remats),
    }
    tried: dict[Layout, Trial] = {}

    def run(layout: Layout) -> None:
        if layout not in tried:
            tried[layout] = attempt(layout)

    if config.search == "full":
        for values in itertools.product(*choices.values()):
            run(Layout(*values))
        return tried
    if config.search == "first":
        for remat, accumulation in itertools.product(choices["remat"], choices["accumulation"]):
            layout = Layout(first.mesh, accumulation, remat)
            run(layout)
            if tried[layout]["fits"]:
                break
        return tried
    at = first
    run(at)
    for name, values in choices.items():
        options = [dataclasses.replace(at, **{name: value}) for value in dict.fromkeys(values)]
        for option in options:
            run(option)
        at = best({option: tried[option] for option in options}) or _smallest({option: tried[option] for option in options}) or at
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
            for name in ("mesh", "accumulation", "remat")
            if (new := getattr(layout, name)) != getattr(first, name)
        ]
        rows.append({"remedy": ", ".join(changes), "saved_bytes": start - peak, "peak_bytes": peak, "fits": trial["fits"]})
    return sorted(rows, key=lambda row: -row["saved_bytes"])
