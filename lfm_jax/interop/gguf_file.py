"""Models in GGUF, the file that llama.cpp runs, written a tensor at a time and without PyTorch.

Metadata and names are those of llama.cpp's architectures lfm2 and lfm2moe (src/models/lfm2.cpp and lfm2moe.cpp there,
conversion/lfm2.py for the keys). What these do not compute is refused.
"""

import errno
import math
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from lfm_jax.configuration import nearest
from lfm_jax.interop.gguf_header import BLOCKS, MAGIC, read_gguf_header
from lfm_jax.interop.gguf_tokenizer import Vocabulary, read_vocabulary
from lfm_jax.interop.huggingface import check_tokenizer_size
from lfm_jax.interop.huggingface_config import GenerationSettings, family
from lfm_jax.interop.huggingface_weights import Weight, check_parameters, grouped, is_buffer, look_up, on_host, weight_table
from lfm_jax.models import ModelConfig
from lfm_jax.models.functional import Tree

# Type of most tensors: that of the embedding and of the head. Four bits cost them more than they save, and llama.cpp's own
# quantiser gives them six.
TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q8_0"}
# The largest weight that each can hold; a block of quantised ones has a scale in float16.
_LARGEST = {"F32": 3e38, "F16": 65504.0, "BF16": 3e38, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class _Tensor(NamedTuple):
    """A tensor of the file. weights: what it is made of, in order; none: zeros. shape: slowest axis first."""

    name: str
    type: str
    shape: tuple[int, ...]
    weights: list[Weight]

    @property
    def nbytes(self) -> int:
        width, size = BLOCKS[self.type]
        return math.prod(self.shape) // width * size


def export_gguf(
    config: ModelConfig,
    params: Tree,
    buffers: Tree,
    path: epath.PathLike,
    *,
    tokenizer: epath.PathLike,
    type: str = "Q8_0",
    generation: GenerationSettings | None = None,
) -> epath.Path:
    """Writes a GGUF file that llama.cpp runs: weights, tokenizer, chat template and special ids.

    The file appears under its name only once it is complete. Of the parameters, which are left as they are, one at a time is
    copied. Rows of the vocabulary that have no token are left out, so that they are never sampled, whoever samples.

    Args:
      params, buffers: as `FunctionalModel.init` returns them, sharded or not, in floating point of at least 16 bits.
      path: of the file, on a local disk.
      tokenizer: as in `export_folder`.
      type: of the matrices, one of `TYPES`. Norms, routers, expert biases and the taps of convolutions are always F32.
      generation: special ids. None: those of the LFM2 chat format. What it says of sampling is not written.
    Returns:
      The path.
    Raises:
      ImportError: the package gguf is not installed.
      ValueError: llama.cpp cannot compute the configuration or split text as the tokenizer does, the parameters are not those of
        the configuration, are quantised, not finite or too large for `type`, or `path` is something other than a GGUF file.
      OSError: the disk is full.
    """
    gguf = _gguf()
    if type not in TYPES:
        raise ValueError(f"{type!r} is no type of GGUF file that is written here. {nearest(type, TYPES)}")
    if tokenizer is None:
        raise ValueError("a GGUF file holds a tokenizer, and none is given; name a tokenizer.model or a tokenizer.json")
    path = epath.Path(path)
    _check_place(path)
    check_computable(config)
    table = weight_table(config)
    check_parameters(table, params, buffers)
    _check_masters(table, params)
    vocabulary = read_vocabulary(tokenizer, generation or GenerationSettings())
    check_tokenizer_size(config, len(vocabulary.tokens))
    tensors = _plan(gguf, config, table, type, len(vocabulary.tokens))
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.nbytes for tensor in tensors), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{path} takes {needed} bytes and the disk has {free}; free some, or choose a smaller type")
    partial = path.parent / f".{path.name}.partial"
    try:
        _write(gguf, config, tensors, vocabulary, partial, type, params, buffers)
        _check_written(partial, tensors)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written ({error}); is there room on the disk?") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are written with the package gguf; install it: pip install 'lfm_jax[export]'") from error
    return gguf


def _check_place(path: epath.Path) -> None:
    if "://" in str(path):
        raise ValueError(f"{path} is not on a local disk, where the package gguf can write; write there, and copy the file")
    if path.exists():
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is there and is no GGUF file; choose another name")


def check_computable(config: ModelConfig) -> None:
    """Refuses, by a ValueError, what llama.cpp's graphs of lfm2 and lfm2moe do not compute."""
    if family(config) == "lfm3":
        raise ValueError(
            "llama.cpp knows LFM3 from b11960 on, and the builds that an export is checked with (xllamacpp, llama-cpp-python) "
            "are older: no file is written that nobody has run; export a Hugging Face folder"
        )
    moe, width, fraction = config.moe, config.num_heads * config.head_dim, config.full_rope.fraction
    refused = {
        "all its blocks are of one kind, and there is no cache for that": len(set(config.layer_types)) == 1,
        "conv_bias is True, but its convolutions have no bias": config.conv_bias,
        f"full_rope turns {fraction} of a head's pairs, but there all of them turn": fraction != 1,
        f"num_heads * head_dim is {width} and embed_dim {config.embed_dim}, but there they are equal": width != config.embed_dim,
        "moe.normalize_weights is False, but there the weights of experts add up to 1": moe and not moe.normalize_weights,
        f"moe.scaling_factor is {moe and moe.scaling_factor}, but there it is 1": moe and moe.scaling_factor != 1,
    }
    for reason, applies in refused.items():
        if applies:
            raise ValueError(f"llama.cpp cannot compute this model: {reason}; export a Hugging Face folder")


def _check_masters(table: list[Weight], params: Tree) -> None:
    """Refuses weights that were rounded to few bits before: rounding them again costs twice."""
    for path, _ in grouped(table):
        leaf = None if is_buffer(path) else look_up(params, path)
        if leaf is not None and not (jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize >= 2):
            raise ValueError(
                f"parameter {'.'.join(map(str, path))} is {leaf.dtype}: it is quantised already; export the float checkpoint "
                "that it was made of"
            )


def _plan(gguf: Any, config: ModelConfig, table: list[Weight], type: str, vocab_size: int) -> list[_Tensor]:
    """The tensors of the file, in order."""
    kind = gguf.MODEL_ARCH.LFM2 if config.moe is None else gguf.MODEL_ARCH.LFM2MOE
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    tensors = []
    for _, weights in grouped(table):
        source, expert = weights[0].name, weights[0].expert
        shape = tuple(size for axis, size in enumerate(weights[0].shape) if axis != 1 or not source.endswith("conv.conv.weight"))
        if source in _VOCABULARY:
            shape = (vocab_size, *shape[1:])
        if expert is not None:
            source = source.replace("model.layers", "layers").replace(f".experts.{expert}.", ".experts.")
            shape = (len(weights), *shape)
        # The package has no head for lfm2moe, where llama.cpp looks for it all the same.
        name = "output.weight" if source == "lm_head.weight" else names.get_name(source, (".weight",))
        if source.endswith("expert_bias"):
            name += ".bias"
        exact = len(shape) == 1 or name.endswith(("shortconv.conv.weight", "ffn_gate_inp.weight"))
        stored = "F32" if exact else TYPES[type] if source in _VOCABULARY else type
        if shape[-1] % BLOCKS[stored][0]:
            raise ValueError(f"{type} stores blocks of {BLOCKS[stored][0]} weights; rows of {name} have {shape[-1]}; take F16")
        tensors.append(_Tensor(name, stored, shape, weights))
    if config.moe is not None and not config.moe.expert_bias:  # llama.cpp always adds one
        layers = filter(config.is_moe_layer, range(config.num_layers))
        tensors += [_Tensor(f"blk.{layer}.exp_probs_b.bias", "F32", (config.moe.num_experts,), []) for layer in layers]
    return tensors


def _write(
    gguf: Any, config: ModelConfig, tensors: list[_Tensor], vocabulary: Vocabulary, partial: epath.Path, type: str, params: Tree,
    buffers: Tree,
) -> None:  # fmt: skip
    writer = gguf.GGUFWriter(None, "lfm2" if config.moe is None else "lfm2moe")
    writer.add_type("model")
    prefix = "ALL" if type == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_model(gguf, writer, config, len(vocabulary.tokens))
    _add_vocabulary(gguf, writer, vocabulary)
    for tensor in tensors:
        stored = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=stored)
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_encode(gguf, tensor, params, buffers))
    finally:
        writer.close()


def _add_model(gguf: Any, writer: Any, config: ModelConfig, vocab_size: int) -> None:
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv([0 if kind == "conv" else config.num_kv_heads for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.full_rope.theta)
    writer.add_shortconv_l_cache(config.conv_width)
    if config.moe is not None:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.experts_per_token)
        writer.add_expert_feed_forward_length(config.moe.mlp_dim)
        writer.add_leading_dense_block_count(config.moe.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_vocabulary(gguf: Any, writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for key, index in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    if vocabulary.suppressed:
        suppressed = [np.int32(index).item() for index in vocabulary.suppressed]
        writer.add_key_value(
            "tokenizer.ggml.suppress_tokens", suppressed, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.INT32
        )
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _encode(gguf: Any, tensor: _Tensor, params: Tree, buffers: Tree) -> np.ndarray:
    """The values of a tensor as they stand in the file."""
    if not tensor.weights:
        return np.zeros(tensor.shape, np.float32)
    path = tensor.weights[0].path
    own = on_host(look_up(buffers if is_buffer(path) else params, path))
    if tensor.weights[0].expert is None:
        return _encode_weight(gguf, tensor, tensor.weights[0], own)
    data = np.empty((len(tensor.weights), tensor.nbytes // len(tensor.weights)), np.uint8)
    for row, weight in zip(data, tensor.weights, strict=True):
        row[:] = _encode_weight(gguf, tensor, weight, own).reshape(-1).view(np.uint8)
    return data


def _encode_weight(gguf: Any, tensor: _Tensor, weight: Weight, own: np.ndarray) -> np.ndarray:
    values = weight.to_checkpoint(own)
    if weight.expert is None:
        values = values[: tensor.shape[0]].reshape(tensor.shape)  # without the rows that only pad the vocabulary
    values = np.ascontiguousarray(values, dtype=np.float32)
    largest = max(values.max(), -values.min())
    if not largest <= _LARGEST[tensor.type]:  # nor is what is no number
        raise ValueError(
            f"{weight.name} has values up to {largest}, and {tensor.type} holds {_LARGEST[tensor.type]:.5g} at most; take a "
            "sound checkpoint, or type F32"
        )
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.type])


def _check_written(file: epath.Path, tensors: list[_Tensor]) -> None:
    found = {tensor.name: (tensor.type, tensor.shape) for tensor in read_gguf_header(file).tensors}
    if found != {tensor.name: (tensor.type, tensor.shape) for tensor in tensors}:
        raise OSError(f"{file} does not hold what was written; the disk may be damaged")
