"""Where a launched command runs: the settings, and the shapes in which TPU slices can be had."""

import dataclasses
import functools
import inspect
import itertools
import math
import re
from typing import NamedTuple

from lfm_jax.configuration import flatten, nearest, with_defaults


class Generation(NamedTuple):
    """What a TPU generation is called, and in which shapes it comes.

    accelerator: prefix of its types in the Cloud TPU API, SkyPilot and xpk; a type ends on the chips times `counted`.
    gke: the value of GKE's node label. runtime: the image of its VMs; None where there are none outside of GKE.
    largest: chips of the largest slice. dimensions: of its torus.
    """

    accelerator: str
    counted: int
    gke: str
    runtime: str | None
    largest: int
    dimensions: int


# Names: cloud.google.com/tpu/docs (v5e, v5p, v6e, runtimes), cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and xpk
# 1.16, core/system_characteristics.py, which says the same. TPU v7 is to be had through GKE alone.
GENERATIONS = {
    "v5e": Generation("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 256, 2),
    "v5p": Generation("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 6144, 3),
    "v6e": Generation("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 256, 2),
    "tpu7x": Generation("tpu7x", 2, "tpu7x", None, 9216, 3),
}
_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST_NAME = 36  # a pod's name adds the job's and two numbers to it, and may have 63 letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where and as what a launched command runs.

    topology: of a slice, e.g. v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4.
    image: the container image, built from the Dockerfile and pushed where the cluster can pull it.
    slices: that many, over which the data-centre network carries what crosses from one to another.
    name: of the job; None: the last part of --workdir.
    spot: machines that cost less and may be taken away; the run resumes on others.
    project, zone: of Google Cloud; gcloud needs both, xpk too, and SkyPilot looks in every zone where none is given.
    cluster: the GKE cluster, which xpk asks for. queue: Kueue's LocalQueue, on clusters that have Kueue.
    service_account: as whom it reads and writes gs://: Kubernetes' own for gke, an e-mail address for gcloud; None: the default.
    compilation_cache: folder of compiled programs, so that a restart does not compile anew; None: one in the workdir's bucket.
    max_restarts: after crashes, on gke in all and on gcloud in an hour; interruptions and preemptions do not count.
    folder: where the files are written, without --dry_run.
    """

    topology: str
    image: str
    slices: int = 1
    name: str | None = None
    spot: bool = True
    project: str | None = None
    zone: str | None = None
    cluster: str | None = None
    queue: str | None = None
    service_account: str | None = None
    compilation_cache: str | None = None
    max_restarts: int = 10
    folder: str = "workdirs/launch"

    def __post_init__(self):
        parse_topology(self.topology)
        if self.slices < 1:
            raise ValueError(f"slices: must be at least 1, got {self.slices}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: must not be negative, got {self.max_restarts}")
        if not re.fullmatch(r"[\w.:/@-]+", self.image):
            example = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:TAG"
            raise ValueError(f"image: {self.image!r} is no name of a container image, like {example}")
        if self.name is not None and (not self.name or self.name != as_name(self.name)):
            example = as_name(self.name) or "first-run"
            raise ValueError(f"name: {self.name!r} must be lower-case letters, digits and dashes, like {example!r}")
        if not (self.compilation_cache or "gs://").startswith("gs://"):
            raise ValueError(f"compilation_cache: {self.compilation_cache!r} does not outlive a pod; give a folder on gs://")


class Slice(NamedTuple):
    """A slice's shape. topology: as "16x16"."""

    generation: str
    topology: str
    chips: int
    hosts: int

    @property
    def chips_per_host(self) -> int:
        """All of a machine's."""
        return self.chips // self.hosts

    @property
    def accelerator_type(self) -> str:
        """What the Cloud TPU API, SkyPilot and xpk call it: by its size, not by its shape."""
        generation = GENERATIONS[self.generation]
        return f"{generation.accelerator}-{self.chips * generation.counted}"


def parse_topology(text: str) -> Slice:
    """Reads e.g. "v5e:16x16".

    Machines have 4 chips: so has every node pool that xpk makes, though v5e and v6e come with 8 on one machine as well.

    Raises:
      ValueError: there is no such slice; the nearest is named.
    """
    generation, _, topology = text.partition(":")
    if generation not in GENERATIONS:
        raise ValueError(f"topology: {text!r} is of no TPU generation. {nearest(generation, GENERATIONS)}")
    shapes = [f"{generation}:{_written(shape)}" for shape in _shapes(generation)]
    if text not in shapes:
        listed = shapes if len(shapes) < 10 else [*shapes[:8], "... (sides that are multiples of 4, in ascending order)"]
        raise ValueError(f"topology: {text!r} is no slice. {nearest(text, shapes, listed)}")
    chips = math.prod(map(int, topology.split("x")))
    return Slice(generation, topology, chips, hosts=max(1, chips // 4))


def same_size(piece: Slice) -> str:
    """The topology that an accelerator type of this size stands for: the one with the shortest sides."""
    shapes = [shape for shape in _shapes(piece.generation) if math.prod(shape) == piece.chips]
    return _written(min(shapes, key=sum))


def as_name(text: str) -> str:
    """As a name that Kubernetes, Google Cloud and SkyPilot all take.

    >>> as_name("LFM2_350M.first/")
    'lfm2-350m-first'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789")[:_LONGEST_NAME].strip("-")


def describe() -> str:
    """Every setting, for --help."""
    lines = [f"--launch.{name}={value}" for name, value in flatten(with_defaults(LaunchConfig, {})).items()]
    return "\n".join([inspect.getdoc(LaunchConfig), "", *lines])


@functools.cache
def _shapes(generation: str) -> tuple[tuple[int, ...], ...]:
    """Smallest first. In three dimensions cubes of 4 are put together, sides in ascending order."""
    kind = GENERATIONS[generation]
    if kind.dimensions == 2:
        return _PLANES
    cubes = itertools.combinations_with_replacement(range(4, 257, 4), 3)
    fits = [shape for shape in cubes if math.prod(shape) <= kind.largest]
    return (*_BELOW_A_CUBE, *sorted(fits, key=lambda shape: (math.prod(shape), sum(shape))))


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
