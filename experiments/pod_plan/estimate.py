"""From a compiled program to the seconds of a step, by playing its schedule.

One core runs the instructions in their order. Copies between HBM and VMEM, and collectives that have a start and a done, run
beside it from the one to the other, each after the last on the same lane; a done waits for what is left. A collective that the
core itself moves on, step by step inside of other fusions ("async collective fusion"), advances only while these run. All else
waits for itself.
"""

import collections
import dataclasses
from collections.abc import Callable

from experiments.pod_plan import collectives
from experiments.pod_plan.collectives import Collective, Torus
from experiments.pod_plan.hlo import VMEM, Computation, Instruction, Program
from experiments.pod_plan.kernels import is_kernel

KernelSeconds = Callable[[Computation, Instruction], float]

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all", "opt-barrier",
    "add-dependency", "domain",
}  # fmt: skip
# Custom calls that only name memory.
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "PinToDevice", "UnpinFromDevice")
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
_NOTABLE_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one device does in one run of the program.

    seconds: of the whole. compute_seconds: without any wait. operations: (operation, place in the code) -> seconds, adding up to
    `seconds`. collectives: kind -> its number, bytes sent, seconds on the links and seconds that the core waits for it.
    flops: of the matrix products that XLA runs; hbm_bytes: between HBM and the core.
    unknown_loops: loops whose passes could not be told, counted as one. guessed: (opcode) -> seconds of instructions for which
    the compiler has no estimate, taken as their HBM traffic.
    """

    seconds: float
    compute_seconds: float
    operations: dict[tuple[str, str], float]
    collectives: dict[str, dict[str, float]]
    flops: float
    hbm_bytes: float
    unknown_loops: int
    guessed: dict[str, float]


def estimate(program: Program, torus: Torus, kernel_seconds: KernelSeconds) -> Estimate:
    """Plays the program's schedule on a chip of the torus."""
    player = _Player(program, torus, kernel_seconds)
    seconds, ledger = player.run(program.entry)
    operations = {key[1:]: value for key, value in ledger.items() if key[0] == "operation"}
    kinds = sorted({key[1] for key in ledger if key[0] == "sent"})
    columns = {"number": "number", "bytes": "sent", "seconds": "links", "waiting_seconds": "waited"}
    waits = sum(value for (operation, _), value in operations.items() if operation.startswith("waiting"))
    return Estimate(
        seconds=seconds,
        compute_seconds=seconds - waits,
        operations=operations,
        collectives={kind: {name: ledger[key, kind] for name, key in columns.items()} for kind in kinds},
        flops=ledger["flops",],
        hbm_bytes=ledger["hbm",],
        unknown_loops=round(ledger["unknown_loops",]),
        guessed={key[1]: value for key, value in ledger.items() if key[0] == "guessed"},
    )


class _Player:
    def __init__(self, program: Program, torus: Torus, kernel_seconds: KernelSeconds):
        self.program, self.torus, self.kernel_seconds = program, torus, kernel_seconds
        self.chip = torus.chip

    def run(self, computation: Computation) -> tuple[float, collections.Counter]:
        """(seconds, ledger) of one pass."""
        clock = _Clock(self)
        for instruction in computation:
            clock.step(computation, instruction)
        return clock.now, clock.ledger


class _Clock:
    """One pass of a computation.

    finish: by name of a start, when what it started is done; lanes: when each is free; carried: by channel, seconds that are left
    of collectives which fusions move on.
    """

    def __init__(self, player: _Player):
        self.player, self.program, self.chip = player, player.program, player.chip
        self.now = 0.0
        self.lanes: dict[str, float] = collections.defaultdict(float)
        self.finish: dict[str, tuple[float, str]] = {}
        self.carried: dict[str, float] = {}
        self.ledger: collections.Counter = collections.Counter()

    def step(self, computation: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode in _FREE:
            return
        if opcode == "while":
            self._loop(computation, instruction)
        elif opcode == "conditional":
            self._add(max((self.player.run(branch) for branch in self.program.branches(instruction)), key=lambda run: run[0]))
        elif opcode == "call":
            self._add(self.player.run(self.program.called(instruction, "to_apply")))
        elif opcode == "async-update":
            self.finish[instruction.name] = self.finish.pop(instruction.operands[0], (0.0, ""))
        elif opcode.endswith("-done"):
            self._wait(instruction)
        elif opcode.endswith("-start"):
            self._start(computation, instruction)
        else:
            self._work(computation, instruction)

    def _add(self, run: tuple[float, collections.Counter], times: int = 1) -> None:
        seconds, ledger = run
        self.now += times * seconds
        for key, value in ledger.items():
            self.ledger[key] += times * value

    def _loop(self, computation: Computation, loop: Instruction) -> None:
        trips = self.program.trip_count(computation, loop)
        if trips is None:
            self.ledger["unknown_loops",] += 1
        self._add(self.player.run(self.program.called(loop, "body")), 1 if trips is None else trips)

    def _spend(self, seconds: float, operation: str, place: str) -> None:
        self.now += seconds
        self.ledger["operation", operation, place] += seconds

    def _wait(self, done: Instruction) -> None:
        finish, what = self.finish.pop(done.operands[0], (0.0, ""))
        left = max(0.0, finish - self.now)
        if left:
            self._spend(left, f"waiting for {what}", place(self.program, done))
            self.ledger["waited", what] += left

    def _occupy(self, lane: str, seconds: float) -> float:
        """Queues work on a lane; returns when it will be done."""
        if lane == "links":  # all of them: behind the permutations both ways as well
            begin = max(self.now, *(self.lanes[each] for each in ("links", "links up", "links down")))
        else:
            begin = max(self.now, self.lanes["links" if lane.startswith("links") else lane], self.lanes[lane])
        self.lanes[lane] = begin + seconds
        return begin + seconds

    def _start(self, computation: Computation, start: Instruction) -> None:
        found = collectives.find(self.program, computation, start)
        for collective in (collectives.measure(self.player.torus, *each) for each in found):
            self._note(collective)
            self.finish[start.name] = self._occupy(collective.lane, collective.seconds), collective.kind
        if not found:  # a copy between HBM and VMEM; its result's type repeats the operand and adds a semaphore
            moved = [array for array in start.arrays if array.shape or array.dtype != "u32"]
            size = min((array.bytes for array in moved), default=0.0)
            in_hbm = any(array.space != VMEM for array in moved)
            seconds = size / self.chip.hbm_bytes if in_hbm else 0.0
            self.ledger["hbm",] += size * in_hbm
            self.finish[start.name] = self._occupy("HBM", seconds), "HBM"

    def _note(self, collective: Collective) -> None:
        self.ledger["number", collective.kind] += 1
        self.ledger["sent", collective.kind] += collective.sent_bytes
        self.ledger["links", collective.kind] += collective.seconds

    def _work(self, computation: Computation, instruction: Instruction) -> None:
        where = place(self.program, instruction)
        traffic = hbm_bytes(self.program, computation, instruction)
        if is_kernel(instruction):
            self.ledger["hbm",] += traffic
            seconds = self.player.kernel_seconds(computation, instruction)
            self._spend(seconds, f"kernel {kernel_name(instruction)}", where)
            return
        if instruction.opcode == "custom-call" and any(f'"{name}"' in instruction.rest for name in _FREE_CALLS):
            return
        self.ledger["hbm",] += traffic
        self.ledger["flops",] += self.program.flops(computation, instruction)
        begin, cycles = self.now, instruction.estimated_cycles
        found = collectives.find(self.program, computation, instruction)
        if cycles is not None:
            self._spend(cycles / self.chip.clock_hz, operation(self.program, instruction), where)
        elif not found and traffic:
            seconds = traffic / self.chip.hbm_bytes
            self._spend(seconds, operation(self.program, instruction), where)
            if traffic > _NOTABLE_BYTES:
                self.ledger["guessed", instruction.opcode] += seconds
        self._collectives(found, self.now - begin, where)

    def _collectives(self, found: list[tuple[Computation, Instruction]], beside: float, where: str) -> None:
        """Starts, moves on, ends or runs the collectives in an instruction that had `beside` seconds of work of its own."""
        for inside, instruction in found:
            channel = instruction.attribute("channel_id") or instruction.name
            targets = "".join(user.rest for user in inside.users.get(instruction.name, ()) if user.opcode == "custom-call")
            collective = collectives.measure(self.player.torus, inside, instruction)
            left = collective.seconds
            if '"AsyncCollectiveDone"' in targets:
                left = self.carried.pop(channel, 0.0)
            elif channel in self.carried:
                advanced = min(beside, self.carried[channel])
                self.carried[channel] -= advanced
                beside -= advanced
                continue
            else:
                self._note(collective)
                if '"AsyncCollectiveStart"' in targets:
                    self.carried[channel] = left
                    continue
            self._spend(left, f"waiting for {collective.kind}", where)
            self.ledger["waited", collective.kind] += left


def kernel_name(call: Instruction) -> str:
    """The kernel's name without the number that XLA adds."""
    return call.name.partition(".")[0]


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from and writes to HBM: its operands and results there, of slices only what is sliced."""
    if instruction.opcode in ("while", "conditional", "call") or instruction.opcode in _FREE:
        return 0.0
    body = program.called(instruction) if instruction.opcode == "fusion" else None
    total = sum(array.bytes for array in instruction.arrays if array.space == 0)
    root = body.instructions[body.root] if body else instruction
    updated = None
    if root.opcode == "dynamic-update-slice":  # in place: only the update is written, nothing is read
        update = (body or computation).instructions.get(root.operands[1])
        total = update.arrays[0].bytes if update and instruction.arrays[0].space == 0 else 0.0
        updated = root.operands[0]
    for index, name in enumerate(instruction.operands):
        operand = computation.instructions[name]
        size = sum(array.bytes for array in operand.arrays if array.space == 0)
        if body and size and index < len(body.parameters):
            parameter = body.parameters[index]
            if parameter.name == updated:
                continue
            users = body.users.get(parameter.name, [])
            if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
                size = min(size, sum(array.bytes for user in users for array in user.arrays))
        elif name == updated:
            continue
        total += size
    return total


def operation(program: Program, instruction: Instruction) -> str:
    """What an instruction mainly does, in a word."""
    body = program.called(instruction) if instruction.opcode == "fusion" else None
    if body is None:
        return {"convolution": "matmul", "dot": "matmul"}.get(instruction.opcode, instruction.opcode)
    if any(True for _ in program.matmuls(instruction)):
        return "matmul"
    inside = {each.opcode for each in _nested(program, body)}
    for found in ("scatter", "gather", "sort", "reduce", "reduce-window"):
        if found in inside:
            return found
    if inside <= _FREE | {"broadcast", "iota"}:
        return "broadcast"
    if inside <= _FREE | {"copy", "transpose", "reshape", "convert", "slice", "concatenate", "pad", *_COPIES}:
        return "copy"
    return "elementwise"


def _nested(program: Program, computation: Computation):
    for instruction in computation:
        inner = program.called(instruction) if instruction.opcode == "fusion" else None
        if inner is None:
            yield instruction
        else:
            yield from _nested(program, inner)


def place(program: Program, instruction: Instruction) -> str:
    """Where in this package's code the instruction comes from: the innermost method, or function where there is none."""
    ours = [
        (file.rpartition("/")[2].removesuffix(".py"), function.partition(".<locals>")[0])
        for file, function in program.source(instruction)
        if "/lfm_jax/" in file
    ]
    methods = [(file, function) for file, function in ours if "." in function]
    for file, function in methods[:1] or ours[:1]:
        return f"{file}.{function.removesuffix('.__call__')}"
    return "of the compiler"


