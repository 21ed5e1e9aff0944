"""The header of a GGUF file: what the gguf package says of sound ones, and what becomes of damaged and hostile ones."""

import random
import struct

import gguf
import numpy as np
import pytest

from experiments.benchmarks.outside_files import mutate
from lfm_jax.interop import gguf_header
from lfm_jax.interop.gguf_header import BLOCKS, read_gguf_header


def _write(path):
    """Every kind of value and a few kinds of tensors."""
    writer = gguf.GGUFWriter(path, "lfm2")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 100 if kind[0] == "u" else -100)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", -0.25)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "h\u00e9llo\n")
    for name, values in (("strings", ["a", "", "\u4f60"]), ("integers", [1, -2]), ("floats", [0.5]), ("bools", [True, False])):
        writer.add_array(f"a.{name}", values)
    generator = np.random.default_rng(0)
    tensors = {"Q8_0": (3, 64), "Q4_0": (2, 3, 32), "F32": (5,), "BF16": (7, 3)}
    for name, shape in tensors.items():
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(generator.normal(size=shape).astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("gguf") / "sound.gguf")


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file, and checks that an error names the file."""

    def read(data):
        file = tmp_path / "model.gguf"
        file.write_bytes(data)
        try:
            return read_gguf_header(file)
        except ValueError as error:
            assert str(file) in str(error)
            raise

    return read


def test_sizes_of_blocks_are_those_of_the_package():
    numbers = {name: number for number, name in gguf_header._TYPES.items()}
    assert BLOCKS == {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS}
    assert numbers == {name: gguf.GGMLQuantizationType[name].value for name in BLOCKS}


def test_a_sound_file_reads_as_in_the_package(sound, read, tmp_path):
    header = read(sound)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in header.metadata.items()}
    assert plain == fields
    assert plain["a.int64"] == -100 and plain["a.bool"] is True and plain["a.strings"] == ["a", "", "\u4f60"]
    expected = [(t.name, t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for t in reader.tensors]
    assert [(t.name, t.type, t.shape, t.start, t.nbytes) for t in header.tensors] == expected


def _text(text):
    return struct.pack("<Q", len(text)) + text


def _file(entries=(), tensors=(), data=b"", counts=None):
    counts = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + data if tensors else head


def _entry(kind, value, key=b"a"):
    return _text(key) + struct.pack("<I", kind) + value


def _list(kind, count, data=b""):
    return _entry(9, struct.pack("<IQ", kind, count) + data)


def _tensor(name=b"t", sizes=(8,), kind=0, start=0):
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, start)


CRAFTED = {
    "empty": (b"", "no GGUF file"),
    "other": (b"PK\3\4" + bytes(60), "no GGUF file"),
    "version": (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "GGUF version 2; only 3 is read"),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648; only 3 is read"),
    "many_tensors": (_file(counts=(1 << 63, 0)), "9223372036854775808 tensors and 0 values are announced"),
    "many_values": (_file(counts=(0, 1 << 40)), "0 tensors and 1099511627776 values are announced"),
    "values_missing": (_file(counts=(0, 5)), "cut off, or a length is wrong: 8 bytes are announced where 0 are left"),
    "key_length": (_file([struct.pack("<Q", 1 << 62)]), "4611686018427387904 bytes are announced"),
    "list_2_40": (_file([_list(0, 1 << 40)]), "1099511627776 bytes are announced where 0 are left"),
    "list_2_61": (_file([_list(12, 1 << 61)]), "18446744073709551616 bytes are announced"),
    "texts_2_40": (_file([_list(8, 1 << 40)]), "a list of 1099511627776 texts where 0 bytes are left"),
    "empty_texts": (_file([_list(8, 5_000_000, bytes(40_000_000))]), "a list of 5000000 texts where 40000000 bytes are left"),
    "lists_in_lists": (_file([_list(9, 1, struct.pack("<IQ", 9, 1) * 2000)]), "a list has values of the type 9"),
    "unknown_type": (_file([_entry(99, b"")]), "a value has the unknown type 99"),
    "no_truth": (_file([_entry(7, b"\2")]), "a truth value is neither 0 nor 1"),
    "no_utf8": (_file([_entry(8, _text(b"\xff"))]), "a text is no UTF-8"),
    "twice": (_file([_entry(0, b"\1")] * 2), "the key 'a' is there twice, or is none"),
    "strange_key": (_file([_entry(0, b"\1", b"a\0b")]), r"the key 'a\\x00b' is there twice, or is none"),
    "alignment_0": (_file([_entry(4, bytes(4), b"general.alignment")]), "general.alignment is 0"),
    "alignment_text": (_file([_entry(8, _text(b"32"), b"general.alignment")]), "general.alignment is '32'"),
    "tensors_named_alike": (_file(tensors=[_tensor(), _tensor(start=32)], data=bytes(64)), "two tensors have one name"),
    "path": (_file(tensors=[_tensor(b"../t")], data=bytes(32)), "a tensor is called '../t'"),
    "long_name": (_file(tensors=[_tensor(b"t" * 65)], data=bytes(32)), "a tensor is called 'ttt"),
    "axes": (_file(tensors=[_tensor(sizes=(1,) * 5)], data=bytes(32)), "has 5 axes; it needs a name and 1 to 4"),
    "kind": (_file(tensors=[_tensor(kind=77)], data=bytes(32)), "tensor t has type 77"),
    "no_size": (_file(tensors=[_tensor(sizes=(0, 1 << 62))]), "has the axes .0, 4611686018427387904."),
    "huge": (_file(tensors=[_tensor(sizes=(1 << 40, 1 << 40))]), "has the axes"),
    "part_of_a_block": (_file(tensors=[_tensor(sizes=(33,), kind=8)], data=bytes(64)), r"has the axes \[33\], which Q8_0"),
    "overlap": (_file(tensors=[_tensor(), _tensor(b"u", start=0)], data=bytes(32)), "tensor u begins at byte"),
    "hole": (_file(tensors=[_tensor(), _tensor(b"u", start=64)], data=bytes(96)), "tensor u begins at byte"),
    "short": (_file(tensors=[_tensor()], data=bytes(31)), "the tensors end at byte 96, the file has 95"),
    "long": (_file(tensors=[_tensor()], data=bytes(33)), "the tensors end at byte 96, the file has 97"),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_files_are_refused(case, read):
    data, message = CRAFTED[case]
    with pytest.raises(ValueError, match=message):
        read(data)


def test_too_many_texts_in_all(read, monkeypatch):
    monkeypatch.setattr(gguf_header, "_MOST_STRINGS", 10)
    with pytest.raises(ValueError, match="more than 10 texts are in the header"):
        read(_file([_entry(8, _text(b"b"), b"a%d" % number) for number in range(6)]))


def test_mutants_are_read_or_refused(sound, read):
    """What is accepted has the sizes it says, so that nobody reads beyond the file."""
    accepted = 0
    for number in range(400):
        _, data = mutate(sound, random.Random(number))
        try:
            header = read(data)
        except ValueError:
            continue
        accepted += 1
        assert all(tensor.start + tensor.nbytes <= len(data) for tensor in header.tensors)
    assert 0 < accepted < 200
