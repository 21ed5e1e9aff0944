"""The safetensors format, a tensor at a time.

A file is 8 bytes of header length (little endian), a JSON header (name -> dtype, shape, byte range) and the raw tensors in
C order. The safetensors package's NumPy side writes a file from tensors that are all in memory and knows no bfloat16, so
reading and writing are here; the tests hold both against the package.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BLOCK_BYTES = 1 << 24
# The package's limit is 100 MB: with a million names these take seconds and gigabytes. The largest models have 100,000.
_MOST_HEADER_BYTES = 1 << 25
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_NAME = re.compile(r"[A-Za-z0-9_.]{1,500}")


class TensorSpec(NamedTuple):
    """What a file says of a tensor before its bytes are read or written. dtype: float32, float16 or bfloat16."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredTensor(NamedTuple):
    """A tensor in a file, not read yet. start: position of its first byte in the file."""

    file: epath.Path
    spec: TensorSpec
    start: int

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own.

        Raises:
          ValueError: the file ends before the tensor does.
        """
        data = np.empty(self.spec.nbytes, np.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            count = file.readinto(memoryview(data)) if data.size else 0
        if count != data.size:
            raise ValueError(f"{self.file}: tensor {self.spec.name!r} is cut off: {count} of {data.size} bytes are there")
        return data.view(self.spec.dtype).reshape(self.spec.shape)


def write_safetensors(path: epath.Path, specs: Sequence[TensorSpec], tensor: Callable[[str], np.ndarray]) -> str:
    """Writes the tensors one after the other, each in blocks, so that nothing is held but what `tensor` returns.

    Args:
      specs: the tensors of the file, in order.
      tensor: name -> values of the spec's shape; strided views and other float types are converted block by block.
    Returns:
      The SHA-256 of the file, as a hexadecimal string.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # readers of PyTorch refuse a file that does not say so
    for spec in specs:
        header[spec.name] = {
            "dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes],
        }  # fmt: skip
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            values = tensor(spec.name)
            if values.shape != spec.shape:
                raise ValueError(f"tensor {spec.name!r} has shape {values.shape}, announced was {spec.shape}")
            rows = max(1, _BLOCK_BYTES * max(1, spec.shape[0]) // max(1, spec.nbytes))
            for start in range(0, spec.shape[0], rows):
                block = np.ascontiguousarray(values[start : start + rows], dtype=spec.dtype)
                write(memoryview(block.reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def read_header(path: epath.Path) -> list[StoredTensor]:
    """The tensors of a file, none of them read.

    Raises:
      ValueError: it is not a safetensors file, is cut off or too long, has tensors that share bytes or a name or leave bytes
        between them, or one whose name or type is no weight's.
    """
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"{path}: cut off or no safetensors file: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the header is not that of a safetensors file ({error!r:.300})") from error
    if len(header) > _MOST_TENSORS:
        raise ValueError(f"{path}: {len(header)} tensors are in the header; at most {_MOST_TENSORS} are read")
    tensors = [_stored(path, 8 + length, name, entry) for name, entry in header.items()]
    end = max([8 + length] + [tensor.start + tensor.spec.nbytes for tensor in tensors])
    if end > size:
        last = max(tensors, key=lambda tensor: tensor.start)
        raise ValueError(f"{path}: cut off: tensor {last.spec.name!r} ends at byte {end}, the file has {size}; fetch it again")
    if end < size:
        raise ValueError(f"{path}: {size - end} bytes follow the last tensor; the file is damaged")
    position = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.spec.nbytes)):
        if tensor.start != position:
            raise ValueError(
                f"{path}: tensor {tensor.spec.name!r} begins at byte {tensor.start}, the one before it ends at {position}; the "
                "file is damaged"
            )
        position += tensor.spec.nbytes
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose last entry of a name would otherwise replace the first."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name is there twice")
    return entries


def _stored(path: epath.Path, base: int, name: str, entry: Any) -> StoredTensor:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path}: a tensor is called {name!r:.100}; names of weights have letters, digits, dots and underscores")
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape, _MOST_AXES) or not (_are_sizes(offsets, 2) and len(offsets) == 2):
        raise ValueError(f"{path}: tensor {name!r} has no sound dtype, shape and data_offsets, but {entry!r:.200}; it is damaged")
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {dtype:.20}; weights are one of {', '.join(_DTYPES)}")
    spec, (start, end) = TensorSpec(name, _DTYPES[dtype], tuple(shape)), offsets
    if end - start != spec.nbytes:
        raise ValueError(f"{path}: tensor {name!r} has shape {spec.shape} but {end - start} bytes, not {spec.nbytes}")
    return StoredTensor(path, spec, base + start)


def _are_sizes(value: Any, most: int) -> bool:
    """Whether it is a list of at most so many whole numbers, none of them negative or beyond 63 bits."""
    return isinstance(value, list) and len(value) <= most and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
