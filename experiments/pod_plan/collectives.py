"""What a collective costs on a torus of chips: bytes over the bandwidth of the links that its group spans, and the hops."""

import dataclasses
import functools
import itertools
import math
import re

import numpy as np

from experiments.pod_plan.hlo import Computation, Instruction, Program
from lfm_jax.sharding.chips import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# One hop over a link takes about a microsecond (the scaling book, "TPUs").
HOP_SECONDS = 1e-6
# Devices are numbered along the mesh, unless a list of them follows: numbered in one shape, turned, read off in another.
_MESH = re.compile(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?:\[[\d,]+\]<=)?\[(?P<order>[\d,]+)\](?:T\((?P<turned>[\d,]+)\))?\))? *"
    r"\{(?P<over>[^}]*)\}"
)
# Between the two halves of a TPU v7 chip: six times a link (Cloud TPU documentation, TPU7x).
_WITHIN_CHIP = 6


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: one of KINDS; input_bytes: of a device's operands; size: devices of a group; sent_bytes: that a device sends.

    seconds: with the links to itself. lane: two permutations the opposite way round do not share links, all else does.
    """

    kind: str
    input_bytes: float
    size: int
    sent_bytes: float
    seconds: float
    lane: str


@dataclasses.dataclass(frozen=True)
class Torus:
    """The slice that a program runs on. coordinates: of the chip of each device, in the order of the program's partitions."""

    chip: Chip
    coordinates: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in np.max(np.array(self.coordinates), axis=0) + 1)

    def bandwidth(self, group: list[int]) -> tuple[float, float]:
        """(bytes a second into each device of the group when all its links work, hops between the farthest two)."""
        places = np.array([self.coordinates[device] for device in group])
        values = [sorted(set(places[:, axis].tolist())) for axis in range(places.shape[1])]
        chips = len(set(map(tuple, places.tolist())))
        sharing = self.chip.devices_per_chip * chips / len(group)
        if chips == 1:
            return _WITHIN_CHIP * self.chip.link_bytes, 1
        if math.prod(map(len, values)) != chips:  # no box: as if one line of links went through it
            return self.chip.link_bytes / sharing, chips - 1
        rate, hops = 0.0, 0.0
        for axis, taken in enumerate(values):
            if len(taken) == 1:
                continue
            stride = min(after - before for before, after in itertools.pairwise(taken))
            ring = self._closes(axis) and len(taken) * stride == self.shape[axis]
            # Groups that interleave share the links between them.
            rate += (2 if ring else 1) * self.chip.link_bytes / stride
            hops += (self.shape[axis] // 2) if ring else taken[-1] - taken[0]
        return rate / sharing, hops

    def bisection(self, group: list[int]) -> float:
        """Seconds for a device to send one byte spread evenly over the group."""
        places = np.array([self.coordinates[device] for device in group])
        worst = 0.0
        for axis in range(places.shape[1]):
            taken = sorted(set(places[:, axis].tolist()))
            if len(taken) > 1:
                stride = min(after - before for before, after in itertools.pairwise(taken))
                ring = self._closes(axis) and len(taken) * stride == self.shape[axis]
                worst = max(worst, len(taken) * stride / (8 if ring else 4))
        chips = len(set(map(tuple, places.tolist())))
        return max(worst * self.chip.devices_per_chip, 1 / _WITHIN_CHIP if chips == 1 else 0) / self.chip.link_bytes

    def distance(self, source: int, target: int) -> int:
        """Hops between two devices' chips."""
        hops = 0
        for axis, (one, other) in enumerate(zip(self.coordinates[source], self.coordinates[target], strict=True)):
            gap = abs(one - other)
            hops += min(gap, self.shape[axis] - gap) if self._closes(axis) else gap
        return hops

    def _closes(self, axis: int) -> bool:
        return self.shape[axis] > 2 and self.shape[axis] % self.chip.ring_length == 0


def kind_of(instruction: Instruction) -> str | None:
    """The kind of a collective, synchronous or its start; None for all else, also for its end."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def find(program: Program, computation: Computation, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
    """The collectives that an instruction carries out: itself, or those inside of a fusion or an asynchronous call."""
    if kind_of(instruction):
        return [(computation, instruction)]
    if instruction.opcode not in ("fusion", "async-start", "call"):
        return []
    body = program.called(instruction) or program.called(instruction, "to_apply")
    return [found for inner in body or () for found in find(program, body, inner)]


def measure(torus: Torus, computation: Computation, instruction: Instruction) -> Collective:
    """Bytes and seconds of a collective."""
    kind = kind_of(instruction)
    if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # XLA's fusion of a sum with the slice of it that a device keeps
    operands = [computation.instructions[name] for name in instruction.operands]
    size = sum(array.bytes for operand in operands for array in operand.arrays)
    if kind == "ragged-all-to-all":  # operand and result; the one that is fuller than it need be has room for the worst case
        size = min(operand.arrays[0].bytes for operand in operands[:2])
    if kind == "collective-permute":
        return _permutation(torus, instruction, size)
    group = replica_groups(_groups_text(instruction), len(torus.coordinates))[0]
    members = len(group)
    if members == 1:
        return Collective(kind, size, 1, 0, 0, "links")
    rate, hops = torus.bandwidth(group)
    share = (members - 1) / members
    if kind.endswith("all-to-all"):
        sent, seconds = size * share, size * torus.bisection(group)
    else:
        sent = size * {"all-gather": members, "all-reduce": 2, "reduce-scatter": 1}[kind] * share
        seconds, hops = sent / rate, hops * (2 if kind == "all-reduce" else 1)
    return Collective(kind, size, members, sent, seconds + hops * HOP_SECONDS, "links")


def _groups_text(instruction: Instruction) -> str:
    """The attribute's text; a mesh with a list of devices has commas in it."""
    mesh = re.search(rf"replica_groups=({_MESH.pattern})", instruction.rest)
    return mesh[1] if mesh else instruction.attribute("replica_groups") or "{}"


def _permutation(torus: Torus, instruction: Instruction, size: float) -> Collective:
    text = instruction.attribute("source_target_pairs") or ""
    pairs = [(int(source), int(target)) for source, target in re.findall(r"\{(\d+),(\d+)\}", text)]
    leaving = [(source, target) for source, target in pairs if source != target]
    if not leaving:
        return Collective("collective-permute", size, 1, 0, 0, "links")
    hops = max(torus.distance(*pair) for pair in leaving)
    if hops == 0:
        seconds = size / (_WITHIN_CHIP * torus.chip.link_bytes)
    else:
        from_chip: dict[tuple, int] = {}
        for source, target in leaving:
            if torus.distance(source, target):
                from_chip[torus.coordinates[source]] = from_chip.get(torus.coordinates[source], 0) + 1
        seconds = hops * max(from_chip.values()) * size / torus.chip.link_bytes
    devices = len(torus.coordinates)
    source, target = leaving[len(leaving) // 2]
    lane = "links up" if (target - source) % devices <= devices // 2 else "links down"
    members = len({device for pair in leaving for device in pair})
    return Collective("collective-permute", size, members, size, seconds + hops * HOP_SECONDS, lane)


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """Groups of partitions: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`, `mesh['x'=2,'y'=2] {'y'}`, or `{}` for all in one.

    Raises:
      ValueError: the text has another form.
    """
    text = text.strip()
    if text == "{}":
        return [list(range(devices))]
    if text.startswith("{{"):
        return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    numbers = lambda found: [int(number) for number in re.findall(r"\d+", found)]
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        order = np.arange(devices).reshape(numbers(iota[2]))
        if iota[3]:
            order = order.transpose(numbers(iota[3]))
        return order.reshape(numbers(iota[1])).tolist()
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh, devices, numbers)
    raise ValueError(f"replica groups of an unknown form: {text!r}")


def _mesh_groups(mesh: re.Match, devices: int, numbers) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh["axes"])}
    order = np.arange(devices)
    if mesh["order"]:
        order = order.reshape(numbers(mesh["order"]))
    if mesh["turned"]:
        order = order.transpose(numbers(mesh["turned"]))
    # An axis may be split, 'x':(1)2 being its first half: every axis is cut at every such place.
    wanted = [(name, int(before or 1), int(size) if size else sizes[name])
              for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh["over"])]  # fmt: skip
    shape, taken = [], []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(cut for axis, before, part in wanted if axis == name for cut in (before, before * part))})
        for low, high in itertools.pairwise(cuts):
            if any(axis == name and before <= low and high <= before * part for axis, before, part in wanted):
                taken.append(len(shape))
            shape.append(high // low)
    order = order.reshape(shape or [1])
    rest = [axis for axis in range(order.ndim) if axis not in taken]
    size = math.prod(order.shape[axis] for axis in taken)
    return order.transpose(rest + taken).reshape(-1, size).tolist()
