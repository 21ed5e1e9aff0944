"""Reads the text of a program that XLA compiled for a TPU: instructions in scheduled order, trip counts, arrays, FLOPs, bytes.

The text is what `jax.stages.Compiled.as_text()` gives. Within a computation the instructions stand in the order in which the
core runs them; what runs beside it is a pair of `...-start` and `...-done`.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

VMEM = 1  # the memory space of on-chip vector memory; 0 is HBM, the others are scalar memory and semaphores
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+\w*|c64)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_NEVER = 2**62  # estimates from here on mean that the compiler has none


class Array(NamedTuple):
    """dtype: as XLA names it; space: memory space."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. arrays: of the result, which may be a tuple; operands: names; rest: the attributes' text."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    argument: str
    rest: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        return parse_arrays(self.result)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The backend's configuration: estimates, windows, a kernel's body."""
        at = self.rest.find("backend_config=")
        return {} if at < 0 else json.JSONDecoder(strict=False).raw_decode(self.rest, at + len("backend_config="))[0]

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate, None where it has none. Kernels, collectives and copies between memories never have one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found and int(found[1]) < _NEVER else None

    def attribute(self, name: str) -> str | None:
        """The attribute's text up to the next comma outside of braces; None where there is no such attribute."""
        found = re.search(rf"[ ,]{name}=", self.rest)
        return None if found is None else _upto_comma(self.rest, found.end())


def _upto_comma(text: str, start: int) -> str:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "{[(") - (text[at] in "}])")
        if depth < 0 or (depth == 0 and text[at] == ","):
            return text[start:at]
    return text[start:]


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Every array in a type's text, `(f32[4,8]{1,0:T(8,128)S(1)}, s32[])` for example."""
    arrays = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(Array(dtype, tuple(map(int, filter(None, shape.split(",")))), int(space[1]) if space else 0))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"no closing parenthesis in {text[start : start + 200]!r}")


def parse_instruction(line: str) -> Instruction:
    """Reads `%name = type opcode(operands), attributes`."""
    name, _, text = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    argument = text[opening + 1 : closing]
    return Instruction(name[1:], text[:opening], result, tuple(_NAME.findall(argument)), argument, text[closing + 1 :])


@dataclasses.dataclass(frozen=True)
class Computation:
    """instructions: by name, in scheduled order; root: the name of the one whose value is the computation's."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def __iter__(self):
        return iter(self.instructions.values())

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By instruction, those that read it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        numbered = {int(each.argument): each for each in self if each.opcode == "parameter"}
        return [numbered[number] for number in sorted(numbered)]


class Program:
    """A compiled program's computations by name; `entry` is where it begins."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        lines, name, is_entry = [], None, False
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                name, is_entry, lines = head[2], bool(head[1]), []
            elif line.rstrip() == "}" and name:
                instructions = {each.name: each for each in map(parse_instruction, lines)}
                root = next((line for line in lines if line.lstrip().startswith("ROOT ")), lines[-1])
                self.computations[name] = Computation(name, instructions, parse_instruction(root).name)
                if is_entry:
                    self.entry = self.computations[name]
                name = None
            elif name and line.startswith(("  %", "  ROOT %")):
                lines.append(line)
            elif name and lines:  # an attribute's text that has line breaks of its own
                lines[-1] += " " + line.strip()
        self._functions = _source_functions(text)

    def called(self, instruction: Instruction, attribute: str = "calls") -> Computation | None:
        """The computation that an attribute (calls, body, condition, to_apply) names."""
        name = instruction.attribute(attribute)
        return None if name is None else self.computations.get(name.strip().removeprefix("%"))

    def branches(self, instruction: Instruction) -> list[Computation]:
        """The computations of which a conditional runs one."""
        names = _NAME.findall(instruction.attribute("branch_computations") or "")
        names += [text[1:] for key in ("true_computation", "false_computation") if (text := instruction.attribute(key))]
        return [self.computations[name] for name in names]

    def source(self, instruction: Instruction) -> list[tuple[str, str]]:
        """(file, function) of the Python calls that the instruction comes from, the innermost first; empty if not known."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return self._functions.get(int(found[1]), []) if found else []

    def matmuls(self, instruction: Instruction) -> Iterable[tuple[Computation, Instruction]]:
        """Every matrix product in an instruction, with the computation it stands in."""
        if instruction.opcode in ("fusion", "call", "async-start"):
            body = self.called(instruction) or self.called(instruction, "to_apply")
            for inner in body or ():
                if inner.opcode in ("convolution", "dot"):
                    yield body, inner
                elif inner.opcode == "fusion":
                    yield from self.matmuls(inner)

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """FLOPs of the matrix products of an instruction that stands in `computation`; a multiply-add is two."""
        if instruction.opcode in ("convolution", "dot"):
            return matmul_flops(computation, instruction)
        return sum(matmul_flops(body, inner) for body, inner in self.matmuls(instruction))

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a `while` of `computation` runs its body; None where it cannot be told from the program.

        Understands a counter that starts at a constant, moves by a constant and is compared with a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition, body = self.called(loop, "condition"), self.called(loop, "body")
        start = computation.instructions[loop.operands[0]]
        compare, where = self._comparison(condition)
        if compare is None or start.opcode != "tuple":
            return None
        sides = [self._linear(condition, where(operand)) for operand in compare.operands]
        direction = re.search(r"direction=(\w+)", compare.rest)[1]
        if None in sides:
            return None
        if sides[0][0] is None:  # constant against counter: turn it round
            sides, direction = sides[::-1], {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        (counter, offset), (limit_index, limit) = sides
        if counter is None:
            return None
        if limit_index is not None:  # the bound is carried along: it must be a constant that the body leaves alone
            carried = self._linear(computation, start.operands[limit_index])
            if carried is None or carried[0] is not None or self._carried(body, limit_index) != (limit_index, 0):
                return None
            limit += carried[1]
        first, step = self._linear(computation, start.operands[counter]), self._carried(body, counter)
        if first is None or first[0] is not None or step is None or step[0] != counter:
            return None
        return _passes(first[1] + offset, step[1], limit, direction)

    def _comparison(self, condition: Computation):
        """The comparison that decides, and how to translate its operands to the condition's own names."""
        root = condition.instructions[condition.root]
        if root.opcode == "compare":
            return root, lambda name: name
        inner = self.called(root)
        if inner is None or inner.instructions[inner.root].opcode != "compare":
            return None, None
        outside = {parameter.name: operand for parameter, operand in zip(inner.parameters, root.operands, strict=True)}
        return inner.instructions[inner.root], lambda name: outside.get(name, name)

    def _carried(self, body: Computation, index: int) -> tuple[int | None, int] | None:
        """What the body leaves in an element of the carried tuple, in terms of what it found (see `_linear`)."""
        root = body.instructions[body.root]
        return self._linear(body, root.operands[index]) if root.opcode == "tuple" else None

    def _linear(self, computation: Computation, name: str) -> tuple[int | None, int] | None:
        """A scalar as (index of an element of the parameter or None, constant to add); None if it is neither."""
        instruction = computation.instructions.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return (None, int(instruction.argument)) if re.fullmatch(r"-?\d+", instruction.argument) else None
        if instruction.opcode == "get-tuple-element":
            source = computation.instructions[instruction.operands[0]]
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])
            return (index, 0) if source.opcode == "parameter" else None
        if instruction.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"):
            return self._linear(computation, instruction.operands[0])
        if instruction.opcode in ("add", "subtract"):
            left, right = (self._linear(computation, operand) for operand in instruction.operands)
            sign = 1 if instruction.opcode == "add" else -1
            if left is None or right is None or (right[0] is not None and (sign < 0 or left[0] is not None)):
                return None
            return left[0] if right[0] is None else right[0], left[1] + sign * right[1]
        return None


def _passes(first: int, step: int, limit: int, direction: str) -> int | None:
    """Passes of a loop whose counter starts at `first`, moves by `step` and goes on while the comparison with `limit` holds."""
    if direction in ("LE", "GE"):
        limit += 1 if direction == "LE" else -1
    if direction == "NE":
        direction = "LT" if step > 0 else "GT"
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(limit - first) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(first - limit) // -step))
    return None


def matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or a `convolution`, which on TPUs every matrix product becomes; positions in the padding do not count."""
    left, right = (computation.instructions[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted)
    left_labels, right_labels, out_labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")).groups()
    window = _window(instruction.attribute("window") or "")
    pairs = 1
    for number, label in enumerate(sorted(filter(str.isdigit, out_labels), key=int)):
        sizes = left[left_labels.index(label)], right[right_labels.index(label)], out[out_labels.index(label)]
        pairs *= _valid_positions(*sizes, {key: values[number] for key, values in window.items() if number < len(values)})
    groups = int(instruction.attribute("batch_group_count") or 1)
    size = out[out_labels.index("b")] * out[out_labels.index("f")] * right[right_labels.index("i")]
    return 2.0 * size * pairs / groups


def _window(text: str) -> dict[str, list[str]]:
    return {key: values.split("x") for key, values in re.findall(r"(\w+)=([\d_x\-]+)", text)}


def _valid_positions(left: int, right: int, out: int, window: dict[str, str]) -> int:
    """(output, kernel) positions of one dimension that meet the input and not its padding or the holes of its dilation."""
    stride, dilate, spread = (int(window.get(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    extent = (left - 1) * dilate + 1
    if stride == dilate == spread == 1:
        return sum(max(0, min(out, extent + low - k) - max(0, low - k)) for k in range(right))
    positions = (o * stride + k * spread - low for o in range(out) for k in range(right))
    return sum(0 <= at < extent and at % dilate == 0 for at in positions)


def _source_functions(text: str) -> dict[int, list[tuple[str, str]]]:
    """By stack frame, (file, function) of the frame and of its callers, from the tables at the head of the text."""
    tables: dict[str, dict[int, str]] = {}
    table = None
    for line in text[: text.find("\n%")].splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
            table[int(row[1])] = row[2]
    numbers = lambda row: [int(value) for value in re.findall(r"=(\d+)", row)]
    locations = {key: numbers(row)[:2] for key, row in tables.get("FileLocations", {}).items()}
    frames = {key: numbers(row)[:2] for key, row in tables.get("StackFrames", {}).items()}
    quoted = lambda table, key: tables[table][key].strip('"')

    def chain(frame: int) -> list[tuple[str, str]]:
        found = []
        while frame in frames and len(found) < 100:
            location, parent = frames[frame]
            file, function = locations[location]
            found.append((quoted("FileNames", file), quoted("FunctionNames", function)))
            frame = parent - 1  # the root's parent is written as 1, so parents are counted from one higher
        return found

    return {frame: chain(frame) for frame in frames}
