"""Checkpoints in Hugging Face folders: export and import, a tensor at a time and without PyTorch."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lfm_jax.interop.export_manifest import MANIFEST, check_manifest, write_manifest
from lfm_jax.interop.huggingface_config import GenerationSettings, from_config_json, to_config_json, to_generation_json
from lfm_jax.interop.huggingface_weights import (
    Path,
    Weight,
    check_parameters,
    grouped,
    is_buffer,
    look_up,
    on_host,
    weight_table,
)
from lfm_jax.interop.safetensors_io import StoredTensor, TensorSpec, read_header, write_safetensors
from lfm_jax.interop.tokenizer_json import tokenizer_json_size, write_tokenizer
from lfm_jax.models import ModelConfig
from lfm_jax.models.functional import Tree

Place = Callable[[Path, np.ndarray], Any]

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Of JSON, which takes up to 24 times its bytes as objects of Python; the index of a model of a million tensors is larger.
_MOST_JSON_BYTES = 1 << 26


class ImportedModel(NamedTuple):
    """What a folder holds; params and buffers are nested as `lfm_jax.models.functional` nests them."""

    config: ModelConfig
    params: Tree
    buffers: Tree


def export_folder(
    config: ModelConfig,
    params: Tree,
    buffers: Tree,
    folder: epath.PathLike,
    *,
    tokenizer: epath.PathLike | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = 5_000_000_000,
    generation: GenerationSettings | None = None,
    check: Callable[[epath.Path], None] | None = None,
) -> epath.Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: config, weights, tokenizer, generation settings.

    The folder appears under its name only once it is complete, with the SHA-256 of every file in MANIFEST.sha256; where anything
    fails before, nothing is left of it. Of the parameters, which are left as they are, one at a time is copied. Of several
    processes (`jax.distributed`) all make the call, since each holds a part of the parameters, and the first writes.

    Args:
      params, buffers: as `FunctionalModel.init` returns them, sharded or not.
      tokenizer: a SentencePiece model, a tokenizer.json, or a folder with one of them. None: no tokenizer files.
      dtype: of the weights; an expert bias is always float32.
      max_shard_bytes: a file of weights holds no more, unless a single tensor is larger.
      generation: special ids and sampling defaults. None: those of the LFM2 chat format, greedy.
      check: is called with the complete folder, under another name; if it raises, the folder does not get its own.
    Returns:
      The folder.
    Raises:
      ValueError: no Hugging Face architecture can hold the configuration, the parameters are not those of the configuration, the
        tokenizer does not fit the vocabulary, or `folder` holds something that is not an earlier export.
      FileNotFoundError: `tokenizer` holds none.
      OSError: something cannot be written, e.g. since the disk is full.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    generation = generation or GenerationSettings()
    folder = epath.Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).exists())):
        raise ValueError(f"{folder} is there and is no earlier export (it has no {MANIFEST}); choose another folder")
    table = weight_table(config)
    check_parameters(table, params, buffers)
    tensor = _tensors(table, params, buffers)
    if jax.process_index():
        for weight in table:
            tensor(weight.name)
        multihost_utils.sync_global_devices(f"{folder} is written")
        return folder
    with _whole_folder(folder) as partial:
        if tokenizer is not None:
            size = write_tokenizer(tokenizer, partial, generation)
            check_tokenizer_size(config, size)
        _write_json(partial / "config.json", to_config_json(config, generation, dtype))
        _write_json(partial / "generation_config.json", to_generation_json(config, generation))
        digests = _write_weights(table, tensor, partial, _DTYPES[dtype], max_shard_bytes)
        write_manifest(partial, digests)
        if check is not None:
            check(partial)
    multihost_utils.sync_global_devices(f"{folder} is written")
    return folder


@contextlib.contextmanager
def _whole_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """A new folder beside `folder`, which takes its place when the block ends well and is removed when it does not."""
    partial = folder.parent / f".{folder.name}.partial"
    try:
        if partial.exists():  # of an export that was killed
            partial.rmtree()
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmtree()
        partial.rename(folder)
    except FileNotFoundError:  # what was to be read, which its text names
        raise
    except OSError as error:
        told = f"{folder} was not written, and nothing is left of it ({error.strerror or error}); is there room on the disk?"
        raise OSError(error.errno, told) from error
    finally:
        if partial.exists():
            partial.rmtree()


def is_model_folder(folder: epath.PathLike) -> bool:
    """Whether there is a config.json that names a model_type: that of a Hugging Face folder, and not of a run.

    Raises:
      ValueError: config.json cannot be read.
    """
    path = epath.Path(folder) / "config.json"
    return path.exists() and "model_type" in _read_json(path)


def read_config(folder: epath.PathLike) -> ModelConfig:
    """The architecture of a Hugging Face folder. A tokenizer.json beside it tells how many ids of the vocabulary are real.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: see `from_config_json`; or tokenizer.json knows more ids than the vocabulary has rows.
    """
    folder = epath.Path(folder)
    content = _read_json(folder / "config.json")
    if content.get("tokenizer_vocab_size") is None and (folder / "tokenizer.json").exists():
        size = tokenizer_json_size(_read_json(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
        vocab = content.get("vocab_size")
        if isinstance(vocab, int) and size > vocab:
            raise ValueError(f"{folder}: tokenizer.json knows {size} ids, but config.json has vocab_size {vocab}")
        content["tokenizer_vocab_size"] = size
    try:
        return from_config_json(content)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def import_folder(folder: epath.PathLike, *, place: Place | None = None) -> ImportedModel:
    """Reads a Hugging Face folder of an LFM2, LFM2-MoE or LFM3 model as float32 parameters.

    Args:
      folder: config.json beside model.safetensors, or shards with their index. Every file is checked against
        MANIFEST.sha256 where there is one.
      place: (path of a parameter, host array) -> the leaf to keep, called once for each as it is read; e.g. a `jax.device_put`
        with the parameter's sharding, so that no more than one of them is whole on the host. None: the default device.
    Raises:
      FileNotFoundError: no config.json, no weights, or a shard that the index names is missing.
      ValueError: the config is unreadable or describes something else, a tensor is missing, superfluous, damaged or of the wrong
        shape or type, or a file is not the one that was exported. The message names the field, tensor or file.
    """
    folder = epath.Path(folder)
    place = place or (lambda _, array: jnp.asarray(array))
    check_manifest(folder)
    config = read_config(folder)
    tensors = _stored_tensors(folder)
    _check_count(config, len(tensors), folder)
    table = weight_table(config)
    stored = _match(table, tensors, config, folder)
    params, buffers = {}, {}
    for path, weights in grouped(table):
        array = _assemble(weights, stored)
        _insert(buffers if is_buffer(path) else params, path, place(path, array))
    return ImportedModel(config, params, buffers)


def _insert(tree: Tree, path: Path, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def check_tokenizer_size(config: ModelConfig, size: int) -> None:
    """Raises ValueError unless a tokenizer of so many ids is the model's."""
    wanted = config.tokenizer_vocab_size
    if size > config.vocab_size or wanted not in (None, size):
        rows = f"vocab_size {config.vocab_size}" if wanted is None else f"tokenizer_vocab_size {wanted}"
        raise ValueError(f"the tokenizer has {size} ids, the model {rows}; export the tokenizer that the model was trained with")


def _tensors(table: list[Weight], params: Tree, buffers: Tree) -> Callable[[str], np.ndarray]:
    """name -> values. Of several processes all ask for the same, in the order of the table."""
    by_name = {weight.name: weight for weight in table}
    held: dict[Path, np.ndarray] = {}  # the stack whose experts are being written, so that it is fetched once

    def tensor(name: str) -> np.ndarray:
        weight = by_name[name]
        if weight.path not in held:
            held.clear()
            held[weight.path] = on_host(look_up(buffers if is_buffer(weight.path) else params, weight.path))
        return weight.to_checkpoint(held[weight.path])

    return tensor


def _write_weights(
    table: list[Weight], tensor: Callable[[str], np.ndarray], folder: epath.Path, dtype: np.dtype, max_shard_bytes: int
) -> dict[str, str]:
    """Writes the shards and their index; returns each shard's SHA-256."""
    specs = [TensorSpec(w.name, np.dtype(np.float32) if is_buffer(w.path) else dtype, w.shape) for w in table]
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return {_SINGLE: write_safetensors(folder / _SINGLE, specs, tensor)}
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    digests = {file: write_safetensors(folder / file, shard, tensor) for file, shard in zip(files, shards, strict=True)}
    weight_map = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
    _write_json(folder / _INDEX, {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map})
    return digests


def _stored_tensors(folder: epath.Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, none of them read; a single file goes before an index, as in transformers."""
    if (folder / _SINGLE).exists():
        return {tensor.spec.name: tensor for tensor in read_header(folder / _SINGLE)}
    if not (folder / _INDEX).exists():
        loose = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
        found = f"only shards ({loose[0]}, ...): the index is missing" if loose else "no other .safetensors file"
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}, {found}; fetch the folder again")
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / _INDEX}: weight_map must map tensor names to file names")
    tensors = {}
    for name in sorted(set(weight_map.values())):
        first = min(tensor for tensor, file in weight_map.items() if file == name)
        if "/" in name or "\0" in name or not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: shard {name!r} is missing, which should hold {first}; fetch the folder again")
        for tensor in read_header(folder / name):
            if weight_map.get(tensor.spec.name) != name:
                raise ValueError(f"{folder}: tensor {tensor.spec.name!r} is in {name}, but not so in {_INDEX}")
            tensors[tensor.spec.name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise ValueError(f"{folder}: tensor {absent[0]!r} is not in {weight_map[absent[0]]}, where {_INDEX} has it")
    return tensors


def _check_count(config: ModelConfig, count: int, folder: epath.Path) -> None:
    """Refuses a config that is far from what is stored before anything is built by it: each layer, and expert, has tensors."""
    layers = config.num_layers
    experts = config.moe.num_experts * sum(map(config.is_moe_layer, range(layers))) if config.moe else 0
    if layers + experts > count:
        raise ValueError(f"{folder}: config.json has {layers} layers and {experts} experts, but only {count} tensors are there")


def _match(
    table: list[Weight], tensors: dict[str, StoredTensor], config: ModelConfig, folder: epath.Path
) -> dict[str, StoredTensor]:
    """The stored tensor of each weight, by the weight's name in the table."""
    matched, rest = {}, dict(tensors)
    for weight in table:
        name = next((name for name in (weight.name, *weight.aliases) if name in rest), None)
        if name is None:
            missing = [w.name for w in table if not {w.name, *w.aliases} & set(tensors)]
            raise ValueError(f"{folder}: tensor {weight.name!r} is missing ({len(missing)} of {len(table)})")
        tensor = matched[weight.name] = rest.pop(name)
        if tensor.spec.shape != weight.shape:
            raise ValueError(f"{folder}: tensor {name!r} has shape {tensor.spec.shape}, config.json means {weight.shape}")
    head = rest.get("lm_head.weight")
    if config.tie_embeddings and head is not None:
        # Some writers store the tied head a second time.
        if not np.array_equal(head.read(), matched["model.embed_tokens.weight"].read()):
            raise ValueError(f"{folder}: lm_head.weight differs from the embedding, but config.json ties them")
        del rest["lm_head.weight"]
    if rest:
        raise ValueError(f"{folder}: tensor {min(rest)!r} has no place in this architecture ({len(rest)} such tensors)")
    return matched


def _assemble(weights: list[Weight], stored: dict[str, StoredTensor]) -> np.ndarray:
    """One of our arrays from its tensor, or from those of its experts."""
    shape = weights[0].own_shape if weights[0].expert is None else (len(weights), *weights[0].own_shape)
    array = np.empty(shape, np.float32)
    for weight in weights:
        array[... if weight.expert is None else weight.expert] = weight.from_checkpoint(stored[weight.name].read())
    return array


def _write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _read_json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; is {file.parent} the folder of a Hugging Face model?")
    size = file.stat().length
    if size > _MOST_JSON_BYTES:
        raise ValueError(f"{file} has {size} bytes, more than {_MOST_JSON_BYTES}: it is damaged or hostile")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
