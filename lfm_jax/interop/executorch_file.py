"""An ExecuTorch program (.pte) for phones and other devices: XNNPACK kernels, in float32 or with weights of 4 bits.

One method of any length, `forward(tokens [1, seq] int64, position [1] int64) -> logits [1, ids]`, reads prompts and continues
them, as ExecuTorch's own runner for language models calls it (extension/llm/runner/text_llm_runner.h). The state is inside of the
program; a call with position 0 begins another sequence, whatever was there before.

One sequence at a time. A mixture of experts computes all of its experts (`lfm_jax.interop.torch_model`).
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import typing
from typing import Any, Literal, NamedTuple

import numpy as np

from lfm_jax.configuration import nearest
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
from lfm_jax.models import ModelConfig

if typing.TYPE_CHECKING:
    import torch

Quantization = Literal["none", "8da4w"]
_QUANTIZATIONS = {"none": "float32", "8da4w": "weights of 4 bits, activations of 8"}
# Of the weights that share a scale. XNNPACK's kernels take multiples of 32, and the least has the least error.
_GROUP = 32


class SpecialIds(NamedTuple):
    """bos: stands in front of every text. eos: any of them ends one."""

    bos: int
    eos: tuple[int, ...]


def special_ids(folder: str | os.PathLike) -> SpecialIds:
    """Those of an exported Hugging Face folder.

    Raises:
      ValueError: config.json has none.
    """
    content = json.loads((pathlib.Path(folder) / "config.json").read_text())
    bos, eos = content.get("bos_token_id"), content.get("eos_token_id")
    eos = [eos] if isinstance(eos, int) else eos
    if not isinstance(bos, int) or not eos or not all(isinstance(token, int) for token in eos):
        raise ValueError(f"{folder}: config.json has bos_token_id {bos!r} and eos_token_id {eos!r}; a runner needs both")
    return SpecialIds(bos, tuple(eos))


def export_executorch(
    model: torch.nn.Module,
    path: str | os.PathLike,
    reference: Reference,
    *,
    ids: SpecialIds,
    quantization: Quantization = "none",
    capacity: int = 2048,
    chunk: int = 128,
) -> ExportedFile:
    """Writes a .pte file and runs it in ExecuTorch's runtime.

    With "8da4w" the matrices of operators, feed-forwards and head have 4 bits in groups of 32 inputs and meet activations of 8
    bits, scaled for each token (torchao's Int8DynamicActivationIntxWeightConfig); the embedding has 8 bits and a scale for each
    row. Norms, convolution taps, routers, attention's gates, and matrices whose inputs are no multiple of 32 stay float32.

    Args:
      model: of `load_torch_model`, which stays as it is.
      ids: what the file tells runners of beginning and end, with sizes (get_bos_id, get_eos_ids, get_max_seq_len, ...).
      capacity: tokens of a sequence.
      chunk: the most tokens of one call, for which the runtime sets memory aside; runners cut longer prompts.
    Raises:
      ModuleNotFoundError: executorch or torchao is not installed.
      ValueError: an unknown quantization, sizes that do not fit, or the file's logits are not those of the reference (with 8da4w:
        not finite).
      OSError: it cannot be written. Nothing is left of it then, as after every other error.
    """
    if quantization not in _QUANTIZATIONS:
        raise ValueError(f"unknown quantization {quantization!r}. {nearest(quantization, _QUANTIZATIONS)}")
    check_installed("executorch", "torchao")
    check_capacity(model.config, capacity, reference)
    known = model.config.tokenizer_vocab_size or model.config.vocab_size
    if max(ids.bos, *ids.eos) >= known:
        raise ValueError(f"bos {ids.bos} and eos {', '.join(map(str, ids.eos))} must be ids of the tokenizer, which has {known}")
    if not 2 <= chunk <= capacity:
        raise ValueError(f"chunk must be from 2 to the capacity {capacity}, got {chunk}")
    with quiet_libraries():
        exact = quantization == "none"
        prepared = _for_xnnpack(model) if exact else _quantized(model)
        program = _program(prepared, capacity, chunk, _metadata(model.config, ids, capacity, chunk))
        with whole_file(path) as file:
            with file.open("wb") as opened:
                program.write_to_file(opened)
            del program
            found = judge(open_executorch(file), reference, exact=exact)
    return finished(path, found)


def open_executorch(path: str | os.PathLike) -> Conversation:
    """A conversation with a file of `export_executorch`. Raises ValueError if it is not what a manifest beside it says."""
    import torch

    check_file(path)
    with quiet_libraries():
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(pathlib.Path(path))
        method = program.load_method("forward")
    constant = lambda name: program.load_method(name).execute([])[0]

    def step(tokens: np.ndarray, position: int) -> tuple[np.ndarray, int]:
        (logits,) = method.execute([torch.from_numpy(tokens), torch.tensor([position])])
        return logits.numpy().copy(), position + tokens.shape[1]

    return Conversation(step, 0, constant("get_max_context_len"), constant("get_max_seq_len"))


def _metadata(config: ModelConfig, ids: SpecialIds, capacity: int, chunk: int) -> dict[str, Any]:
    """What ExecuTorch's runner asks a file for (extension/llm/runner/constants.h)."""
    return {
        "get_bos_id": ids.bos,
        "get_eos_ids": list(ids.eos),
        "get_vocab_size": config.tokenizer_vocab_size or config.vocab_size,
        "get_max_context_len": capacity,
        "get_max_seq_len": chunk,
        "get_n_layers": config.num_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }


def _program(model: torch.nn.Module, capacity: int, chunk: int, metadata: dict[str, Any]) -> Any:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    example = torch.zeros((1, 2), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    free = {1: torch.export.Dim("seq", min=1, max=chunk)}, None
    exported = torch.export.export(_stateful(model, capacity), example, dynamic_shapes=free, strict=True)
    edge = to_edge_transform_and_lower(
        exported,
        # Alone: behind one for quantised products, as ExecuTorch's own exporter has it, each product becomes a part of its own.
        partitioner=[XnnpackPartitioner()],
        constant_methods=metadata,
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    # Caches are written where they are, instead of in a copy.
    return edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))


def _stateful(model: torch.nn.Module, capacity: int) -> torch.nn.Module:
    import torch

    names = [name.replace(".", "_") for name in state_names(model.config)[1:]]

    class Stateful(torch.nn.Module):
        """The state in buffers, which the runtime does not set to zero. A window is zero to a call with position 0; of keys and
        values only what this sequence has written is read."""

        def __init__(self):
            super().__init__()
            self.model = model
            for name, tensor in zip(names, initial_state(model.config, 1, capacity)[1:], strict=True):
                self.register_buffer(name, tensor)

        def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            # Keys and values as they are: of a product with 1 ExecuTorch 1.5.1 would write to the product alone.
            held = [getattr(self, name) for name in names]
            held = [
                torch.where(position > 0, tensor, 0.0) if name.endswith("window") else tensor
                for name, tensor in zip(names, held, strict=True)
            ]
            hidden, (_, *left) = self.model.hidden(tokens, (position, *held))
            for name, tensor in zip(names, left, strict=True):
                getattr(self, name).copy_(tensor)
            return self.model.logits(hidden[:, -1])[:, : model.config.tokenizer_vocab_size]

    return Stateful()


def _for_xnnpack(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares the tensors, with norms that XNNPACK knows."""
    import torch

    tensors = (*model.parameters(), *model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.RMSNorm):
                setattr(parent, name, _norm(child))
    return model


def _norm(norm: torch.nn.RMSNorm) -> torch.nn.Module:
    import torch

    class Norm(torch.nn.Module):
        """XNNPACK has no mean over the last axis: a product with 1 / features, to which the bias adds eps."""

        def __init__(self):
            super().__init__()
            (features,) = norm.weight.shape
            self.weight = norm.weight
            self.register_buffer("mean", torch.full((1, features), 1 / features))
            self.register_buffer("eps", torch.tensor([norm.eps]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.nn.functional.linear(x * x, self.mean, self.eps).rsqrt() * self.weight

    return Norm()


def _quantized(model: torch.nn.Module) -> torch.nn.Module:
    """A copy, because torchao changes modules in place."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = _for_xnnpack(model)
    if model.lm_head is None:
        with torch.device("meta"):
            model.lm_head = torch.nn.Linear(model.config.embed_dim, model.config.vocab_size, bias=False)
        model.lm_head.weight = model.embed.weight
    model.embed = _embedding_in_8_bits(model.embed.weight)
    chosen = lambda module, name: (
        isinstance(module, torch.nn.Linear) and module.in_features % _GROUP == 0 and not name.endswith(("router", "gate_proj"))
    )
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(_GROUP))
    quantize_(model, config, filter_fn=chosen)
    return model


def _embedding_in_8_bits(weight: torch.Tensor) -> torch.nn.Module:
    import torch

    class Embedding(torch.nn.Module):
        """Rows of whole numbers from -127 to 127, each with its scale."""

        def __init__(self):
            super().__init__()
            scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("rows", (weight / scale).round().to(torch.int8))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            look_up = torch.nn.functional.embedding
            return look_up(tokens, self.rows).float() * look_up(tokens, self.scale)

    return Embedding()
