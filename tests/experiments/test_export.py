"""`configs/export.py` as a user runs it: three kinds of models in every format, each run in its runtime."""

import dataclasses
import errno
import hashlib
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT
from etils import epath

import run
from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from experiments.export import card, formats
from experiments.export import huggingface as exporting
from lfm_jax.interop import GenerationSettings, export_folder, export_gguf, gguf_quantize, huggingface, import_folder
from lfm_jax.interop.executorch_file import special_ids
from lfm_jax.models import Decoder, ModelConfig, MoEConfig, RopeConfig, functional

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


def _stage(config, tokenizer, folder, seed=0):
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draws = np.random.default_rng(seed)
    draw = lambda leaf: draws.normal(size=leaf.shape).astype(np.float32) * leaf.shape[0] ** -0.5
    params, buffers = (jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))
    return export_folder(config, params, buffers, folder, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["tied", *(pytest.param(name, marks=pytest.mark.heavy) for name in MODELS if name != "tied")])
def test_every_format_runs_in_its_runtime_and_agrees(name, tokenizer, tmp_path):
    """In a process of its own, as a user has it: half a dozen runtimes in one that has run a thousand tests are nobody's case."""
    stage = _stage(MODELS[name], tokenizer, tmp_path / "stage")
    command = [sys.executable, "run.py", "--config=configs/export.py", f"--workdir={tmp_path / 'run'}"]
    # Each ExecuTorch file takes half a minute; tests/interop has more of them.
    types = "none,8da4w" if name == "tied" else "none"
    small = ["--config.export.capacity=64", "--config.export.check_tokens=16", f"--config.export.executorch_types={types}"]
    ran = subprocess.run([*command, f"--config.init_from={stage}", *small], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
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
    assert all(runtime in ran.stdout for runtime in ("llama.cpp", "ExecuTorch", "onnxruntime", "jax.export"))


def _bytes_with(symbols):
    """A tokenizer.json of the 256 bytes and some symbols behind them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=True), tokenizers.decoders.ByteLevel()
    made.add_special_tokens(symbols)
    return made.to_str()


@pytest.mark.parametrize("turns", [True, False])
def test_the_ends_are_those_of_the_tokenizer(turns, tokenizer, tmp_path):
    symbols = ["<|endoftext|>", "<|pad|>", "<|startoftext|>", *(["<|im_start|>", "<|im_end|>"] if turns else [])]
    stage = _stage(MODELS["tied"], None, tmp_path / "stage")
    (stage / "MANIFEST.sha256").unlink()
    (stage / "tokenizer.json").write_text(_bytes_with(symbols))
    found = formats.settings_for(load_tokenizer(stage))
    assert (found.bos_id, found.pad_id, found.eos_ids) == (258, 257, (260, 256) if turns else (256,))
    assert formats.settings_for(load_tokenizer(tokenizer)) == GenerationSettings()  # those of ours are LFM2's
    assert _exported(stage, tmp_path / "run", "formats=hf") == 0
    folder = tmp_path / "run" / "export" / "hf"
    assert special_ids(folder).eos == found.eos_ids
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == symbols[-1 if turns else 0]


@pytest.mark.parametrize(("steps", "quoted"), [(40, True), (30, False), (None, False)])
def test_the_card_quotes_figures_of_the_checkpoint_alone(steps, quoted, tokenizer, tmp_path):
    """A run that goes on exports while results.json still has those of its earlier end."""
    content = {"steps": steps, "bits_per_byte": 1.25}
    (tmp_path / "results.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    stage = types.SimpleNamespace(config=MODELS["tied"], tokenizer_path=epath.Path(tmp_path) / "tokenizer", step=40)
    card.write_card(epath.Path(tmp_path) / "README.md", stage, [])
    written = (tmp_path / "README.md").read_text()
    assert "It is the checkpoint of step 40." in written and ("bits_per_byte: 1.25." in written) == quoted


def test_an_unknown_type_is_told_in_one_paragraph(tmp_path, capsys):
    """And before anything is written, or a model is looked for."""
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={tmp_path / 'nowhere'}"]
    assert run.main([*command, "--config.export.gguf_types=F32,Q4_K_N"]) == 2
    shown = capsys.readouterr().err
    assert "run.py: export: gguf_types: 'Q4_K_N' is no type of GGUF file that is written here. Did you mean 'Q4_K_S'?" in shown
    assert shown.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_model_that_llama_cpp_cannot_compute_is_told_with_the_formats_that_can_be_had(tokenizer, tmp_path, capsys):
    """And before anything is written."""
    config = dataclasses.replace(
        MODELS["tied"], layer_types=("conv", "sliding_attention"), conv_width=7, conv_bias=True, sliding_window=4,
        sandwich_norms=True, attention_gate=True, sliding_rope=RopeConfig(theta=100.0), tie_embeddings=False,
    )  # fmt: skip
    stage = _stage(config, tokenizer, tmp_path / "stage")
    command = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    assert run.main(command) == 2
    shown = capsys.readouterr().err
    assert "llama.cpp knows LFM3 from b11960 on" in shown and shown.count("\n") == 1
    assert "What else there is: --config.export.formats=hf,pytorch,executorch,onnx,stablehlo" in shown
    assert not (tmp_path / "run" / "export").exists()


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


def _exported(stage, workdir, *settings):
    """The exit code, without the comparisons unless the settings ask for them."""
    command = ["--config=configs/export.py", f"--workdir={workdir}", f"--config.init_from={stage}", "--allow_config_change"]
    return run.main([*command, "--config.export.check_tokens=0", *(f"--config.export.{setting}" for setting in settings)])


def test_a_full_disk_is_told_in_one_paragraph_and_leaves_nothing(tokenizer, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    monkeypatch.setattr(huggingface, "write_safetensors", full)
    assert _exported(stage, tmp_path / "run", "formats=hf") == 2
    shown = capsys.readouterr().err
    assert "run.py: --config.export: " in shown and "run/export/hf was not written, and nothing is left of it (No space" in shown
    assert "is there room on the disk?" in shown and shown.count("\n") == 1
    assert not list((tmp_path / "run" / "export").iterdir())


def test_an_earlier_export_leaves_nothing_among_a_later_one_of_other_weights(tokenizer, tmp_path, monkeypatch):
    """Not even what a K-quant is made of; and files of somebody else stay."""
    copied = lambda source, path, kind, importance: source.copy(path)
    monkeypatch.setattr(gguf_quantize, "quantize_gguf", copied)
    first, second = (_stage(MODELS["tied"], tokenizer, tmp_path / f"stage{seed}", seed) for seed in (0, 1))
    folder = tmp_path / "run" / "export"
    names = lambda folder: sorted(file.name for file in folder.iterdir())
    assert _exported(first, tmp_path / "run", "formats=gguf,stablehlo", "gguf_types=F32,Q8_0") == 0
    assert names(folder) == ["MANIFEST.sha256", "README.md", "gguf", "hf", "model.stablehlo"]
    assert names(folder / "gguf") == ["MANIFEST.sha256", "model-F32.gguf", "model-Q8_0.gguf"]
    (folder / "notes.txt").write_text("mine")

    assert _exported(second, tmp_path / "run", "formats=gguf", "gguf_types=Q4_K_M") == 0
    assert names(folder) == ["MANIFEST.sha256", "README.md", "gguf", "hf", "notes.txt"]
    assert names(folder / "gguf") == ["MANIFEST.sha256", "model-Q4_K_M.gguf"]
    model = import_folder(second)
    expected = export_gguf(*model, tmp_path / "expected.gguf", tokenizer=second, type="F32").read_bytes()
    assert (folder / "gguf" / "model-Q4_K_M.gguf").read_bytes() == expected
    assert (folder / "gguf" / "MANIFEST.sha256").read_text() == f"{hashlib.sha256(expected).hexdigest()}  model-Q4_K_M.gguf\n"
    assert "Q8_0" not in (folder / "README.md").read_text()

    assert _exported(first, tmp_path / "run", "formats=hf") == 0
    assert names(folder) == ["hf", "notes.txt"]
    jax.tree.map(np.testing.assert_array_equal, import_folder(folder / "hf").params, import_folder(first).params)


def test_what_a_k_quant_is_made_of_is_written_once(tokenizer, tmp_path, monkeypatch):
    """Asked for after it, the file in float32 is that which is there."""
    sources = []
    copied = lambda source, path, kind, importance: sources.append(source.name) or source.copy(path)
    monkeypatch.setattr(gguf_quantize, "quantize_gguf", copied)
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "formats=gguf", "gguf_types=Q4_K_M,F32,Q6_K,F32") == 0
    assert sources == ["model-F32.gguf"] * 2
    files = (tmp_path / "run" / "export" / "gguf").glob("*.gguf")
    contents = {file.name: file.read_bytes() for file in files}
    assert sorted(contents) == ["model-F32.gguf", "model-Q4_K_M.gguf", "model-Q6_K.gguf"] and len(set(contents.values())) == 1
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["exports"]
    assert [row["file"] for row in rows if "gguf" in row["file"]] == [
        f"export/gguf/model-{kind}.gguf" for kind in ("Q4_K_M", "F32", "Q6_K")
    ]


def test_a_missing_quantiser_is_told_in_one_paragraph(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "formats=gguf", "gguf_types=Q4_K_M") == 2
    assert "run.py: --config.export.formats: llama.cpp's quantiser comes with the package llama" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "export" / "gguf").iterdir())


def test_gguf_is_compared_with_the_parameters_that_it_is_made_of(tokenizer, tmp_path):
    """In float32, where hf is rounded."""
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "dtype=bfloat16", "check_tokens=8", "formats=gguf", "gguf_types=F32") == 0
    row = json.loads((tmp_path / "run" / "results.json").read_text())["exports"][-1]
    assert row["file"] == "export/gguf/model-F32.gguf" and row["max_difference"] < 1e-4 and row["greedy_agreement"] == 1


def _with_last(ids, change):
    return [[*ids[:-1], *change(ids[-1])]]


OTHER_TOKEN = lambda found: {"continuations": _with_last(found.continuations[0], lambda last: [(last + 1) % 300])}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("F32", lambda found: {"log_probs": [[value + 0.1 for value in found.log_probs[0]]]}, "differ by 0.1 "),
        ("F32", OTHER_TOKEN, "and 7 of 8 tokens of a greedy continuation are ours"),
        ("F32", lambda found: {"continuations": _with_last(found.continuations[0], lambda _: [])}, "and 7 of 8 tokens"),
        ("Q8_0", lambda found: {"log_probs": [[float("nan") for _ in found.log_probs[0]]]}, "differ by nan "),
    ],
    ids=["log-probabilities", "other token", "early end", "not finite"],
)
def test_a_gguf_file_that_disagrees_is_an_error_and_not_left_there(
    kind, change, message, tokenizer, tmp_path, capsys, monkeypatch
):
    asked = formats.run_llama_cpp
    changed = lambda found: found._replace(**change(found))
    monkeypatch.setattr(formats, "run_llama_cpp", lambda *a, **b: changed(asked(*a, **b)))
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "check_tokens=8", "formats=gguf", f"gguf_types={kind}") == 2
    shown = capsys.readouterr().err
    assert f"run/export/gguf/model-{kind}.gguf is not written: log-probabilities in llama.cpp differ by" in shown
    assert message in shown
    assert not list((tmp_path / "run" / "export" / "gguf").iterdir())


def test_another_token_in_a_rounded_file_is_a_figure(tokenizer, tmp_path, monkeypatch):
    asked = formats.run_llama_cpp
    changed = lambda found: found._replace(continuations=[[1, *found.continuations[0][1:]]])
    monkeypatch.setattr(formats, "run_llama_cpp", lambda *a, **b: changed(asked(*a, **b)))
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "check_tokens=8", "formats=gguf", "gguf_types=Q8_0") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["exports"][-1]["greedy_agreement"] == 0


def test_a_continuation_that_llama_cpp_ends_agrees(tokenizer, tmp_path, monkeypatch):
    """The third token of it is made the one that ends a text."""
    asked, seen = formats.run_llama_cpp, []
    monkeypatch.setattr(formats, "run_llama_cpp", lambda *a, **b: seen.append(asked(*a, **b)) or seen[-1])
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage", seed=1)  # its first three tokens are different ones
    settings = ("check_tokens=8", "formats=gguf", "gguf_types=F32")
    assert _exported(stage, tmp_path / "run", *settings) == 0
    *begin, end = seen[0].continuations[0][:3]
    monkeypatch.setattr(formats, "settings_for", lambda _: GenerationSettings(eos_ids=(end,)))
    assert _exported(stage, tmp_path / "run", *settings) == 0
    assert end not in begin and seen[1].continuations == [[*begin, end]]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["exports"][-1]["greedy_agreement"] == 1


@pytest.mark.parametrize("part", ["logits", "tokens", "ids"])
def test_a_folder_that_transformers_reads_otherwise_is_an_error_and_not_left_there(
    part, tokenizer, tmp_path, capsys, monkeypatch
):
    logits, continued = exporting._logits, exporting.continued
    if part == "logits":
        monkeypatch.setattr(exporting, "_logits", lambda *a: logits(*a) + 1)
        message = "the file's logits differ by 1 from ours"
    elif part == "tokens":
        monkeypatch.setattr(exporting, "continued", lambda *a: _with_last(continued(*a), lambda last: [(last + 1) % 300])[0])
        message = "the greedy continuation is ["
    else:
        other = lambda text, **_: types.SimpleNamespace(input_ids=torch.tensor([[1, 5]]))
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: other)
        message = "the ids of 'The first line of the file says' are [1, 5, "
    stage = _stage(MODELS["tied"], tokenizer, tmp_path / "stage")
    assert _exported(stage, tmp_path / "run", "check_tokens=8", "formats=hf") == 2
    shown = capsys.readouterr().err
    assert f"run/export/hf is not written, since in transformers {message}" in shown and shown.count("\n") == 1
    assert not list((tmp_path / "run" / "export").iterdir())


@pytest.mark.parametrize(
    ("theirs", "tolerance", "other"),
    [([0, 1, 2], 0.0, False), ([0, 2, 2], 0.051, False), ([0, 2, 2], 0.049, True), ([0, 1], 1.0, True), ([], 1.0, True)],
    ids=["same", "tie", "no tie", "shorter", "none"],
)
def test_another_token_is_a_tie_where_it_is_about_as_likely(theirs, tolerance, other):
    logits = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.4], [0.0, 0.0, 1.0]])
    assert formats.other_choice(logits, [0, 1, 2], theirs, tolerance) == other
    assert formats.other_choice(logits, theirs, [0, 1, 2], tolerance) == other


@pytest.mark.parametrize(
    ("field", "message"), [("capacity=1", "capacity must be at least 2, got 1"), ("check_tokens=-1", "check_tokens not negative")]
)
def test_bad_settings_are_refused(field, message, tmp_path, capsys):
    command = ["--config=configs/export.py", f"--workdir={tmp_path}", "--config.init_from=x", f"--config.export.{field}"]
    assert run.main(command) == 2
    assert message in capsys.readouterr().err
