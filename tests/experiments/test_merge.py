"""`configs/merge.py` as a user runs it: what the next stage reads is what numpy makes of the models."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from etils import epath

import run
from data_pipelines import Document, TokenizerConfig, train_tokenizer
from experiments.stages import load_stage, mesh_for
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import Checkpoints

MODEL = ModelConfig(
    vocab_size=312, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
    context_length=64, moe=MoEConfig(num_experts=2, experts_per_token=1, mlp_dim=8, num_dense_layers=1),
)  # fmt: skip


def _arrays(seed, config=MODEL):
    """(parameters, buffers) as a model might have them."""
    functions = functional(lambda rngs: Decoder(config, rngs=rngs))
    draws = np.random.default_rng(seed)
    draw = lambda leaf: draws.normal(size=leaf.shape).astype(np.float32)
    return tuple(jax.tree.map(draw, tree) for tree in (functions.abstract_params, functions.abstract_buffers))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models 0, 1 and 2, one that is wider, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("merge")
    for name, step, size in (("tokenizer", 5, 312), ("other", 7, 300)):
        texts = [f"Line {number} says caf\u00e9 {number * 7919 % 101}.\n" * (number % step + 1) for number in range(60)]
        train_tokenizer(TokenizerConfig(vocab_size=size), [Document(text, "a") for text in texts], folder / name)
    wider = dataclasses.replace(MODEL, mlp_dim=32)
    made = {}
    for name, config, tokenizer in (
        (0, MODEL, "tokenizer"), (1, MODEL, "tokenizer"), (2, MODEL, "tokenizer"), ("wider", wider, "tokenizer"),
        ("foreign", MODEL, "other"),
    ):  # fmt: skip
        arrays = _arrays(name if isinstance(name, int) else 9, config)
        made[name] = export_folder(config, *arrays, folder / f"model_{name}", tokenizer=folder / tokenizer)
    return made


def _merge(workdir, init_from, *settings):
    models = ",".join(str(folder) for folder in init_from)
    return run.main(["--config=configs/merge.py", f"--workdir={workdir}", f"--config.init_from={models}", *settings])


def _read(workdir):
    """What the next stage gets: (parameters, buffers, stage)."""
    stage = load_stage(str(workdir), ComputeConfig(), mesh_for(MeshConfig()))
    return *jax.device_get((stage.params, stage.buffers)), stage


def _norm(tree, *others):
    trees = [np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(one)]) for one in (tree, *others)]
    return np.linalg.norm(trees[0] - sum(trees[1:]))


def _check(found, expected, atol=1e-6):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=atol), found, expected)


def test_the_next_stage_reads_the_mean_and_merges_it_again(folders, tmp_path):
    """Of a Hugging Face folder and a workdir as of two folders; given again, the command makes the same anew."""
    models = [_arrays(seed) for seed in range(3)]
    for _ in range(2):
        assert _merge(tmp_path / "first", [folders[0], folders[1]], "--config.merge.weights=1,3") == 0
    mean = jax.tree.map(lambda one, two: 0.25 * one + 0.75 * two, *models[:2])
    params, buffers, stage = _read(tmp_path / "first")
    _check((params, buffers), mean)
    assert (stage.step, stage.config.mlp_dim, stage.tokenizer.vocab_size) == (0, MODEL.mlp_dim, 312)
    assert jax.tree.leaves(buffers), "no expert biases were merged"
    figures = json.loads((tmp_path / "first" / "results.json").read_text())
    assert figures["norm"] == pytest.approx(_norm(mean[0]), rel=1e-5)
    for row, (of_model, _) in zip(figures["models"], models, strict=False):
        assert row["norm"] == pytest.approx(_norm(of_model), rel=1e-5)
        assert row["norm_of_difference_from_merged"] == pytest.approx(_norm(of_model, mean[0]), rel=1e-5)
    assert [row["checkpoint_step"] for row in figures["models"]] == [None, None] and "base_norm" not in figures

    assert _merge(tmp_path / "second", [tmp_path / "first", folders[2]]) == 0
    again = jax.tree.map(lambda one, two: (one + two) / 2, mean, models[2])
    _check(_read(tmp_path / "second")[:2], again)
    figures = json.loads((tmp_path / "second" / "results.json").read_text())
    assert [row["checkpoint_step"] for row in figures["models"]] == [0, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpoints(tmp_path / "second" / "checkpoints").verify(0) is None


def test_differences_from_a_base_are_added(folders, tmp_path):
    models = [_arrays(seed) for seed in range(3)]
    settings = ("--config.merge.method=task_arithmetic", "--config.merge.weights=0.5,-0.25", f"--config.base={folders[2]}")
    assert _merge(tmp_path / "run", [folders[0], folders[1]], *settings) == 0
    params, buffers, _ = _read(tmp_path / "run")
    add = lambda base, one, two: base + 0.5 * (one - base) - 0.25 * (two - base)
    expected = jax.tree.map(add, models[2][0], models[0][0], models[1][0])
    _check(params, expected, 2e-6)
    _check(buffers, jax.tree.map(lambda one, two: (one + two) / 2, models[0][1], models[1][1]))
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures["base_norm"] == pytest.approx(_norm(models[2][0]), rel=1e-5)
    assert figures["norm_of_difference_from_base"] == pytest.approx(_norm(expected, models[2][0]), rel=1e-5)
    found = [row["norm_of_difference_from_base"] for row in figures["models"]]
    assert found == pytest.approx([_norm(model, models[2][0]) for model, _ in models[:2]], rel=1e-5)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ((0, "wider"), (), "architectures cannot be merged: mlp_dim is 32 in {1} and 24 in {0}."),
        ((0, "foreign"), (), "{1} and {0} have different tokenizers, so their embeddings are of different tokens"),
        ((0, 1), ("--config.merge.method=ties", "--config.base={wider}"), "mlp_dim is 32 in {wider} and 24 in {0}."),
        ((0, 1), ("--config.merge.method=ties",), "run.py: ties needs a base"),
        ((0, 1, 2), ("--config.merge.method=slerp",), "run.py: slerp merges two models, got 3"),
    ],
)
def test_what_cannot_be_merged_is_told_in_one_paragraph(names, settings, message, folders, tmp_path, capsys):
    texts = [folders[name] for name in names]
    fill = lambda text: text.format(*texts, wider=folders["wider"])
    assert _merge(tmp_path / "run", texts, *map(fill, settings)) == 2
    shown = capsys.readouterr().err
    assert fill(message) in shown and shown.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_model_and_another_tokenizer_in_the_workdir_are_refused(folders, tmp_path, capsys):
    assert run.main(["--config=configs/merge.py", f"--workdir={tmp_path}", "--config.init_from=()"]) == 2
    assert "give init_from, the models to merge" in capsys.readouterr().err
    assert _merge(tmp_path / "run", [folders[0], folders[1]]) == 0
    assert _merge(tmp_path / "run", [folders["foreign"]], "--allow_config_change") == 2
    assert f"holds another tokenizer than {folders['foreign']}; give another --workdir." in capsys.readouterr().err
    assert epath.Path(tmp_path / "run" / "checkpoints" / "00000000").exists()
