"""The formats that are read from outside: a sound sample of each, what our reader makes of it, and cases made to do harm."""

import gzip
import io
import json
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from experiments.benchmarks.outside_cases import JSON_CASES, Format, always, digest_of, edited
from experiments.benchmarks.outside_chats import CHATS

_TEXTS = [f"Line {number} says caf\u00e9 {number * 7919 % 101}.\n" * (number % 5 + 1) for number in range(60)]
_OVERRIDES = (
    "model.layer_types=conv,full_attention,conv", "model.full_rope.theta=1000000.0", "train.steps=2000", "loader.batch_size=(16)",
    "data.source=some/folder", "optimizer.learning_rate=0.004", "model.conv_bias=True", "model.sliding_window=None",
)  # fmt: skip


def _move_up(folder: epath.Path) -> None:
    """Moves a folder's files into the one that it lies in."""
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmtree()


# Configuration.


def _make_overrides(folder: epath.Path) -> None:
    (folder / "overrides").write_text("\n".join(_OVERRIDES))


def _read_overrides(folder: epath.Path) -> str:
    from experiments.pretrain import Config
    from lfm_jax.configuration import override

    settings: dict[str, Any] = {}
    for line in (folder / "overrides").read_bytes().decode("utf-8", "surrogateescape").split("\n"):
        path, _, text = line.partition("=")
        override(Config, settings, path, text)
    return ascii(settings)


_OVERRIDE_CASES = {
    name: always(f"train.steps={text}")
    for name, text in {
        "parentheses": "(" * 60_000, "minus": "-" * 60_000 + "1", "brackets": "[" * 5000 + "]" * 5000,
        "hexadecimal": "0x" + "f" * 60_000, "digits": "9" * 60_000, "unhashable": "{[]: 1}", "infinite": "1e999",
        "power": "9**9**9", "nul": "1\0", "surrogate": "\ud800", "long": "1" * 1_000_000, "keys": "{1: 2}",
        "call": "__import__('os').abort()", "imaginary": "1j", "escape": "'\\d'", "or": "1or 2",
    }.items()
}  # fmt: skip
_OVERRIDE_CASES |= {
    "float_digits": always("optimizer.learning_rate=" + "9" * 400), "float_infinite": always("optimizer.learning_rate=1e999"),
    "float_nan": always("optimizer.learning_rate=nan"), "many_dots": always("a." * 50_000 + "b=1"),
    "mapping": always("model.full_rope={1: 2}"), "tuple_hexadecimal": always(f"model.layer_types=[0x{'f' * 60_000}]"),
}  # fmt: skip


# Checkpoints.


def _make_checkpoint(folder: epath.Path) -> None:
    from lfm_jax.training import checkpoint_manifest

    leaf = {"shape": [4, 3], "dtype": "float32", "fingerprint": "0123456789abcdef"}
    content = {"format": 1, "step": 7, "arrays": {f"params.layers.{n}.scale": leaf for n in range(20)}, "position": {"next": 7}}
    (folder / checkpoint_manifest.MANIFEST).write_bytes(checkpoint_manifest.encode(content))


def _read_checkpoint(folder: epath.Path) -> str:
    from lfm_jax.training import checkpoint_manifest

    content, wrong = checkpoint_manifest.read(folder, 7)
    if wrong is not None:
        raise ValueError(wrong)
    return json.dumps(content)


# Token shards.

_SHARD, _LENGTHS = "tokens-00000-000.array_record", "lengths-00000-000.npy"


def _sentencepiece(folder: epath.Path) -> None:
    from data_pipelines import Document, TokenizerConfig, train_tokenizer

    documents = [Document(text, str(number)) for number, text in enumerate(_TEXTS)]
    train_tokenizer(TokenizerConfig(vocab_size=300), documents, folder / "trained")


def _make_shards(folder: epath.Path) -> None:
    from data_pipelines import Document, load_tokenizer, write_token_shards

    _sentencepiece(folder)
    documents = [Document(text, str(number)) for number, text in enumerate(_TEXTS)]
    shards = folder / "shards"
    write_token_shards(documents, load_tokenizer(folder / "trained"), shards, shard_tokens=3000)
    _move_up(shards)
    (folder / "trained").rmtree()


def _read_shards(folder: epath.Path) -> str:
    from data_pipelines import read_token_shards

    shards = read_token_shards(folder)
    about = (shards.documents, shards.tokens, shards.vocab_size, shards.text_bytes, shards.bad_records, shards.shards)
    return digest_of([about, *(shards[document].tobytes() for document in range(len(shards)))])


def _first_shard(**changes: Any) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        index = json.loads(data)
        index["shards"][0] |= changes
        return json.dumps(index).encode()

    return edit


_INDEX_CASES = JSON_CASES | {
    "outside": _first_shard(file="../../../../etc/passwd"), "nul": _first_shard(file="tokens\0"),
    "huge": _first_shard(documents=1 << 62), "negative": _first_shard(bytes=-1), "no_shards": edited(shards=None),
    "dtype": edited(dtype="O"), "dtype_wide": edited(dtype="<u4"), "infinite": _first_shard(difficulty=float("inf")),
    "text": _first_shard(tokens="7"), "tokenizer": edited(tokenizer=[]), "bad": edited(records={"bad": {"a": "b"}}),
    "lengths_digest": _first_shard(lengths_sha256="0" * 64),
}  # fmt: skip
_RECORD_CASES = {
    "first_64_kib": lambda data: data[: 1 << 16], "empty": always(b""), "twice": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)), "ones": lambda data: b"\xff" * len(data),
}  # fmt: skip


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


_LENGTHS_CASES = {
    "shape_bomb": always(_npy("{'descr': '<u4', 'fortran_order': False, 'shape': (1000000000000,), }")),
    "pickle": always(_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04N.")), "empty": always(b""),
}  # fmt: skip


# Models.


def _make_model(folder: epath.Path) -> None:
    import jax

    from lfm_jax.interop import export_folder
    from lfm_jax.models import Decoder, ModelConfig, functional

    config = ModelConfig(
        vocab_size=320, tokenizer_vocab_size=300, embed_dim=8, layer_types=("conv", "full_attention"), num_heads=2,
        num_kv_heads=1, head_dim=4, mlp_dim=12,
    )  # fmt: skip
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), functions.abstract_params)
    _sentencepiece(folder)
    export_folder(config, params, {}, folder / "hf", tokenizer=folder / "trained", max_shard_bytes=8_000)
    _move_up(folder / "hf")
    (folder / "trained").rmtree()


def _make_bare_model(folder: epath.Path) -> None:
    """One file of weights, and nothing that says which bytes are right."""
    from lfm_jax.interop import export_folder, import_folder

    (folder / "sharded").mkdir()
    _make_model(folder / "sharded")
    model = import_folder(folder / "sharded")
    export_folder(model.config, model.params, {}, folder / "hf")
    for name in ("config.json", "model.safetensors"):
        (folder / "hf" / name).rename(folder / name)
    (folder / "hf").rmtree()
    (folder / "sharded").rmtree()


def _read_model(folder: epath.Path) -> str:
    import jax

    from lfm_jax.interop import import_folder

    model = import_folder(folder, place=lambda _, array: array)
    leaves = jax.tree_util.tree_flatten_with_path(model.params)[0]
    return digest_of([model.config, *((str(path), leaf.tobytes()) for path, leaf in leaves)])


def _read_model_config(folder: epath.Path) -> str:
    from lfm_jax.interop import read_config

    return str(read_config(folder))


_CONFIG_CASES = JSON_CASES | {
    "layers": edited(num_hidden_layers=10**9, layer_types=None, full_attn_idxs=[1]),
    "heads": edited(num_attention_heads=0, head_dim=None),
    "many_layers": edited(num_hidden_layers=10_000, layer_types=None, full_attn_idxs=[1]), "rope": edited(rope_parameters=[]),
    "infinite": edited(norm_eps=float("inf")), "nan": edited(rope_theta=float("nan"), rope_parameters=None),
    "vocabulary": edited(vocab_size=2**62), "auto_map": edited(auto_map={"AutoModel": "evil.Model"}),
    "types": edited(layer_types=[["conv"], {}]), "indices": edited(layer_types=None, full_attn_idxs=["1", None]),
    "experts": edited(
        model_type="lfm2_moe", num_experts=10**9, num_experts_per_tok=1, moe_intermediate_size=8, num_dense_layers=0
    ),
    "multiplier": edited(block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1e308),
    "digits": lambda data: data.replace(b"320", b"9" * 5000),
}  # fmt: skip


def _header(content: Any, payload: bytes = bytes(16)) -> Callable[[bytes], bytes]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return always(struct.pack("<Q", len(text)) + text + payload)


def _tensor(shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


_TENSOR_CASES = {
    "length_2_63": always(struct.pack("<Q", 1 << 63) + b"{}"),
    "header_99_megabytes": lambda _: _header(b'{"a":[' + b"{}," * 33_000_000 + b"{}]}")(b""),
    "overlap": _header({"a": _tensor([2], 0, 8), "b": _tensor([3], 4, 16)}),
    "hole": _header({"a": _tensor([1], 0, 4), "b": _tensor([1], 12, 16)}),
    "shape_overflow": _header({"a": _tensor([1 << 40, 1 << 40], 0, 16)}), "deep": _header(b"[" * 200_000),
    "twice": _header(b"{" + b",".join([b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'] * 2) + b"}"),
    "dots": _header({"../a": _tensor([4], 0, 16)}), "nul": _header({"a\0": _tensor([4], 0, 16)}),
    "empty_huge": _header({"a": _tensor([0, 1 << 62], 0, 0)}, b""), "many_axes": _header({"a": _tensor([9] * 2_000_000, 0, 16)}),
    "long_numbers": _header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "million_tensors": lambda _: _header(json.dumps({f"t{n}": _tensor([0], 0, 0) for n in range(1_000_000)}).encode(), b"")(b""),
}  # fmt: skip


# GGUF: the header, which is what is read here.


def _make_gguf(folder: epath.Path) -> None:
    import jax

    from lfm_jax.interop.gguf_file import export_gguf
    from lfm_jax.models import Decoder, ModelConfig, functional

    _sentencepiece(folder)
    config = ModelConfig(
        vocab_size=300, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32
    )
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    trees = (functions.abstract_params, functions.abstract_buffers)
    params, buffers = (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree) for tree in trees)
    export_gguf(config, params, buffers, folder / "model.gguf", tokenizer=folder / "trained")
    (folder / "trained").rmtree()


def _read_gguf(folder: epath.Path) -> str:
    from lfm_jax.interop.gguf_header import read_gguf_header

    header = read_gguf_header(folder / "model.gguf")
    values = (value.tobytes() if isinstance(value, np.ndarray) else ascii(value) for value in header.metadata.values())
    return digest_of([*header.metadata, *values, ascii(header.tensors)])


def _gguf(entry: bytes, tensors: int = 0, entries: int = 1) -> Callable[[bytes], bytes]:
    return lambda _: b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + entry


def _gguf_list(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QcIIQ", 1, b"a", 9, kind, count) + data


_GGUF_CASES = {
    "list_2_40": _gguf(_gguf_list(0, 1 << 40)), "list_2_61": _gguf(_gguf_list(12, 1 << 61)),
    "empty_texts": lambda _: _gguf(_gguf_list(8, 4_000_000, bytes(32_000_000)))(b""),
    "texts_2_40": _gguf(_gguf_list(8, 1 << 40)), "nested": _gguf(_gguf_list(9, 1, struct.pack("<IQ", 9, 1) * 10_000)),
    "truth": lambda _: _gguf(_gguf_list(7, 100_000_000, bytes(100_000_000)))(b""), "key_2_62": _gguf(struct.pack("<Q", 1 << 62)),
    "tensors_2_63": _gguf(b"", 1 << 63, 0), "values_2_40": _gguf(b"", 0, 1 << 40), "empty": always(b""),
    "shape_overflow": _gguf(struct.pack("<QcIQQIQ", 1, b"t", 2, 1 << 40, 1 << 40, 0, 0), 1, 0),
}  # fmt: skip


# Tokenizers.


def _make_tokenizer(folder: epath.Path) -> None:
    _sentencepiece(folder)
    _move_up(folder / "trained")


def _make_tokenizer_json(folder: epath.Path) -> None:
    from lfm_jax.interop import sentencepiece_to_tokenizer

    _make_tokenizer(folder)
    (folder / "tokenizer.json").write_text(sentencepiece_to_tokenizer(folder / "tokenizer.model", 1).to_str())
    (folder / "tokenizer.model").unlink()


def _read_tokenizer(folder: epath.Path) -> str:
    from data_pipelines import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_batch(_TEXTS, threads=1)
    special = (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return digest_of([special, ids, *map(tokenizer.decode, ids)])


def _added(**changes: Any) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        content = json.loads(data)
        content["added_tokens"][0] |= changes
        return json.dumps(content).encode()

    return edit


def _padding(length: int) -> Callable[[bytes], bytes]:
    fixed = {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    return edited(padding={**fixed, "pad_token": "<|pad|>"})


_GROW = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 10}
_TOKENIZER_CASES = JSON_CASES | {
    "replace_12": edited(normalizer={"type": "Sequence", "normalizers": [_GROW] * 12}), "padding_2_31": _padding(1 << 31),
    "padding_2_62": _padding(1 << 62), "replace_3": edited(normalizer={"type": "Sequence", "normalizers": [_GROW] * 3}),
    "backtracking": edited(normalizer={**_GROW, "pattern": {"Regex": "(a+)+$"}}), "added_4e9": _added(id=4_000_000_000),
    "added_float": _added(id=1.5), "added_none": edited(added_tokens=[None]), "added_infinite": _added(id=float("inf")),
    "id_2_32": lambda data: data.replace(b'"<0x00>":', b'"<0x00>":4294967295,"x":', 1),
    "same_ids": lambda data: data.replace(b'"<0x01>":16', b'"<0x01>":15', 1),
}  # fmt: skip


# Text.

_LINES = "".join(json.dumps({"text": text, "n": number / 7}) + "\n" for number, text in enumerate(_TEXTS)).encode()


def _read_text(folder: epath.Path) -> str:
    from data_pipelines.sources.records import Fields
    from data_pipelines.sources.text_files import find_text_files, read_records

    ((name, path),) = find_text_files(folder)
    fields = Fields("text", None if name.endswith(".txt") else "n", 1 << 26)
    return digest_of(read_records(path, name, fields, None, None))


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    table = pyarrow.table({"text": _TEXTS, "n": [number / 7 for number in range(len(_TEXTS))]})
    parquet.write_table(table, sink, row_group_size=20, write_page_checksum=True)
    return sink.getvalue()


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=False).compress(data)


def _zstd_bomb(_: bytes) -> bytes:
    import zstandard

    compressor = zstandard.ZstdCompressor().compressobj()
    return b"".join([compressor.compress(bytes(1 << 24)) for _ in range(64)] + [compressor.flush()])


def _bomb(_: bytes) -> bytes:
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1, mtime=0) as file:
        for _ in range(64):
            file.write(bytes(1 << 24))
    return content.getvalue()


def _line(text: str) -> Callable[[bytes], bytes]:
    return always(text + "\n")


_LINE_CASES = {
    "deep": _line("[" * 1_000_000), "deep_value": _line('{"n": 1, "text": ' + '{"a":' * 100_000),
    "digits": _line('{"text": "a", "n": ' + "9" * 1_000_000 + "}"), "nan": _line('{"text": "a", "n": NaN}'),
    "infinite": _line('{"text": "a", "n": 1e999}'), "twice": _line('{"text": "a", "text": "b", "n": 1}'),
    "surrogate": _line('{"text": "\\ud800", "n": 1}'), "no_newline": lambda _: b'{"text": "' + b"a" * 500_000_000,
    "blanks": lambda _: b" " * 500_000_000, "objects": lambda _: b'{"n": 1, "text": [' + b"{}," * 22_000_000 + b"{}]}\n",
    "nul": always(bytes(1000)), "empty": always(b""),
}  # fmt: skip


def _text_format(file: str, sample: Callable[[], bytes], digest: bool, crafted: Mapping[str, Callable[[bytes], bytes]]) -> Format:
    return Format(lambda folder: (folder / file).write_bytes(sample()), file, _read_text, digest, file, crafted)


FORMATS: dict[str, Format] = {
    "config overrides": Format(_make_overrides, "overrides", _read_overrides, False, "", _OVERRIDE_CASES),
    "checkpoint manifest": Format(_make_checkpoint, "manifest.json", _read_checkpoint, True, "", JSON_CASES),
    "index of token shards": Format(_make_shards, "index.json", _read_shards, False, os.sep, _INDEX_CASES),
    "token shard (ArrayRecord)": Format(_make_shards, _SHARD, _read_shards, True, _SHARD, _RECORD_CASES),
    "lengths of a token shard": Format(_make_shards, _LENGTHS, _read_shards, True, _LENGTHS, _LENGTHS_CASES),
    "config.json": Format(_make_bare_model, "config.json", _read_model_config, False, os.sep, _CONFIG_CASES),
    "safetensors, no manifest": Format(_make_bare_model, "model.safetensors", _read_model, False, os.sep, _TENSOR_CASES),
    "GGUF, header": Format(_make_gguf, "model.gguf", _read_gguf, False, "model.gguf", _GGUF_CASES),
    "export with its manifest": Format(_make_model, None, _read_model, True, os.sep, {}),
    "tokenizer.json": Format(_make_tokenizer_json, "tokenizer.json", _read_tokenizer, False, "tokenizer.json", _TOKENIZER_CASES),
    "SentencePiece model": Format(_make_tokenizer, "tokenizer.model", _read_tokenizer, False, "tokenizer.model", {}),
    **CHATS,
    "text": _text_format("a.txt", lambda: "".join(_TEXTS).encode(), False, {"huge": lambda _: b"a" * 500_000_000}),
    "JSON lines": _text_format("a.jsonl", lambda: _LINES, False, _LINE_CASES),
    "JSON lines, gzip": _text_format("a.jsonl.gz", lambda: gzip.compress(_LINES, mtime=0), True, {"bomb": _bomb}),
    "JSON lines, zstandard": _text_format("a.jsonl.zst", lambda: _zstd(_LINES), False, {"bomb": _zstd_bomb}),
    "Parquet": _text_format("a.parquet", _parquet, False, {"magic": always(b"PAR1" + bytes(100) + b"PAR1")}),
}
