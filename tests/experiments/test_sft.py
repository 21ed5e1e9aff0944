"""From tasks to conversations to a fine-tuned model, as a user does it, and what is refused on the way."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

import run
from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from data_pipelines.conversations import CHAT_FORMATS, ConversationEncoder, ConversationsConfig, read_conversations
from data_pipelines.tasks import task_named
from experiments import fine_tuning, sft
from experiments.conversations import ConversationSources, find_template
from experiments.stages import load_stage, mesh_for
from lfm_jax.configuration import ConfigError
from lfm_jax.interop import GenerationSettings, export_folder
from lfm_jax.interop.tokenizer_json import write_tokenizer
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


def _tune(folder, name="run", flags=(), **changes):
    settings = {
        "init_from": f"{folder}/model", "data.sources": _sources(folder), "data.held_out_share": 0.2, "loader.seq_len": 256,
        "loader.batch_size": 8, "train.steps": 4, "train.evaluate_every": 4, "train.checkpoint_every": 4,
        "optimizer.schedule.warmup_steps": 1, "optimizer.learning_rate": 0.01,
    } | changes  # fmt: skip
    command = ["--config=configs/sft.py", f"--workdir={folder}/{name}", *flags]
    return run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())])


@pytest.fixture(scope="module")
def tuned(folder):
    assert _tune(folder) == 0
    return json.loads((folder / "run" / "results.json").read_text())


ADAPTERS = {"low_rank.rank": 4, "train.checkpoint_every": 2, "export.formats": "hf"}


@pytest.fixture(scope="module")
def adapted(folder):
    """The figures. Of the export what it writes first alone: reading that in transformers belongs to other tests."""

    def export(config, stage, workdir):
        export_folder(stage.config, stage.params, stage.buffers, workdir / "exported", tokenizer=stage.tokenizer_path)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "export_and_check", export)
        assert _tune(folder, "adapted", **ADAPTERS) == 0
        return json.loads((folder / "adapted" / "results.json").read_text())


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
    assert _tune(folder) == 0
    again = json.loads((folder / "run" / "results.json").read_text())
    assert again["resumed_at_step"] == 4 and again["nll_per_token"] == tuned["nll_per_token"]


def test_adapters_learn_and_whoever_loads_them_has_the_merged_model(folder, adapted, capsys):
    loaded = load_stage(str(folder / "adapted"), ComputeConfig(), mesh_for(MeshConfig(fsdp=2, tensor=2, data=2)))
    assert "adapted has adapters of rank 4 beside its model: they are merged into it" in capsys.readouterr().out
    encoder = ConversationEncoder(load_tokenizer(folder / "tokenizer"), CHAT_FORMATS["lfm2"])
    for name in ("arithmetic", "word_problems"):
        nll = _nll(loaded, encoder, folder / "tasks" / "conversations" / f"{name}.jsonl")
        assert adapted[f"nll_per_token_of_{name}"] == pytest.approx(nll, abs=1e-4)
        assert nll < adapted[f"nll_per_token_of_{name}_before"] - 0.05
    # Of the convolution in and out, of the attention q, k, v and out, of two feed-forwards gate, up and down: inputs + outputs.
    assert adapted["trained_parameters"] == 4 * (128 + 64 + 64 + 48 + 48 + 64 + 2 * 3 * 96)
    before, exported = (
        load_stage(str(folder / path), ComputeConfig(), mesh_for(MeshConfig())).params for path in ("model", "adapted/exported")
    )
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-7), loaded.params, exported)
    np.testing.assert_array_equal(exported["embed"]["embedding"], before["embed"]["embedding"])
    assert np.abs(exported["layers"][1]["mlp"]["down"] - before["layers"][1]["mlp"]["down"]).max() > 1e-3


def test_adapters_that_are_interrupted_end_as_they_would_have(folder, adapted, monkeypatch):
    monkeypatch.setattr(fine_tuning, "export_and_check", lambda config, stage, workdir: {})
    find = lambda: load_stage(str(folder / "adapted"), ComputeConfig(), mesh_for(MeshConfig())).params
    expected = find()
    shutil.rmtree(folder / "adapted" / "checkpoints" / "00000004")
    assert _tune(folder, "adapted", **ADAPTERS) == 0
    again = json.loads((folder / "adapted" / "results.json").read_text())
    assert again["resumed_at_step"] == 2 and again["nll_per_token"] == adapted["nll_per_token"]
    assert again["nll_per_token_before"] == adapted["nll_per_token_before"]
    jax.tree.map(np.testing.assert_array_equal, find(), expected)


def test_checkpoints_are_not_read_with_other_settings_than_they_were_made_with(folder, tuned, adapted, tmp_path, capsys):
    """Nor where a change of settings is allowed."""
    cases = [
        ("run", ADAPTERS, "were made with None, not with LowRankConfig(rank=4"),
        ("adapted", {}, "were made with LowRankConfig(rank=4, alpha=32.0"),
        ("adapted", ADAPTERS | {"low_rank.alpha": 8}, "were made with LowRankConfig(rank=4, alpha=32.0"),
    ]
    for name, changes, message in cases:
        assert _tune(folder, name, ["--allow_config_change"], **changes) == 2
        told = capsys.readouterr().err
        assert "--config.low_rank: the checkpoints in " in told and message in told
    settings = json.loads((folder / "adapted" / "low_rank.json").read_text())
    assert settings["alpha"] == 32 and not (folder / "run" / "low_rank.json").exists()
    shutil.copytree(folder / "adapted", tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoints", "export"))
    (tmp_path / "broken" / "low_rank.json").write_text('{"rank": 0}')
    with pytest.raises(ConfigError, match="low_rank.json: .*rank must be at least 1, got 0"):
        load_stage(str(tmp_path / "broken"), ComputeConfig(), mesh_for(MeshConfig()))


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
        ({"low_rank.targets": "gate_proj"}, "--config.low_rank: targets: the model has no matrix 'gate_proj'; it has down, gate"),
        ({"train.keep_best": "1", "train.best_by": "nll_per_tokn"}, "best_by: the evaluation has no figure 'nll_per_tokn'. Did"),
        ({"low_rank.rank": "0"}, "low_rank: rank must be at least 1, got 0"),
        ({"low_rank.rank": "2", "optimizer.matrices": "muon"}, "--config.low_rank: muon is for the update of a whole matrix"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, capsys, changes, message):
    settings = {"init_from": f"{folder}/model", "data.sources": _sources(folder), "loader.seq_len": "256"} | changes
    command = ["--config=configs/sft.py", f"--workdir={tmp_path}/run"]
    assert run.main([*command, *(f"--config.{name}={value}" for name, value in settings.items())]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stage, data", [("sft", "data.sources"), ("dpo", "data.sources"), ("ftpo", "pairs")])
def test_an_evaluation_of_no_batches_is_refused(stage, data, tmp_path, capsys):
    given = [f"--config=configs/{stage}.py", f"--workdir={tmp_path}/run", "--config.init_from=model", f"--config.{data}=a.jsonl"]
    assert run.main([*given, "--config.evaluation_batches=0"]) == 2
    assert "evaluation_batches must be at least 1, or None, got 0" in capsys.readouterr().err


def test_bad_records_beyond_the_limit_end_it_and_are_listed(folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n' * 3)
    command = ["--config=configs/sft.py", f"--workdir={tmp_path}/run", f"--config.init_from={folder}/model"]
    assert run.main([*command, f"--config.data.sources={tmp_path}/bad.jsonl"]) == 2
    assert "--config.data.sources: " in capsys.readouterr().err


def test_other_mistakes_of_settings():
    with pytest.raises(ValueError, match="sources is empty; give files of conversations"):
        ConversationSources(sources=())
    assert ConversationSources(sources=("a/b.jsonl", "c/b.jsonl.zst", "d/")).names == ["b_0", "b_1", "d"]


@pytest.mark.parametrize("chat_format", [*CHAT_FORMATS, "own.jinja"])
def test_a_format_that_is_named_comes_with_the_tokenizer_from_then_on(folder, tmp_path, monkeypatch, chat_format):
    """Read by the next stage, and from an export."""
    (tmp_path / "own.jinja").write_text(
        "{% for each in messages %}{{ each.role + ':' + each.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "fine_tune", lambda *_, **__: {})
    before = epath.Path(shutil.copytree(folder / "tokenizer", tmp_path / "before"))
    (before / "chat_template.jinja").write_text("of an earlier stage")
    stage = load_stage(str(folder / "model"), ComputeConfig(), mesh_for(MeshConfig()))
    stage = stage._replace(tokenizer=load_tokenizer(before), tokenizer_path=before)
    monkeypatch.setattr(fine_tuning, "load_stage", lambda *_: stage)
    assert _tune(folder, f"named_{chat_format}", **{"data.chat_format": chat_format}) == 0
    kept = epath.Path(folder) / f"named_{chat_format}" / "tokenizer"
    given = find_template(chat_format, kept)
    write_tokenizer(kept, tmp_path, GenerationSettings())
    for place in (kept, tmp_path / "tokenizer.json"):
        found = find_template("auto", epath.Path(place))
        messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        assert found.render_many([(messages, (), False)]) == given.render_many([(messages, (), False)])
        assert found is given or found.source == given.source


def test_templates_are_found(folder, tmp_path):
    assert find_template("auto", epath.Path(folder / "model")) is CHAT_FORMATS["lfm2"]
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert find_template(str(tmp_path / "own.jinja"), epath.Path(folder)).source == "{{ messages }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}", "bos_token": "<s>"}))
    found = find_template("auto", epath.Path(tmp_path))
    assert found.source == "{{ bos_token }}" and found.special_tokens["bos_token"] == "<s>"
    assert found.special_tokens["eos_token"] == "<|im_end|>"
    assert find_template(str(tmp_path / "own.jinja"), epath.Path(tmp_path)).special_tokens == found.special_tokens
