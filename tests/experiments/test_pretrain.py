"""The main job end to end, as a user runs it: on a folder of text, resumed after a kill, evaluated, exported, trained on from."""

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import Mesh

import run
from data_pipelines import LoaderConfig
from data_pipelines.loading.mixture import StageConfig
from experiments import pretrain, stages
from experiments.prepared_data import PreparedText
from experiments.stages import flops_by_step
from lfm_jax.configuration import ConfigError
from lfm_jax.models import ModelConfig
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.sharding import AXES, MeshConfig, aot

WORDS = "the cat sat on a mat and saw that dog run to red barn by old mill in warm sun with two small birds".split()
SMALL = [
    "--config=configs/pretrain.py:nano", "--config.model.vocab_size=300", "--config.model.embed_dim=32",
    "--config.model.layer_types=conv,full_attention", "--config.model.num_heads=2", "--config.model.num_kv_heads=1",
    "--config.model.head_dim=16", "--config.model.mlp_dim=64", "--config.tokenizer.vocab_size=300",
    "--config.loader.seq_len=32", "--config.loader.batch_size=8", "--config.train.steps=24", "--config.train.log_every=1",
    "--config.train.evaluate_every=10", "--config.train.checkpoint_every=5", "--config.sampling.max_new_tokens=8",
    "--config.prompts=the cat,a dog", "--config.optimizer.schedule.warmup_steps=2", "--config.data.held_out_share=0.2",
]  # fmt: skip


def sentences(seed):
    generator = np.random.default_rng(seed)
    return " ".join(" ".join(generator.choice(WORDS, generator.integers(3, 9))) + "." for _ in range(40))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for seed in range(60):
        (folder / f"{seed}.txt").write_text(sentences(seed))
    return folder


def command(text, workdir, *overrides):
    return [*SMALL, f"--config.data.source={text}", f"--workdir={workdir}", *overrides]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def losses(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    with contextlib.chdir(workdir.parent):
        assert run.main(command(text, workdir.name)) == 0
    return workdir


def test_the_figures_hang_together(trained, text):
    figures = results(trained)
    held_out = [file for file in text.iterdir() if file.read_text() in _held_out_texts(trained)]
    targets, text_bytes = figures["tokens"], sum(file.stat().st_size for file in held_out)
    assert 0 < len(held_out) < 60
    assert figures["bits_per_byte"] == pytest.approx(figures["nll_per_token"] * targets / math.log(2) / text_bytes)
    # Too few steps to beat the count models, which the quickstart does; but it has learnt.
    assert losses(trained)[24] < losses(trained)[1] - 0.3
    assert figures["bigram_bits_per_byte"] < figures["unigram_bits_per_byte"]
    assert figures["steps"] == 24 and figures["tokens_per_second"] > 0 and figures["resumed_at_step"] == 0
    assert sum(row["parameters"] for row in figures["parameter_audit"]) == figures["parameters"]
    assert figures["seconds"] == pytest.approx(sum(figures["seconds_by_part"].values()))
    assert set(figures["seconds_by_part"]) == {"tokens", "training", "evaluation", "samples", "export"}
    assert [sample["prompt"] for sample in figures["samples"]] == ["the cat", "a dog"]


def _held_out_texts(workdir):
    from data_pipelines import load_tokenizer, read_token_shards

    tokenizer = load_tokenizer(workdir / "tokenizer")
    shards = read_token_shards(workdir / "tokens" / "held_out", tokenizer)
    return {tokenizer.decode(list(shards[index])) for index in range(shards.documents)}


def test_a_run_leaves_what_the_readme_says(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "checkpoints", "config.json", "export", "goodput.jsonl", "loss.png", "metrics.jsonl", "model.json", "report.html",
        "results.json", "tensorboard", "tokenizer", "tokens",
    }  # fmt: skip


def test_the_export_is_read_by_transformers_to_the_same_end(trained):
    figures = results(trained)
    assert figures["hf_greedy_agrees"] is True and figures["hf_logit_difference"] < 2e-4
    rows = {row["file"]: row["bytes"] for row in figures["exports"]}
    assert {"export/hf/config.json", "export/hf/model.safetensors", "export/hf/tokenizer.json"} <= set(rows)
    assert rows["export/hf/model.safetensors"] == (trained / "export" / "hf" / "model.safetensors").stat().st_size


def test_evaluate_gives_the_runs_own_figures_from_the_workdir_and_from_the_export(trained, text, tmp_path):
    for number, stage in enumerate((trained, trained / "export" / "hf")):
        arguments = [
            "--config=configs/evaluate.py", f"--workdir={tmp_path / str(number)}", f"--config.init_from={stage}",
            f"--config.data.source={text}", "--config.data.held_out_share=0.2", "--config.seq_len=32", "--config.batch_size=8",
        ]  # fmt: skip
        assert run.main(arguments) == 0
        ours, theirs = results(tmp_path / str(number)), results(trained)
        assert ours["tokens"] == theirs["tokens"]
        assert ours["nll_per_token"] == pytest.approx(theirs["nll_per_token"], rel=1e-6)
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-6)


def test_export_in_bfloat16_in_shards(trained, tmp_path):
    arguments = [
        "--config=configs/export.py", f"--workdir={tmp_path}", f"--config.init_from={trained}", "--config.export.dtype=bfloat16",
        "--config.export.formats=hf", "--config.export.max_shard_bytes=20000", "--config.export.check_tokens=8",
    ]  # fmt: skip
    assert run.main(arguments) == 0
    figures = results(tmp_path)
    assert figures["hf_greedy_agrees"] is True and figures["hf_logit_difference"] < 2e-4
    assert sum("safetensors" in row["file"] for row in figures["exports"]) > 3


def test_a_trained_model_is_trained_on_from_a_workdir_and_from_a_folder(trained, text, tmp_path):
    expected = results(trained)["nll_per_token"]
    still = ["--config.train.steps=1", "--config.optimizer.learning_rate=1e-30", "--config.optimizer.schedule.warmup_steps=0"]
    for number, stage in enumerate((trained, trained / "export" / "hf")):
        workdir = tmp_path / str(number)
        assert run.main(command(text, workdir, f"--config.init_from={stage}", *still)) == 0
        assert results(workdir)["nll_per_token"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.init_from={trained}", "--config.model.mlp_dim=48"], "model.mlp_dim is 48, but 64 in init_from"),
        (["--config.init_from={text}"], "no model is there. Expected the workdir of a run (model.json and checkpoints/) or"),
        (["--config.model.vocab_size=290"], "the tokenizer has 300 ids, but model.vocab_size is 290; give the model as"),
        (["--config.data.source={text}/none"], "--config.data: source '{text}/none' does not exist; give a file, a folder"),
        (["--config.data.source={bad}"], "--config.data: 1 of 1 records are bad, 100.000% where 0.100% may be: no_utf8 1."),
        (["--config.tokenizer.vocab_size=4000"], "--config.data: the text is too small for 4000 ids"),
        (["--config.tokenizer_from={text}"], "--config.tokenizer_from: {text} holds no tokenizer; expected tokenizer.model or"),
        (["--config.mesh.data=3"], "--config.mesh: mesh data=3 x fsdp=2 needs 6 devices, 8 are there; set one"),
        (["--config.train.accumulation=2"], "--config.mesh: a batch of 8 rows does not divide into 2 micro-batches over 8"),
        (["--config.mesh.context=8", "--config.loader.seq_len=24"], "--config.mesh: a sequence of 24 does not divide into 2"),
        (["--config.loader.epochs=1", "--config.train.steps=999"], "train.steps is 999, but loader.epochs=1 of the text make"),
    ],
)
def test_a_mistake_is_told_in_one_paragraph(overrides, message, trained, text, tmp_path, capsys):
    names = {"trained": trained, "text": text, "bad": tmp_path / "bad"}
    names["bad"].mkdir()
    (names["bad"] / "0.txt").write_bytes(b"\xff")
    overrides = [override.format(**names) for override in overrides]
    assert run.main(command(text, tmp_path / "run", *overrides)) == 2
    shown = capsys.readouterr().err
    assert message.format(**names) in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.evaluation_batches=0", "evaluation_batches must be at least 1, or None, got 0"),
        ("--config.mesh.tensor=8", "--config.mesh: tensor=8 does not divide vocab = 300 of "),
    ],
)
def test_what_no_text_decides_is_told_before_there_is_any(override, message, text, tmp_path, capsys):
    assert run.main(command(text, tmp_path / "run", override)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_figures_of_sources_of_one_name_are_numbered(monkeypatch):
    found = iter(range(4))
    measured = lambda number: types.SimpleNamespace(measure=lambda *_, most_batches: {"nll": number})
    monkeypatch.setattr(pretrain, "HeldOut", lambda *_: measured(next(found)))
    paths = ("first/text", "second/text", "third/code", "fourth/text/")
    config = types.SimpleNamespace(loader=LoaderConfig(seq_len=8, batch_size=2), tokens_from=paths)
    text = PreparedText(None, [], [None] * 4)
    figures = pretrain._measure(config, text, None, None)(None, None, None)
    assert figures == {"nll": 0, "nll_of_text_1": 1, "nll_of_code": 2, "nll_of_text_3": 3}


def test_flops_are_those_of_the_rows_of_a_step():
    model = ModelConfig(
        vocab_size=31, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
    )
    stages_of = (StageConfig(from_step=3, seq_len=64), StageConfig(from_step=5, batch_size=4))
    flops = flops_by_step(model, LoaderConfig(seq_len=32, batch_size=8, stages=stages_of))
    short, long = (training_flops_per_token(model, length) for length in (32, 64))
    assert short < long and [flops(step) for step in range(1, 8)] == [short] * 3 + [long] * 4


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda stage: (stage / "model.json").write_text("{}"), "stage/model.json: embed_dim, layer_types, num_heads"),
        (lambda stage: (stage / "model.json").write_text("{"), "stage/model.json: Expecting property name"),
        (lambda stage: shutil.rmtree(stage / "checkpoints"), "the run has no checkpoint yet"),
        (lambda stage: shutil.rmtree(stage / "tokenizer"), "holds no tokenizer"),
    ],
)
def test_a_damaged_stage_is_told_in_one_paragraph(damage, message, trained, text, tmp_path, capsys):
    stage = shutil.copytree(trained, tmp_path / "stage")
    damage(stage)
    arguments = ["--config=configs/export.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={stage}"]
    assert run.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_sequence_that_an_evaluation_cannot_split_is_told_in_one_paragraph(trained, text, tmp_path, capsys):
    """Nobody asks before the first batch is placed."""
    arguments = [
        "--config=configs/evaluate.py", f"--workdir={tmp_path / 'run'}", f"--config.init_from={trained}",
        f"--config.data.source={text}", "--config.data.held_out_share=0.2", "--config.mesh.context=8", "--config.seq_len=24",
    ]  # fmt: skip
    assert run.main(arguments) == 2
    shown = capsys.readouterr().err
    assert "a sequence of 24 does not divide" in shown and "--config.mesh.context" in shown and shown.count("\n") == 1


def test_hosts_that_share_a_part_of_the_rows_are_a_mistake_in_the_mesh(monkeypatch):
    pytest.importorskip("libtpu")
    devices = sorted(aot.tpu_devices("v5e:4x4"), key=lambda device: (device.process_index, device.id))[:12]
    mesh = Mesh(np.asarray(devices).reshape(2, 1, 1, 6, 1), AXES)  # the second of three hosts has devices of both halves
    monkeypatch.setattr(stages, "make_mesh", lambda config: mesh)
    with pytest.raises(ConfigError, match="--config.mesh: some of 3 hosts share a part of their rows"):
        stages.mesh_for(MeshConfig(), 8)


# The kill may come in the middle of a save, and the resumed run then says that this one is not used.
@pytest.mark.filterwarnings("ignore:.*its save did not come to an end:lfm_jax.training.checkpoint.CheckpointWarning")
def test_a_killed_run_resumes_by_the_same_command_bit_for_bit(trained, text, tmp_path):
    """SIGKILL, at whatever it was doing after its second checkpoint."""
    workdir = tmp_path / "killed"
    arguments = [sys.executable, "run.py", *command(text, workdir)]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < 11:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "results.json").exists()
    assert run.main(command(text, workdir)) == 0
    assert results(workdir)["resumed_at_step"] in (5, 10, 15, 20)
    assert losses(workdir) == losses(trained)
    assert results(workdir)["nll_per_token"] == results(trained)["nll_per_token"]


def test_a_run_needs_no_network_and_no_tensorflow(text, tmp_path):
    """In a process of its own, cut off from the network, that says at its end what it has imported."""
    unshare = ["unshare", "-n"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this user may not cut a process off from the network (unshare -n)")
    code = (
        f"import sys, run; code = run.main({command(text, tmp_path, '--config.train.steps=2')!r})\n"
        "print(sorted(name for name in ('tensorflow', 'clu', 'ray') if name in sys.modules), file=sys.stderr); sys.exit(code)"
    )
    ended = subprocess.run([*unshare, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr.splitlines()[-1] == "[]", ended.stderr
