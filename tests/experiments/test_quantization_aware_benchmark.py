"""What four bits cost, in small: every figure is of the model and the format that it says."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from data_pipelines import Document as Text
from data_pipelines import DocumentsConfig, LoaderConfig, TokenizerConfig, train_tokenizer
from experiments import evaluate
from experiments.benchmarks.quantization_aware import Config, main
from experiments.llama_cpp import llama_cpp_installed
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.training import OptimizerConfig, ScheduleConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=320, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bits")
    lines = [f"the quick brown fox {number % 7} jumps over {number * 7919 % 101}. " * 3 for number in range(60)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    train_tokenizer(TokenizerConfig(vocab_size=310), [Text(line, "a") for line in lines], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(0))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    data = DocumentsConfig(source=str(folder / "text.jsonl"), held_out_share=0.2)
    config = Config(
        init_from=str(folder / "model"), data=data, loader=LoaderConfig(seq_len=64, batch_size=8), seeds=2, scored_tokens=100,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule=ScheduleConfig(warmup_steps=1)),
        train=TrainConfig(steps=3, checkpoint_every=3),
    )  # fmt: skip
    (folder / "run").mkdir()
    main(config, epath.Path(folder / "run"))
    return folder, data, json.loads((folder / "run" / "results.json").read_text())


@pytest.mark.heavy
def test_figures_are_those_of_an_evaluation(compared, tmp_path):
    folder, data, figures = compared
    found = figures["rows"][0]["bits_per_byte"][0]
    for name in ("none", "q4_0", "8da4w"):
        (tmp_path / name).mkdir()
        config = evaluate.Config(
            init_from=str(folder / "model"), data=data, seq_len=64, batch_size=8, compute=ComputeConfig(file_format=name)
        )
        evaluate.main(config, epath.Path(tmp_path / name))
        expected = json.loads((tmp_path / name / "results.json").read_text())["bits_per_byte"]
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert len(set(found.values())) == 3


@pytest.mark.heavy
def test_trainings_differ_by_format_and_seed_and_costs_are_their_differences(compared):
    folder, _, figures = compared
    rows = {row["trained"]: row["bits_per_byte"] for row in figures["rows"]}
    every = [tuple(seed.values()) for name in ("none", "q4_0", "8da4w") for seed in rows[name]]
    assert len(set(every)) == 6 and max(min(each) for each in every) < rows[None][0]["none"]
    mean = lambda trained, measured: np.mean([seed[measured] for seed in rows[trained]])
    assert figures["q4_0_costs_bits_per_byte"] == pytest.approx(mean("none", "q4_0") - mean("none", "none"))
    assert figures["8da4w_costs_bits_per_byte_trained"] == pytest.approx(mean("8da4w", "8da4w") - mean("none", "none"))
    table = (folder / "run" / "quantization_aware.md").read_text()
    assert f"| Q4_0 | {mean('q4_0', 'none'):.4f} (" in table and f"| as it was | {rows[None][0]['none']:.4f} |" in table


@pytest.mark.heavy
@pytest.mark.skipif(not llama_cpp_installed(), reason="xllamacpp is not installed")
def test_llama_cpp_reads_the_files_of_each_training(compared):
    files = compared[2]["llama_cpp"]
    assert [(file["trained"], file["file"]) for file in files] == [
        (None, "F32"), (None, "Q4_0"), ("none", "Q4_0"), ("q4_0", "Q4_0")
    ]  # fmt: skip
    before, rounded, *after = (file["nll_per_token"] for file in files)
    assert 0 < abs(rounded - before) < 0.1 and max(after) < before


@pytest.mark.parametrize(
    "changes, message",
    [({"seeds": 0}, "seeds must be positive and scored_tokens not negative, got 0 and 16384"),
     ({"compute": ComputeConfig(file_format="q4_0")}, "compute.file_format is what is compared here; leave it out, not 'q4_0'")],
)  # fmt: skip
def test_bad_settings_are_refused(changes, message):
    settings = {"init_from": "x", "data": DocumentsConfig(source="x"), "loader": LoaderConfig(seq_len=8, batch_size=1)}
    with pytest.raises(ValueError, match=message):
        Config(**settings, optimizer=OptimizerConfig(), train=TrainConfig(steps=1), **changes)
