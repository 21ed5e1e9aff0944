"""What can be planned: architectures, slices, batches, contexts, and the ways to lay them out that are tried."""

import dataclasses
from typing import Literal

from lfm_jax.configuration import nearest
from lfm_jax.models import ComputeConfig, ModelConfig, preset
from lfm_jax.sharding import MeshConfig
from lfm_jax.sharding.chips import CHIPS
from lfm_jax.training import LossConfig, OptimizerConfig

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run whose speed its authors measured, to hold the estimate against.

    name, source: which run, and where it is told. devices: of the topology, the first ones (None: all); rows: of a step.
    tokens_per_second: of a chip, measured. notes: in what the run that is compiled differs from theirs.
    """

    name: str
    source: str
    model: ModelConfig
    topology: str
    devices: int | None = None
    rows: int
    seq_len: int
    accumulation: int = 1
    mesh: MeshConfig = MeshConfig()
    remat: Remat = "none"
    scan_layers: bool = False
    tokens_per_second: float
    notes: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """presets, topologies, seq_lens: each combination is planned. A topology is written as the TPU compiler does, v5e:16x16.

    seq_lens_on_last: more contexts, on the last of the topologies alone.
    batch_tokens: tokens of a step, or tokens_per_device: the same for each device; one of the two.
    total_tokens: of the whole run, for days and chip-hours.
    mesh, accumulation, compute: the layout that is tried first. mesh None: as the memory asks for (`search.starting_mesh`). Of
      any mesh, `context` grows where there are fewer rows than devices (`search.split_sequences`).
    meshes, accumulations, remats, scan_layers: what else is tried; none: nothing else.
    search: "greedy" takes mesh, accumulation, rematerialisation and layers in loops one after the other, each at its best; "full"
      all products; "first" one policy of rematerialisation after the other, each with every accumulation, and ends at what fits.
    options: of the TPU compiler, NAME=VALUE each, over those that a launch sets (lfm_jax/sharding/flags.py).
    compile_seconds: that one compilation may take.
    published: runs that are planned as they were, and compared with what was measured.
    """

    presets: tuple[str, ...]
    topologies: tuple[str, ...]
    seq_lens: tuple[int, ...] = (4096,)
    seq_lens_on_last: tuple[int, ...] = ()
    batch_tokens: int | None = None
    tokens_per_device: int | None = None
    total_tokens: int = 10**12
    mesh: MeshConfig | None = None
    accumulation: int = 1
    compute: ComputeConfig = ComputeConfig(dtype="bfloat16")
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig(z_loss=1e-4)
    search: Literal["greedy", "full", "first"] = "greedy"
    meshes: tuple[MeshConfig, ...] = ()
    accumulations: tuple[int, ...] = ()
    remats: tuple[Remat, ...] = ()
    scan_layers: tuple[bool, ...] = ()
    options: tuple[str, ...] = ()
    compile_seconds: float = 3600.0
    published: tuple[PublishedRun, ...] = ()

    def __post_init__(self):
        for name in self.presets:
            preset(name)  # raises where there is none
        for topology in (*self.topologies, *(run.topology for run in self.published)):
            kind = topology.partition(":")[0]
            known = [name for name, chip in CHIPS.items() if chip.topology]
            if kind not in known or ":" not in topology:
                raise ValueError(f"topologies: {topology!r} is none, write it like v5e:16x16. {nearest(kind, known)}")
        if (self.batch_tokens is None) == (self.tokens_per_device is None):
            raise ValueError("give batch_tokens, of the whole step, or tokens_per_device, and not both")
        wrong = [option for option in self.options if "=" not in option]
        if wrong:
            raise ValueError(f"options: {wrong[0]!r} is not of the form NAME=VALUE")
