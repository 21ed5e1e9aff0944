"""The manifest of an exported folder, judged by `sha256sum`; what differs from it is named and never imported."""

import hashlib
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
import safetensors.torch
import transformers
from etils import epath

from lfm_jax.interop import export_folder, import_folder
from lfm_jax.interop.export_manifest import check_file, check_manifest, write_manifest
from lfm_jax.models import Decoder, ModelConfig, functional

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    functions = functional(lambda rngs: Decoder(CONFIG, rngs=rngs))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), functions.abstract_params)
    return export_folder(CONFIG, params, {}, tmp_path_factory.mktemp("export") / "hf", max_shard_bytes=6_000)


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return epath.Path(shutil.copytree(written, tmp_path / "hf"))


def _sha256sum(folder):
    return subprocess.run(["sha256sum", "-c", "--strict", "MANIFEST.sha256"], cwd=folder, capture_output=True, text=True)


def test_sha256sum_reads_it_and_it_has_every_file(folder):
    checked = _sha256sum(folder)
    assert checked.returncode == 0, checked.stderr
    files = {path.name for path in folder.iterdir()} - {"MANIFEST.sha256"}
    assert {line.partition(":")[0] for line in checked.stdout.splitlines()} == files
    assert len(list(folder.glob("*.safetensors"))) > 2
    lines = (folder / "MANIFEST.sha256").read_text().splitlines()
    assert lines == [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in sorted(files)]


def test_transformers_loads_the_folder(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    embedding = import_folder(folder).params["embed"]["embedding"]
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), np.asarray(embedding))


def test_every_flipped_byte_is_noticed(folder):
    """Of every file, in several places, where sha256sum notices it too."""
    draw = np.random.default_rng(0)
    for file in folder.iterdir():
        content = file.read_bytes()
        for position in draw.integers(len(content), size=3):
            changed = bytearray(content)
            changed[position] ^= 1 << int(draw.integers(8))
            file.write_bytes(changed)
            with pytest.raises((ValueError, FileNotFoundError), match=r"MANIFEST.sha256|is not the file that was exported"):
                import_folder(folder)
            assert _sha256sum(folder).returncode != 0
        file.write_bytes(content)
    import_folder(folder)


def test_a_changed_file_is_named(folder):
    name = sorted(file.name for file in folder.glob("*.safetensors"))[1]
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported .* or remove MANIFEST.sha256"):
        import_folder(folder)


def test_a_config_of_another_export_is_named(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"norm_eps": 1e-4}))
    with pytest.raises(ValueError, match="config.json is not the file that was exported"):
        import_folder(folder)
    (folder / "MANIFEST.sha256").unlink()
    assert import_folder(folder).config.norm_eps == 1e-4


def test_a_missing_file_is_named(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors.index.json is missing, which MANIFEST.sha256 lists"):
        import_folder(folder)


def test_weights_that_are_not_listed_are_not_read(folder):
    """A model.safetensors beside the shards would be read in their place."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is there, but MANIFEST.sha256 does not list it"):
        import_folder(folder)


def same_parameters(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    return bool(jax.tree.leaves(one.params))


def test_other_files_may_be_added(folder):
    before = import_folder(folder)
    (folder / "README.md").write_text("a model")
    assert same_parameters(import_folder(folder), before)


def test_a_file_is_checked_against_the_manifest_beside_it(tmp_path):
    file = epath.Path(tmp_path) / "model.pte"
    file.write_bytes(b"a program")
    (tmp_path / "gguf").mkdir()
    check_file(file)  # there is none
    write_manifest(epath.Path(tmp_path), {})
    write_manifest(epath.Path(tmp_path), {})  # neither itself nor a folder is in it
    assert (tmp_path / "MANIFEST.sha256").read_text() == f"{hashlib.sha256(b'a program').hexdigest()}  model.pte\n"
    check_file(file)
    (tmp_path / "another.pte").write_bytes(b"of another day")
    check_file(tmp_path / "another.pte")
    file.write_bytes(b"a progran")
    with pytest.raises(ValueError, match="model.pte is not the file that was exported .SHA-256."):
        check_file(file)


@pytest.mark.parametrize("read", ["open_pt2", "open_onnx", "open_executorch", "load_stablehlo"])
def test_no_reader_opens_a_file_that_is_not_the_listed_one(read, tmp_path):
    """None of them comes as far as to look into it."""
    from lfm_jax.interop import executorch_file, stablehlo, torch_export

    readers = {
        "open_pt2": torch_export.open_pt2, "open_onnx": torch_export.open_onnx,
        "open_executorch": executorch_file.open_executorch, "load_stablehlo": lambda path: stablehlo.load_stablehlo(path, {}, {}),
    }  # fmt: skip
    (tmp_path / "model").write_bytes(b"a program")
    write_manifest(epath.Path(tmp_path), {})
    (tmp_path / "model").write_bytes(b"a progran")
    with pytest.raises(ValueError, match="model is not the file that was exported"):
        readers[read](tmp_path / "model")


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{DIGEST}  ../outside\n", "MANIFEST.sha256:1: expected a SHA-256, two spaces and a name, got '0000"),
        (f"{DIGEST}  a/b\n", "MANIFEST.sha256:1: expected a SHA-256"),
        (f"{DIGEST}  .hidden\n", "MANIFEST.sha256:1: expected a SHA-256"),
        (f"{DIGEST[1:]}  a\n", "MANIFEST.sha256:1: expected a SHA-256"),
        (f"{DIGEST}  a\n\n", "MANIFEST.sha256:2: expected a SHA-256"),
        (f"{DIGEST}  a\n{'1' * 64}  a\n", "MANIFEST.sha256:2: a has two digests"),
        ("0" * (1 << 20) + "0", "MANIFEST.sha256 has 1048577 bytes, which is no list"),
        ("\0", "MANIFEST.sha256:1: expected a SHA-256"),
    ],
)
def test_a_damaged_manifest_is_refused(text, message, tmp_path):
    (tmp_path / "MANIFEST.sha256").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_manifest(epath.Path(tmp_path))


def test_a_manifest_of_sha256sum_is_taken(tmp_path):
    """In both of its modes."""
    for name in ("config.json", "a.safetensors"):
        (tmp_path / name).write_text(name)
    for mode in ("--text", "--binary"):
        made = subprocess.run(["sha256sum", mode, "config.json", "a.safetensors"], cwd=tmp_path, capture_output=True, check=True)
        (tmp_path / "MANIFEST.sha256").write_bytes(made.stdout)
        check_manifest(epath.Path(tmp_path))
    (tmp_path / "b.safetensors").write_text("b")
    with pytest.raises(ValueError, match="b.safetensors is there, but"):
        check_manifest(epath.Path(tmp_path))


def test_digests_that_are_known_are_not_computed_again(tmp_path):
    (tmp_path / "a").write_text("a")
    write_manifest(epath.Path(tmp_path), {"a": DIGEST})
    assert (tmp_path / "MANIFEST.sha256").read_text() == f"{DIGEST}  a\n"


def test_a_folder_without_one_is_read(folder):
    before = import_folder(folder)
    (folder / "MANIFEST.sha256").unlink()
    assert same_parameters(import_folder(folder), before)
