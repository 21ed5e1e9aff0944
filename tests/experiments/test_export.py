"""`configs/export.py` as a user runs it: three kinds of models in every format, each run in its runtime."""

import json
import subprocess

import jax
import numpy as np
import pytest

import run
from data_pipelines import Document, TokenizerConfig, train_tokenizer
from experiments.export import formats
from lfm_jax.interop import export_folder, gguf_quantize
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, functional

DENSE = {
    "vocab_size": 312, "embed_dim": 32, "layer_types": ("conv", "full_attention"), "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "mlp_dim": 64, "context_length": 256,
}  # fmt: skip
MODELS = {
    "tied": ModelConfig(**DENSE),
    "untied, padded vocabulary": ModelConfig(**{**DENSE, "vocab_size": 320, "tie_embeddings": False, "conv_width": 7}),
    "mixture of experts": ModelConfig(
        **DENSE, moe=MoEConfig(num_experts=2, experts_per_token=1, mlp_dim=32, num_dense_layers=1)
    ),
}  # fmt: skip
EXACT = {"model.safetensors", "model-F32.gguf", "model.pt2", "model.onnx", "model.pte", "model.stablehlo"}
ROUNDED = {"model-Q8_0.gguf", "model-Q4_0.gguf", "model-8da4w.pte"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    texts = [f"Line {number} says caf\u00e9 {number * 7919 % 101}.\n" * (number % 5 + 1) for number in range(60)]
    train_tokenizer(TokenizerConfig(vocab_size=312), [Document(text, "a") for text in texts], folder)
    return folder


def _stage(config, tokenizer, folder):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draws = np.random.default_rng(0)
    draw = lambda leaf: draws.normal(size=leaf.shape).astype(np.float32) * leaf.shape[0] ** -0.5
    params, buffers = (jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))
    return export_folder(config, params, buffers, folder, tokenizer=tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_every_format_runs_in_its_runtime_and_agrees(name, tokenizer, tmp_path, capsys):
    stage = _stage(MODELS[name], tokenizer, tmp_path / "stage")
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    # Each ExecuTorch file takes half a minute; tests/interop has more of them.
    types = "none,8da4w" if name == "tied" else "none"
    small = ["--config.export.capacity=64", "--config.export.check_tokens=16", f"--config.export.executorch_types={types}"]
    assert run.main([*command, *small]) == 0
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row["file"].rpartition("/")[2]: row for row in figures["exports"] if row["runtime"]}
    expected = EXACT | ROUNDED if name == "tied" else EXACT | ROUNDED - {"model-8da4w.pte"}
    assert set(rows) == expected and figures["hf_greedy_agrees"]
    for file, row in rows.items():
        assert row["bytes"] == (tmp_path / "run" / row["file"]).stat().st_size
        if file in EXACT:
            assert row["greedy_agreement"] == 1 and row["max_difference"] < 1e-3
        else:
            assert 1e-4 < row["max_difference"] < 5
    assert rows["model-Q4_0.gguf"]["bytes"] < rows["model-Q8_0.gguf"]["bytes"] < rows["model-F32.gguf"]["bytes"]
    listed = ""
    for folder in (tmp_path / "run" / "export" / name for name in ("hf", "gguf", ".")):
        subprocess.run(["sha256sum", "-c", "--strict", "MANIFEST.sha256"], cwd=folder, check=True, capture_output=True)
        listed += (folder / "MANIFEST.sha256").read_text()
    assert all(f"  {file}\n" in listed for file in [*rows, "README.md"])
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert all(f"{row['file']} |" in card for row in rows.values()) and "1 conv, 1 full_attention" in card
    shown = capsys.readouterr().out
    assert all(runtime in shown for runtime in ("llama.cpp", "ExecuTorch", "onnxruntime", "jax.export"))


def test_an_unknown_type_is_told_in_one_paragraph(tokenizer, tmp_path, capsys):
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    assert run.main([*command, "--config.export.formats=gguf", "--config.export.gguf_types=Q9_0"]) == 2
    shown = capsys.readouterr().err
    assert "--config.export: " in shown and "Q9_0" in shown and shown.count("\n") == 1


def test_importance_is_measured_once_over_the_text_that_is_given(tokenizer, tmp_path, capsys, monkeypatch):
    rows, given = [], []
    monkeypatch.setattr(gguf_quantize, "measure_importance", lambda file, text: rows.append(text) or {"a": 1})
    copied = lambda source, path, kind, importance: given.append((kind, importance)) or source.copy(path, overwrite=True)
    monkeypatch.setattr(gguf_quantize, "quantize_gguf", copied)
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    (tmp_path / "text").write_text("Line 7 says caf\u00e9 3.\n" * 50)
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    command += ["--config.export.formats=gguf", "--config.export.gguf_types=Q4_K_M,Q6_K", "--config.export.check_tokens=0"]
    assert run.main([*command, f"--config.export.gguf_importance={tmp_path / 'text'}"]) == 0
    assert given == [("Q4_K_M", {"a": 1}), ("Q6_K", {"a": 1})]
    ((first, *others),) = rows
    assert len(first) == 256 and {row[0] for row in [first, *others]} == {1} and all(1 not in row[1:] for row in [first, *others])
    (tmp_path / "text").write_text("")
    command[1] = f"--workdir={tmp_path / 'other'}"
    assert run.main([*command, f"--config.export.gguf_importance={tmp_path / 'text'}"]) == 2
    assert "text is empty; give a text like those the model is for" in capsys.readouterr().err


def test_a_missing_package_is_told_in_one_paragraph(tokenizer, tmp_path, capsys, monkeypatch):
    def missing(material):
        raise ModuleNotFoundError("onnx is not installed; run: pip install onnx")

    monkeypatch.setitem(formats.EXPORTERS, "onnx", missing)
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    assert run.main([*command, "--config.export.formats=onnx"]) == 2
    assert "run.py: --config.export.formats: onnx is not installed; run: pip install onnx" in capsys.readouterr().err


def test_other_ids_in_llama_cpp_are_an_error(tokenizer, tmp_path, capsys, monkeypatch):
    """The tokenizer in the file is another than the model's: whatever it says is of no use."""
    asked = formats.run_llama_cpp
    monkeypatch.setattr(formats, "run_llama_cpp", lambda *a, **b: asked(*a, **b)._replace(ids=[[1]] * len(formats._TEXTS)))
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    assert run.main([*command, "--config.export.formats=gguf", "--config.export.gguf_types=F32"]) == 2
    assert "llama.cpp makes other ids of 'The first line of the file says'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "message"), [("capacity=1", "capacity must be at least 2, got 1"), ("check_tokens=-1", "check_tokens not negative")]
)
def test_bad_settings_are_refused(field, message, tmp_path, capsys):
    command = ["--config=configs/export.py", f"--workdir={tmp_path}", "--config.init_from=x", f"--config.export.{field}"]
    assert run.main(command) == 2
    assert message in capsys.readouterr().err
