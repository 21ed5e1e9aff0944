"""The safetensors reader and writer against the safetensors package."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from etils import epath

from lfm_jax.interop import safetensors_io
from lfm_jax.interop.safetensors_io import TensorSpec, read_header, write_safetensors

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _tensors(dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = {"matrix": (7, 5), "vector": (3,), "kernel": (4, 1, 3), "scalar_like": (1,)}
    return {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def _write(path, tensors):
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    return write_safetensors(epath.Path(path), specs, tensors.__getitem__)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_package_reads_what_is_written(dtype, tmp_path):
    tensors = _tensors(DTYPES[dtype])
    _write(tmp_path / "a.safetensors", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(loaded[name].float().numpy(), tensor.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_package_writes_is_read(dtype, tmp_path):
    tensors = {name: torch.from_numpy(t).to(getattr(torch, dtype)) for name, t in _tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = {tensor.spec.name: tensor.read() for tensor in read_header(epath.Path(tmp_path / "a.safetensors"))}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(stored[name].astype(np.float32), tensor.float().numpy())


def test_strided_tensors_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_BLOCK_BYTES", 50)
    wide = np.arange(7 * 11, dtype=np.float32).reshape(7, 11)
    spec = TensorSpec("t", np.dtype(ml_dtypes.bfloat16), (11, 7))
    write_safetensors(epath.Path(tmp_path / "a.safetensors"), [spec], lambda _: wide.T)
    np.testing.assert_array_equal(safetensors.torch.load_file(tmp_path / "a.safetensors")["t"].float().numpy(), wide.T)


def test_the_digest_is_that_of_the_file(tmp_path):
    digest = _write(tmp_path / "a.safetensors", _tensors())
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    spec = TensorSpec("t", np.dtype(np.float32), (2, 3))
    with pytest.raises(ValueError, match=r"'t' has shape \(3, 2\), announced was \(2, 3\)"):
        write_safetensors(epath.Path(tmp_path / "a"), [spec], lambda _: np.zeros((3, 2), np.float32))


def test_every_cut_is_noticed(tmp_path):
    _write(tmp_path / "whole", {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)})
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut off|no safetensors file|is not that of"):
            read_header(epath.Path(tmp_path / "cut"))


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    _write(tmp_path / "a", {"t": np.ones(4, np.float32)})
    tensor = read_header(epath.Path(tmp_path / "a"))[0]
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
    with pytest.raises(ValueError, match="'t' is cut off: 12 of 16 bytes"):
        tensor.read()


def test_trailing_bytes_are_refused(tmp_path):
    _write(tmp_path / "a", _tensors())
    with (tmp_path / "a").open("ab") as file:
        file.write(b"xy")
    with pytest.raises(ValueError, match="2 bytes follow the last tensor"):
        read_header(epath.Path(tmp_path / "a"))


def test_integer_weights_are_refused(tmp_path):
    safetensors.numpy.save_file({"layer.weight": np.zeros(3, np.int64)}, tmp_path / "a")
    with pytest.raises(ValueError, match="'layer.weight' has dtype I64; weights are one of F32, F16, BF16"):
        read_header(epath.Path(tmp_path / "a"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "is not that of a safetensors file"),
        ({"t": {"dtype": "F32", "shape": [2]}}, "'t' has no sound dtype, shape and data_offsets"),
        ({"t": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [1 << 63], "data_offsets": [0, 8]}}, "'t' has no sound dtype"),
        ({"t": 3}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "'t' has shape \\(3,\\) but 8 bytes, not 12"),
        ({"t": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}, "'t' has no sound dtype"),
        ({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "'t' ends at byte"),
    ],
)
def test_headers_that_lie_are_refused(header, message, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=message):
        read_header(epath.Path(tmp_path / "a"))


def test_deeply_nested_header_is_refused(tmp_path):
    text = b"[" * 200_000
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="is not that of a safetensors file"):
        read_header(epath.Path(tmp_path / "a"))


def _tensor(length, start):
    return {"dtype": "F32", "shape": [length], "data_offsets": [start, start + 4 * length]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (json.dumps({"a": _tensor(3, 0), "b": _tensor(2, 8)}), "'b' begins at byte .* the one before it ends at"),
        (json.dumps({"a": _tensor(1, 0), "b": _tensor(2, 8)}), "'b' begins at byte .* the one before it ends at"),
        (json.dumps({"a": _tensor(2, 8), "b": _tensor(2, 8)}), "begins at byte .* the one before it ends at"),
        ("{" + ",".join([f'"a":{json.dumps(_tensor(4, 0))}'] * 2) + "}", "safetensors file .*a name is there twice"),
        (json.dumps({"../a": _tensor(4, 0)}), "a tensor is called '../a'; names of weights have letters"),
        (json.dumps({"a\0": _tensor(4, 0)}), r"a tensor is called 'a.x00'; names"),
        (json.dumps({"a" * 501: _tensor(4, 0)}), "a tensor is called 'aaaa"),
        ('{"a":{"shape":[' + "9" * 5000 + "]}}", "is not that of a safetensors file .*Exceeds the limit"),
        ('{"a": NaN}', "'a' has no sound dtype"),
    ],
)
def test_headers_that_hide_something_are_refused(header, message, tmp_path):
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(ValueError, match=message):
        read_header(epath.Path(tmp_path / "a"))


def test_more_tensors_than_a_model_has_are_refused(tmp_path):
    header = json.dumps({f"t{number}": _tensor(0, 0) for number in range(100_001)}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="100001 tensors are in the header; at most 100000"):
        read_header(epath.Path(tmp_path / "a"))


def test_a_header_of_hundred_megabytes_is_not_parsed(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.write((1 << 26).to_bytes(8, "little"))
        file.truncate(1 << 27)
    with pytest.raises(ValueError, match="a header of 67108864 bytes in a file of 134217728"):
        read_header(epath.Path(tmp_path / "a"))
