"""The header of a GGUF file, every length checked against the file before anything is read by it.

The gguf package's reader takes minutes or gigabytes for a few crafted bytes, and llama.cpp has had overflows; what this accepts
has the sizes it says. The format: docs/gguf.md in ggml.
"""

import math
import re
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

MAGIC = b"GGUF"
# Weights in a block of each type, and its bytes.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
}  # fmt: skip
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The largest published header has 16 MB; a text in a list costs its reader 60 bytes at least.
_MOST_HEADER_BYTES = 1 << 27
_MOST_STRINGS = 1 << 22
_MOST_ENTRIES = 100_000
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")  # llama.cpp reads no longer ones
_KEY = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


class GgufTensor(NamedTuple):
    """A tensor, not read. shape: slowest axis first, the reverse of the file's order. start: position of its first byte."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        width, size = BLOCKS[self.type]
        return math.prod(self.shape) // width * size


class GgufHeader(NamedTuple):
    """metadata: values by key, lists of numbers as NumPy arrays. tensors: in the order of the file."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]


class _Damaged(ValueError):
    """What is wrong with the file; its name is added on the way out."""


class _Reader:
    """Takes values from a file, of which no more than `left` bytes may be taken."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left
        self.strings = _MOST_STRINGS

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _Damaged(f"cut off, or a length is wrong: {count} bytes are announced where {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        self.strings -= 1
        if self.strings < 0:
            raise _Damaged(f"more than {_MOST_STRINGS} texts are in the header")
        try:
            return self.take(self.integer(8)).decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"a text is no UTF-8 ({error.reason})") from error

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _BOOL:
            return bool(self.booleans(1)[0])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.integer(4), self.integer(8))
        raise _Damaged(f"a value has the unknown type {kind}")

    def array(self, kind: int, count: int) -> Any:
        if kind in _NUMBERS:
            return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])
        if kind == _BOOL:
            return self.booleans(count)
        if kind != _STRING:
            raise _Damaged(f"a list has values of the type {kind}, of which there are none in a model")
        if count > min(self.left // 8, self.strings):
            raise _Damaged(f"cut off, or a length is wrong: a list of {count} texts where {self.left} bytes are left")
        return [self.string() for _ in range(count)]

    def booleans(self, count: int) -> np.ndarray:
        data = np.frombuffer(self.take(count), np.uint8)
        if count and data.max() > 1:
            raise _Damaged("a truth value is neither 0 nor 1")
        return data.view(bool)


def read_gguf_header(path: epath.PathLike) -> GgufHeader:
    """Metadata and tensors of a GGUF file (version 3, little endian), the tensors not read.

    Raises:
      ValueError: it is no such file, is cut off or too long, a key or a tensor is there twice, tensors overlap or leave more than
        padding between them, or have a type that no model of ours has.
    """
    path = epath.Path(path)
    size = path.stat().length
    try:
        with path.open("rb") as file:
            return _header(_Reader(file, min(size, _MOST_HEADER_BYTES)), size)
    except _Damaged as error:
        raise ValueError(f"{path}: {error}; write or fetch the file again") from error


def _header(reader: _Reader, size: int) -> GgufHeader:
    if reader.left < 24 or reader.take(4) != MAGIC:
        raise _Damaged("no GGUF file")
    version = reader.integer(4)
    if version != 3:
        raise _Damaged(f"GGUF version {version}; only 3 is read")
    tensors, entries = reader.integer(8), reader.integer(8)
    if max(tensors, entries) > _MOST_ENTRIES:
        raise _Damaged(f"{tensors} tensors and {entries} values are announced; at most {_MOST_ENTRIES} are read")
    left = reader.left
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.string()
        if not _KEY.fullmatch(key) or key in metadata:
            raise _Damaged(f"the key {key!r:.100} is there twice, or is none")
        metadata[key] = reader.value(reader.integer(4))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise _Damaged(f"general.alignment is {alignment!r:.40}")
    infos = [_info(reader) for _ in range(tensors)]
    if len({info.name for info in infos}) < len(infos):
        raise _Damaged("two tensors have one name")
    return GgufHeader(metadata, _placed(infos, 24 + left - reader.left, alignment, size))


def _info(reader: _Reader) -> GgufTensor:
    """A tensor whose start is still counted from the first one."""
    name, axes = reader.string(), reader.integer(4)
    if not _NAME.fullmatch(name) or not 1 <= axes <= 4:
        raise _Damaged(f"a tensor is called {name!r:.100} and has {axes} axes; it needs a name and 1 to 4")
    sizes = [reader.integer(8) for _ in range(axes)]
    kind, start = reader.integer(4), reader.integer(8)
    if kind not in _TYPES:
        raise _Damaged(f"tensor {name} has type {kind}, which is none of {', '.join(BLOCKS)}")
    if min(sizes) < 1 or math.prod(sizes) >= 1 << 60 or sizes[0] % BLOCKS[_TYPES[kind]][0]:
        raise _Damaged(f"tensor {name} has the axes {sizes}, which {_TYPES[kind]} cannot have")
    return GgufTensor(name, _TYPES[kind], tuple(reversed(sizes)), start)


def _placed(infos: list[GgufTensor], header: int, alignment: int, size: int) -> list[GgufTensor]:
    """The tensors with their positions in the file, which must follow each other."""
    base = position = -(-header // alignment) * alignment
    placed = [info._replace(start=base + info.start) for info in infos]
    for tensor in sorted(placed, key=lambda tensor: tensor.start):
        if tensor.start != position:
            raise _Damaged(f"tensor {tensor.name} begins at byte {tensor.start}, the one before it ends at {position}")
        end = tensor.start + tensor.nbytes
        position = -(-end // alignment) * alignment
    if infos and not end <= size <= position:
        raise _Damaged(f"the tensors end at byte {end}, the file has {size}")
    return placed
