"""From pairs of answers to a model that prefers, as a user does it, and what is refused on the way."""

import itertools
import json
import math
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

import run
from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations import CHAT_FORMATS, ConversationsConfig
from data_pipelines.conversations.preferences import encode_preferences, read_preferences
from experiments import dpo
from experiments.conversations import find_template
from experiments.stages import load_stage, mesh_for
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import Checkpoints, read_metrics, step

MODEL = ModelConfig(
    vocab_size=320, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and pairs: of two numbers the greater one is chosen."""
    folder = tmp_path_factory.mktemp("dpo")
    pairs = [
        {"prompt": [{"role": "user", "content": f"{a} or {b}?"}], "chosen": f"The greater is {b}.", "rejected": f"{a}"}
        for a in range(8) for b in range(10, 16)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_tokenizer(TokenizerConfig(vocab_size=310), [Document(json.dumps(pairs) * 3, "a")], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(0))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    return folder


def _tune(folder, workdir, member="dpo_norm", **changes):
    settings = {
        "init_from": f"{folder}/model", "data.sources": f"{folder}/pairs.jsonl", "data.held_out_share": 0.2, "loader.seq_len": 64,
        "loader.batch_size": 8, "train.steps": 4, "train.log_every": 1, "train.evaluate_every": 4, "train.checkpoint_every": 2,
        "optimizer.schedule.warmup_steps": 0, "optimizer.learning_rate": 0.003,
    } | changes  # fmt: skip
    command = [f"--config=configs/dpo.py:{member}", f"--workdir={workdir}"]
    return run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())])


@pytest.fixture(scope="module")
def tuned(folder):
    assert _tune(folder, folder / "run") == 0
    return json.loads((folder / "run" / "results.json").read_text())


def _answers(stage, folder, split):
    """[pairs, 2] each: log-probability and length of each answer, from one full forward pass of each alone."""

    @jax.jit
    def log_probs(tokens):
        model = stage.functions.bind(stage.params, stage.buffers)
        return jax.nn.log_softmax(model.logits(model(tokens).hidden)[0])

    config = ConversationsConfig(source=str(folder / "pairs.jsonl"), held_out_share=0.2)
    texts = encode_preferences(read_preferences(config, split), load_tokenizer(folder / "tokenizer"), CHAT_FORMATS["lfm2"])
    sums, lengths = [], []
    for number in range(len(texts)):
        ids, trained = texts[number]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids) - 1] = ids[:-1]
        found = np.asarray(log_probs(padded))[np.arange(len(ids) - 1), ids[1:]]
        sums.append(found[trained[1:]].sum())
        lengths.append(trained[1:].sum())
    return np.reshape(sums, (-1, 2)), np.reshape(lengths, (-1, 2))


def test_figures_are_those_of_each_answer_alone(folder, tuned):
    stages = [load_stage(str(folder / name), ComputeConfig(), mesh_for(MeshConfig())) for name in ("model", "run")]
    (before, lengths), (after, _) = (_answers(stage, folder, "held_out") for stage in stages)
    margins = 5 * ((after - before) / lengths) @ np.array([1, -1])
    assert tuned["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-4)
    assert tuned["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert tuned["accuracy"] == np.mean(margins > 0) and tuned["held_out_pairs"] == len(margins)
    assert [tuned["chosen_log_prob_before"], tuned["rejected_log_prob_before"]] == pytest.approx(before.mean(axis=0), abs=1e-3)
    assert [tuned["chosen_length"], tuned["rejected_length"]] == pytest.approx(lengths.mean(axis=0))


def test_the_loss_begins_with_log_2_and_the_margin_rises(folder, tuned):
    losses = [record["train/loss"] for record in read_metrics(folder / "run") if "train/loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.02
    assert tuned["loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert tuned["reward_margin"] > 0.05 and tuned["kl_before"] == pytest.approx(0, abs=1e-6)


def test_it_begins_with_log_2_on_a_mesh_of_all_kinds(folder, tuned, tmp_path):
    changes = {"mesh.data": 2, "mesh.context": 2, "mesh.tensor": 2, "train.accumulation": 2}
    assert _tune(folder, tmp_path / "run", **changes) == 0
    one, other = (
        [record["train/loss"] for record in read_metrics(where) if "train/loss" in record]
        for where in (folder / "run", tmp_path / "run")
    )
    assert other[0] == pytest.approx(math.log(2), abs=1e-5) and other == pytest.approx(one, abs=1e-4)


def test_a_format_that_is_named_comes_with_the_tokenizer_from_then_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "fine_tune", lambda *_, **__: {})
    assert _tune(folder, tmp_path / "run", "simpo", **{"data.chat_format": "lfm2_5"}) == 0
    assert find_template("auto", epath.Path(tmp_path / "run" / "tokenizer")) is CHAT_FORMATS["lfm2_5"]


@pytest.mark.parametrize("part", [0, 1])
def test_each_pair_gets_its_own_reference_where_the_rows_of_hosts_interleave(monkeypatch, part):
    """Two hosts: of each four rows of a global batch the first one's are 0 and 3."""
    monkeypatch.setattr(step, "_parts", lambda mesh: (part, [(0, 3), (1, 2)]))
    monkeypatch.setattr(dpo, "place_batch", lambda batch, mesh: batch)
    first = itertools.count(0, 4)

    def log_probs_of(batch):
        """Of all hosts' rows: the pair's number and a half for the chosen answer, its negative for the rejected one."""
        fed = next(first) + np.arange(4)
        assert batch["number"].tolist() == [min(number, 6) for number in np.split(fed, 2)[part]]
        placed = fed[[0, 2, 3, 1], None] + 0.5
        return placed, -placed

    def make(places):
        mask = lambda place: np.ones(1) * (place is not None)
        return [{"number": 6 if each is None else each.row, "loss_mask": mask(each), "rejected_loss_mask": mask(each)}
                for each in places]  # fmt: skip

    found = dpo._reference(types.SimpleNamespace(counts=range(6), make=make), 4, log_probs_of, None)
    assert found.tolist() == [sign * (number + 0.5) for number in range(6) for sign in (1, -1)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reference": "none"}, "reference is 'none', but this loss has one"),
        ({"block": 0}, "block must be at least 1 token, got 0"),
        ({"loader.weights": "1,2"}, "loader.weights has 2 shares for 1 data.sources"),
        ({"loader.epochs": 1, "train.steps": 50}, "train.steps is 50, but loader.epochs=1 of the data make"),
        ({"loader.seq_len": 4}, "no pair has of both answers something in their first 4 tokens"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, changes, message):
    assert _tune(folder, tmp_path / "run", **changes) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_was_stopped_ends_as_one_that_was_not(folder, tuned, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.discard(newer_than=2)
    assert _tune(folder, tmp_path / "run") == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["resumed_at_step"] == 2 and again["loss"] == tuned["loss"] and again["reward_margin"] == tuned["reward_margin"]


def test_another_reference_is_computed_anew_and_a_run_does_not_go_on_with_it(folder, tuned, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run")
    pairs = folder / "pairs.jsonl"
    text = pairs.read_text()
    try:
        pairs.write_text("".join(text.splitlines(keepends=True)[:-6]))
        assert _tune(folder, tmp_path / "run") == 2
    finally:
        pairs.write_text(text)
    said = capsys.readouterr()
    assert "reference_pairs_train.npz is damaged, or of another model, other pairs or settings" in said.out
    assert "the state is of other batches" in said.err
