"""From tasks to conversations to a fine-tuned model, as a user does it, and what is refused on the way."""

import json

import jax
import numpy as np
import pytest
from etils import epath

import run
from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations import CHAT_FORMATS, ConversationEncoder, ConversationsConfig, read_conversations
from data_pipelines.tasks import task_named
from experiments.conversations import ConversationSources, find_template
from experiments.stages import load_stage, mesh_for
from lfm_jax.interop import export_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig

MODEL = ModelConfig(
    vocab_size=448, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and conversations of two tasks."""
    folder = tmp_path_factory.mktemp("sft")
    assert run.main([
        "--config=configs/task_data.py", f"--workdir={folder}/tasks", "--config.tasks=arithmetic,word_problems",
        "--config.conversations=60", "--config.difficulties=1,2",
    ]) == 0  # fmt: skip
    texts = [(folder / "tasks" / "conversations" / f"{name}.jsonl").read_text() for name in ("arithmetic", "word_problems")]
    train_tokenizer(TokenizerConfig(vocab_size=440), [Document(text, "a") for text in texts], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(0))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    return folder


def _sources(folder):
    return ",".join(str(folder / "tasks" / "conversations" / f"{name}.jsonl") for name in ("arithmetic", "word_problems"))


def _tune(folder):
    settings = {
        "init_from": f"{folder}/model", "data.sources": _sources(folder), "data.held_out_share": 0.2, "loader.seq_len": 256,
        "loader.batch_size": 8, "train.steps": 4, "train.evaluate_every": 4, "train.checkpoint_every": 4,
        "optimizer.schedule.warmup_steps": 1, "optimizer.learning_rate": 0.01,
    }  # fmt: skip
    command = ["--config=configs/sft.py", f"--workdir={folder}/run"]
    assert run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())]) == 0


@pytest.fixture(scope="module")
def tuned(folder):
    _tune(folder)
    return json.loads((folder / "run" / "results.json").read_text())


def _nll(stage, encoder, path):
    """Of what assistants say in the held-out conversations of a file: each text alone, in one forward pass of its own."""

    @jax.jit
    def log_probs(tokens):
        model = stage.functions.bind(stage.params, stage.buffers)
        return jax.nn.log_softmax(model.logits(model(tokens).hidden)[0])

    config = ConversationsConfig(source=str(path), held_out_share=0.2)
    total = count = 0
    for texts in encoder.examples(list(read_conversations(config, "held_out"))):
        for ids, trained in texts:
            ids, trained = ids[:257], trained[:257]
            padded = np.zeros((1, 256), np.int32)
            padded[0, : len(ids) - 1] = ids[:-1]
            found = np.asarray(log_probs(padded))[np.arange(len(ids) - 1), ids[1:]]
            total -= float(found[trained[1:]].sum())
            count += int(trained[1:].sum())
    return total / count


def test_figures_are_of_what_assistants_say_in_conversations_that_are_held_out(folder, tuned):
    stages = {name: load_stage(str(folder / name), ComputeConfig(), mesh_for(MeshConfig())) for name in ("model", "run")}
    encoder = ConversationEncoder(load_tokenizer(folder / "tokenizer"), CHAT_FORMATS["lfm2"])
    for name in ("arithmetic", "word_problems"):
        path = folder / "tasks" / "conversations" / f"{name}.jsonl"
        assert tuned[f"nll_per_token_of_{name}_before"] == pytest.approx(_nll(stages["model"], encoder, path), abs=1e-4)
        assert tuned[f"nll_per_token_of_{name}"] == pytest.approx(_nll(stages["run"], encoder, path), abs=1e-4)
    both = [tuned[f"nll_per_token_of_{name}"] for name in ("arithmetic", "word_problems")]
    assert tuned["nll_per_token"] == pytest.approx(np.mean(both)) and tuned["nll_per_token"] < tuned["nll_per_token_before"] - 0.3
    assert tuned["conversations"] == sum(source["conversations"] for source in tuned["sources"]) < 120


def test_the_same_command_finds_it_done(folder, tuned, capsys):
    _tune(folder)
    again = json.loads((folder / "run" / "results.json").read_text())
    assert again["resumed_at_step"] == 4 and again["nll_per_token"] == tuned["nll_per_token"]


def test_rows_are_shown_with_what_is_trained(folder, capsys):
    assert run.main([
        "--config=configs/inspect_conversations.py", f"--workdir={folder}/rows", f"--config.init_from={folder}/model",
        f"--config.data.sources={_sources(folder)}", "--config.rows=3", "--config.loader.seq_len=128",
        "--config.loader.batch_size=2",
    ]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("<|im_start|>assistant") >= 3 and "Answer: " in shown
    assert "Answer: " in (folder / "rows" / "rows.html").read_text()
    figures = json.loads((folder / "rows" / "results.json").read_text())
    assert 0 < figures["trained_tokens"] < figures["tokens"]


def test_what_is_written_of_tasks_is_solved_and_of_its_split(folder, tmp_path):
    task = task_named("arithmetic")
    assert run.main([
        "--config=configs/task_data.py", f"--workdir={tmp_path}", "--config.tasks=arithmetic", "--config.conversations=20",
        "--config.split=held_out", "--config.seed=7",
    ]) == 0  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "conversations" / "arithmetic.jsonl").read_text().splitlines()]
    assert len(records) == 20 and {record["difficulty"] for record in records} == set(range(1, task.max_difficulty + 1))
    for record in records:
        problem = task.sample(record["seed"], record["difficulty"], "held_out")
        assert record["messages"][:-1] == problem.messages
        assert task.score(record["messages"][-1]["content"], record["reference"])["correct"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.chat_format": "lfm3"}, "chat_format 'lfm3' is neither a format nor a file *.jinja that is there"),
        ({"data.sources": "nowhere.jsonl"}, "--config.data.sources: "),
        ({"data.held_out_share": "0"}, "held_out_share must be above 0 and below 1, got 0"),
        ({"loader.weights": "1"}, "loader.weights has 1 shares for 2 data.sources"),
        ({"loader.epochs": "1"}, "train.steps is 300, but loader.epochs=1 of the data make"),
        ({"data.bad_records_limit": "2"}, "bad_records_limit must be a share from 0 to 1, got 2"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, changes, message):
    settings = {"init_from": f"{folder}/model", "data.sources": _sources(folder), "loader.seq_len": "256"} | changes
    command = ["--config=configs/sft.py", f"--workdir={tmp_path}/run"]
    assert run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())]) == 2
    assert message in capsys.readouterr().err


def test_bad_records_beyond_the_limit_end_it_and_are_listed(folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n' * 3)
    command = ["--config=configs/sft.py", f"--workdir={tmp_path}/run", f"--config.init_from={folder}/model"]
    assert run.main([*command, f"--config.data.sources={tmp_path}/bad.jsonl"]) == 2
    assert "--config.data.sources: " in capsys.readouterr().err


def test_other_mistakes_of_settings():
    with pytest.raises(ValueError, match="sources is empty; give files of conversations"):
        ConversationSources(sources=())
    assert ConversationSources(sources=("a/b.jsonl", "c/b.jsonl.zst", "d/")).names == ["b_0", "b_1", "d"]


def test_templates_are_found(folder, tmp_path):
    assert find_template("auto", epath.Path(folder / "model")) is CHAT_FORMATS["lfm2"]
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert find_template(str(tmp_path / "own.jinja"), epath.Path(folder)).source == "{{ messages }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}", "bos_token": "<s>"}))
    found = find_template("auto", epath.Path(tmp_path))
    assert found.source == "{{ bos_token }}" and found.special_tokens["bos_token"] == "<s>"
    assert found.special_tokens["eos_token"] == "<|im_end|>"
