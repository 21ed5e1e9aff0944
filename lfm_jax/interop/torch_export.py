"""The model as a program that PyTorch and ONNX Runtime run without this code.

An exported program takes the next tokens of a sequence, one or many, and the state before them, and returns the logits behind
the last of them and the state after them. So one program reads a prompt and continues it, and nothing is compiled anew for
another length. It has no row of the vocabulary that the tokenizer does not know: none can be sampled.
"""

from __future__ import annotations

import contextlib
import os
import typing
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from lfm_jax.interop.export_manifest import check_file
from lfm_jax.interop.exported_file import (
    Conversation,
    ExportedFile,
    Reference,
    check_capacity,
    check_installed,
    finished,
    judge,
    quiet_libraries,
    whole_file,
)
from lfm_jax.interop.torch_model import initial_state, state_names

if typing.TYPE_CHECKING:
    import torch

_CAPACITY = "capacity"  # where a file tells it
_ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # whatever a caller asks of `torch.load`
_OBJECTS = ("custom_obj_", "opaque_obj_")  # files of an archive that PyTorch would build any object of
_MOST_PROTOBUF_BYTES = 1_900_000_000  # beyond it an ONNX model's weights must lie in a file of their own


def export_pt2(model: torch.nn.Module, path: str | os.PathLike, reference: Reference, *, capacity: int = 2048) -> ExportedFile:
    """Writes a program for `torch.export.load`, and for what begins with one (AOTInductor, other backends).

    Its inputs are tokens [batch, seq] and a state (`lfm_jax.interop.torch_model`), its outputs logits [batch, ids] and a state;
    any batch, and any seq up to the capacity.

    Args:
      model: of `load_torch_model`, which stays as it is.
      capacity: tokens of a sequence.
    Raises:
      ValueError: the capacity is none, the text is longer, or the file's logits are not those of the reference.
      OSError: it cannot be written. Nothing is left of it then, as after every other error.
    """
    import torch

    check_capacity(model.config, capacity, reference)
    with quiet_libraries(), whole_file(path) as file:
        program = step_program(model, capacity)
        with file.open("wb") as opened:  # given a path, PyTorch would report a full disk as something else
            torch.export.save(program, opened, extra_files={_CAPACITY: str(capacity)})
        found = judge(open_pt2(file), reference)
    return finished(path, found)


def open_pt2(path: str | os.PathLike) -> Conversation:
    """A conversation with a file of `export_pt2`. Of what PyTorch pickles, only tensors and their containers are read.

    Raises:
      ValueError: it is not what a manifest beside it says, or no such program, or holds other objects.
    """
    import torch

    check_file(path)
    about = {_CAPACITY: ""}
    with quiet_libraries(), _only_tensors(path):
        try:
            program = torch.export.load(os.fspath(path), extra_files=about)
        except Exception as error:  # of what kind depends on what the file holds
            raise ValueError(f"{os.fspath(path)} is no program that PyTorch opens safely: {error}") from error
    (_, example), _ = program.example_inputs
    module, capacity = program.module(), int(about[_CAPACITY])

    def step(tokens: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        with torch.no_grad():
            logits, state = module(torch.from_numpy(tokens), state)
        return logits.numpy(), state

    return Conversation(step, tuple(torch.zeros_like(tensor[:1]) for tensor in example), capacity, capacity)


@contextlib.contextmanager
def _only_tensors(path: str | os.PathLike) -> Iterator[None]:
    """Around `torch.export.load`, which would unpickle whatever an archive has."""
    try:
        with zipfile.ZipFile(path) as archive:
            objects = [name for name in archive.namelist() if os.path.basename(name).startswith(_OBJECTS)]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{os.fspath(path)} is no program of PyTorch's: {error}") from error
    if objects:
        raise ValueError(f"{os.fspath(path)} holds an object that is no tensor ({objects[0]}), and is not opened")
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_TENSORS]
        else:
            os.environ[_ONLY_TENSORS] = before


def export_onnx(model: torch.nn.Module, path: str | os.PathLike, reference: Reference, *, capacity: int = 2048) -> ExportedFile:
    """Writes an ONNX model by PyTorch's dynamo exporter; inputs and outputs as of `export_pt2`, by name.

    The names are tokens, logits, those of `state_names`, and these with "next_" in front. Weights of more than 1.9 GB are in a
    file beside it (".data"), as ONNX wants it. Arguments and other errors: see `export_pt2`.

    Raises:
      ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
    """
    import torch

    check_installed("onnx", "onnxscript", "onnxruntime")
    check_capacity(model.config, capacity, reference)
    names = state_names(model.config)
    with quiet_libraries(), whole_file(path) as file:
        exported = torch.onnx.export(
            step_program(model, capacity),
            input_names=["tokens", *names],
            output_names=["logits", *(f"next_{name}" for name in names)],
            dynamo=True,
            verbose=False,
        )
        exported.model.metadata_props[_CAPACITY] = str(capacity)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        exported.save(file, external_data=weights > _MOST_PROTOBUF_BYTES)
        found = judge(open_onnx(file), reference)
    return finished(path, found)


def open_onnx(path: str | os.PathLike) -> Conversation:
    """A conversation with a file of `export_onnx`, on the CPU. Raises ValueError as `open_pt2`."""
    import onnxruntime

    check_file(path)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    first, *inputs = session.get_inputs()
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    shape = lambda sizes: [size if isinstance(size, int) else 1 for size in sizes]  # a batch has a name
    initial = [np.zeros(shape(entry.shape), types[entry.type]) for entry in inputs]

    def step(tokens: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        given = {first.name: tokens} | {entry.name: array for entry, array in zip(inputs, state, strict=True)}
        logits, *state = session.run(None, given)
        return logits, state

    capacity = int(session.get_modelmeta().custom_metadata_map[_CAPACITY])
    return Conversation(step, initial, capacity, capacity)


def step_program(model: torch.nn.Module, capacity: int) -> torch.export.ExportedProgram:
    """(tokens, state) -> (logits behind the last token, state), traced strictly; batch and seq are free."""
    import torch

    config = model.config

    class Step(torch.nn.Module):
        """One call of the exported program."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, state: tuple[torch.Tensor, ...]):
            hidden, state = self.model.hidden(tokens, state)
            return self.model.logits(hidden[:, -1])[:, : config.tokenizer_vocab_size], state

    # A size of 1 in the example would be taken for a constant.
    example = torch.zeros((2, min(2, capacity)), dtype=torch.int64), initial_state(config, 2, capacity)
    batch, seq = torch.export.Dim("batch", min=1), torch.export.Dim("seq", min=1, max=capacity)
    free = {0: batch, 1: seq}, (None, *({0: batch} for _ in example[1][1:]))
    return torch.export.export(Step(), example, dynamic_shapes=free, strict=True)
