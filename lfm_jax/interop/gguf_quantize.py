"""Fewer bits for a GGUF file, by llama.cpp's own quantiser, with what each weight matters for on a text.

Both come from the package llama-cpp-python, which is built from source and so is in no extra. The importance is measured as
llama.cpp's tool does it (tools/imatrix/imatrix.cpp): the mean square of what each column of a matrix is multiplied with.
"""

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lfm_jax.configuration import nearest
from lfm_jax.interop.gguf_header import read_gguf_header

# Kinds of files that llama.cpp makes, by its names; those below 4 bits need an importance to be of use.
KINDS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_0", "Q8_0")
_FLOAT = ("F32", "F16", "BF16")


def quantize_gguf(
    source: epath.PathLike,
    path: epath.PathLike,
    kind: str = "Q4_K_M",
    *,
    importance: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
) -> epath.Path:
    """Writes `source` with fewer bits; the file appears under its name only once it is complete.

    Args:
      source: a GGUF file in floating point (`export_gguf`). path: of the new file, on a local disk.
      kind: one of `KINDS`. Matrices whose rows are no multiple of 256 get another type of about as many bits.
      importance: by the names of tensors, from `measure_importance`. None: all columns of a matrix matter alike.
      threads: of the quantiser.
    Returns:
      The path.
    Raises:
      ImportError: llama-cpp-python is not installed.
      ValueError: an unknown kind, a source that is quantised already, or an importance of the wrong size.
      OSError: llama.cpp could not write the file.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind that llama.cpp's quantiser makes here. {nearest(kind, KINDS)}")
    source, path = epath.Path(source), epath.Path(path)
    for tensor in read_gguf_header(source).tensors:
        if tensor.type not in _FLOAT:
            raise ValueError(f"{source}: {tensor.name} is {tensor.type}, quantised already; export F32 and take that")
        found = None if importance is None else importance.get(tensor.name)
        columns = tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
        if found is not None and (found.size != columns or not np.isfinite(found).all()):
            raise ValueError(f"the importance of {tensor.name} has {found.size} values, expected are {columns} that are finite")
    llama_cpp = _llama_cpp()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    kept = [(name.encode(), np.ascontiguousarray(values, np.float32).reshape(-1)) for name, values in (importance or {}).items()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()  # ends with one that has no name
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if kept:
        params.imatrix = entries
    partial = path.parent / f".{path.name}.partial"
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
        if code != 0:
            raise OSError(f"llama.cpp could not write {path} as {kind} (code {code}); is there room on the disk?")
        read_gguf_header(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def measure_importance(file: epath.PathLike, rows: Sequence[Sequence[int]], *, threads: int = 1) -> dict[str, np.ndarray]:
    """Mean squares of what the columns of each matrix are multiplied with, over the tokens of a text.

    Args:
      file: GGUF, in floating point for the best result.
      rows: ids, each row computed on its own from its first token, so that it should begin with beginning-of-text.
      threads: of llama.cpp.
    Returns:
      By name of tensor: [columns], or [experts, columns] with ones for an expert that no token reached.
    Raises:
      ImportError: llama-cpp-python is not installed.
      ValueError: llama.cpp cannot load the file, or compute a row.
    """
    llama_cpp = _llama_cpp()
    sums = _Sums()
    model_params, context_params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.n_gpu_layers = 0
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = max(map(len, rows))
    context_params.n_threads = context_params.n_threads_batch = threads
    callback = llama_cpp.ggml_backend_sched_eval_callback(sums.see)
    context_params.cb_eval = callback
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
    if not model:
        raise ValueError(f"{file}: llama.cpp cannot load it")
    context = llama_cpp.llama_init_from_model(model, context_params)
    try:
        for row in rows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            if _decode(llama_cpp, context, row) != 0:
                raise ValueError(f"{file}: llama.cpp cannot compute a row of {len(row)} ids up to {max(row)}")
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return sums.means()


def _llama_cpp() -> Any:
    try:
        llama_cpp = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise ImportError(
            "llama.cpp's quantiser comes with the package llama-cpp-python; install it (it is compiled, which takes minutes): "
            "pip install llama-cpp-python"
        ) from error
    importlib.import_module("llama_cpp._logger").set_verbose(False)  # errors alone
    return llama_cpp


def _decode(llama_cpp: Any, context: Any, row: Sequence[int]) -> int:
    """Computes a row with the logits of every token, without which the last block would see the last token alone."""
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, index in enumerate(row):
        batch.token[place], batch.pos[place], batch.logits[place] = int(index), place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    try:
        return llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)


class _Node(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, as far as it is read."""


_Node._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.POINTER(_Node) * 10),
    ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]  # fmt: skip


class _Sums:
    """Adds up squares while llama.cpp computes, which tells of each operation before and after it."""

    def __init__(self):
        self._name_of = importlib.import_module("llama_cpp._ggml").libggml.ggml_op_name
        self._name_of.restype = ctypes.c_char_p
        self._squares: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def see(self, node: int, ask: bool, _: int | None) -> bool:
        node = ctypes.cast(node, ctypes.POINTER(_Node)).contents
        operation = self._name_of(node.op)
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID") or not node.src[0].contents.name.endswith(b".weight"):
            return not ask
        if not ask:
            self._add(node.src[0].contents, _array(node.src[1].contents, np.float32), node.src[2] if b"ID" in operation else None)
        return True

    def _add(self, weight: _Node, inputs: np.ndarray, chosen: Any) -> None:
        """inputs: [..., tokens, columns]; of experts [tokens, 1 or as many as are chosen, columns]."""
        name, experts = weight.name.decode(), 1 if chosen is None else weight.ne[2]
        squares = self._squares.setdefault(name, np.zeros((experts, weight.ne[0])))
        counts = self._counts.setdefault(name, np.zeros(experts))
        if chosen is None:
            rows, to = inputs.reshape(-1, weight.ne[0]), np.zeros(inputs.size // weight.ne[0], int)
        else:
            ids = _array(chosen.contents, np.int32)[0, 0]
            rows = np.broadcast_to(inputs[0], (*ids.shape, weight.ne[0])).reshape(-1, weight.ne[0])
            to = ids.reshape(-1)
        np.add.at(squares, to, np.square(rows, dtype=np.float64))
        np.add.at(counts, to, 1)

    def means(self) -> dict[str, np.ndarray]:
        found = {}
        for name, squares in self._squares.items():
            counts = self._counts[name][:, None]
            means = np.where(counts > 0, squares / np.maximum(counts, 1), 1).astype(np.float32)
            found[name] = means[0] if len(means) == 1 else means
        return found


def _array(node: _Node, dtype: type) -> np.ndarray:
    """The values of a tensor in the memory of the host, slowest axis first, where they lie."""
    shape, strides = tuple(node.ne)[::-1], tuple(node.nb)[::-1]
    size = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, (ctypes.c_char * size).from_address(node.data), strides=strides)
