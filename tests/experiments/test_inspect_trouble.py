"""The row and the document that led to trouble are found, with their texts; a run without trouble is said to be one."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT

from data_pipelines import load_tokenizer
from experiments.stages import model_functions
from lfm_jax.configuration import from_mapping
from lfm_jax.models import ComputeConfig, ModelConfig
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import Checkpoints, LossConfig, abstract_state, evaluate_loss, make_eval_step, next_token_objective

ODD = "QQ zz QQ zz QQ zz"


def _run(*arguments):
    return subprocess.run([sys.executable, ROOT / "run.py", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on one kind of text."""
    folder = tmp_path_factory.mktemp("trouble")
    lines = [json.dumps({"text": f"the quick brown fox {number % 7} jumps. " * 4}) for number in range(120)]
    (folder / "text.jsonl").write_text("\n".join([*lines, json.dumps({"text": ODD})]))
    result = _run(
        "--config=configs/pretrain.py", f"--workdir={folder}/run", f"--config.data.source={folder}/text.jsonl",
        "--config.data.held_out_share=0.2", "--config.tokenizer.vocab_size=320", "--config.loader.seq_len=64",
        "--config.loader.batch_size=8", "--config.train.steps=24", "--config.train.checkpoint_every=8",
        "--config.optimizer.schedule.warmup_steps=1", "--config.optimizer.learning_rate=0.01", "--config.model.vocab_size=320",
        "--config.model.layer_types=conv,full_attention", "--config.model.embed_dim=32", "--config.model.mlp_dim=48",
        "--config.export=None", "--config.prompts=[]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


def _batch(tokenizer, texts):
    """A row for each tuple of texts, packed."""
    batch = {name: np.zeros((len(texts), 64), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((len(texts), 64), np.float32)
    for row, documents in enumerate(texts):
        used = 0
        for number, text in enumerate(documents, 1):
            ids = [tokenizer.bos_id, *tokenizer.encode(text)[:28], tokenizer.eos_id]
            here = slice(used, used + len(ids) - 1)
            batch["tokens"][row, here], batch["targets"][row, here] = ids[:-1], ids[1:]
            batch["segment_ids"][row, here], batch["positions"][row, here] = number, np.arange(len(ids) - 1)
            batch["loss_mask"][row, here] = 1
            used += len(ids) - 1
    return batch


@pytest.fixture
def troubled(trained, tmp_path):
    """The run, as if two processes had kept batches of a spike at step 10 and of a NaN at step 20."""
    usual = "the quick brown fox 3 jumps. the quick brown fox 3 jumps."
    tokenizer = load_tokenizer(trained / "tokenizer")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tokenizer", "model.json", "checkpoints"):
        (run / name).symlink_to(trained / name)
    record = {"time": 1.0, "gradient_norm": 9.0, "usual_loss": 3.0, "usual_gradient_norm": 2.0}
    lines = [
        {"step": 20, "batch": 21, "action": "skip", "loss": "nan", **record},
        {"step": 10, "batch": 10, "action": "report", "loss": 1.0, **record},
        {"step": 10, "batch": 10, "action": "skip", "loss": 4.0, **record},  # again, after a restart
    ]
    (run / "trouble.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    batches = [_batch(tokenizer, [(usual, usual)] * 3), _batch(tokenizer, [(usual, usual), (usual, ODD), (usual, usual)])]
    for step in (10, 20):
        folder = run / "trouble" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for process, batch in enumerate(batches):
            if step == 20 and process == 0:
                batch = {**batch, "loss_mask": np.where(np.arange(3)[:, None] == 2, np.float32(np.nan), batch["loss_mask"])}
            np.savez_compressed(folder / f"process-{process}.npz", **batch)
    return run


def _inspected(run, workdir, *more):
    result = _run("--config=configs/inspect_trouble.py", f"--workdir={workdir}", f"--config.run={run}", *more)
    assert result.returncode == 0, result.stderr
    return json.loads((workdir / "results.json").read_text()), result.stdout


def test_the_odd_row_and_document_stand_out(troubled, tmp_path):
    results, printed = _inspected(troubled, tmp_path / "out", "--config.samples=2")
    assert results["troubled_steps"] == 2
    spike, number = results["steps"]
    assert (spike["step"], spike["action"], spike["loss"], spike["usual_loss"], spike["rows"]) == (10, "skip", 4.0, 3.0, 6)
    assert spike["worst_row"] == "1:1" and spike["checkpoint"] == 8 and spike["begins"].startswith("QQ zz")
    assert spike["worst_row_loss"] > spike["median_row_loss"]
    usual, odd = spike["documents"]
    assert odd["loss"] > usual["loss"] + 1 and odd["begins"].startswith("QQ zz") and odd["targets"] > 0
    mean = (usual["loss"] * usual["targets"] + odd["loss"] * odd["targets"]) / (usual["targets"] + odd["targets"])
    assert spike["worst_row_loss"] == pytest.approx(mean, rel=1e-5)
    # A loss that is no number comes before the highest.
    assert number["worst_row"] == "0:2" and number["worst_row_loss"] == "nan" and number["checkpoint"] == 16
    assert (number["batch"], number["loss"]) == (21, "nan")
    page = (tmp_path / "out" / "samples.html").read_text()
    assert "step 10, process 1, row 1, loss" in page and "step 20, process 0, row 2, loss nan" in page and "[end]" in page
    assert page.count(", process ") == 4 and "QQ zz" in printed


def test_the_loss_is_that_of_the_models_own_evaluation(troubled, tmp_path):
    """Of the usual rows under the checkpoint of step 8: another way of computing it, block by block over whole batches."""
    results, _ = _inspected(troubled, tmp_path / "out")
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    functions = model_functions(from_mapping(ModelConfig, json.loads((troubled / "model.json").read_text())), ComputeConfig())
    wanted = abstract_state(functions, optax.identity(), mesh)
    state = Checkpoints(troubled / "checkpoints").restore(wanted, partial=True, at_most=9).state
    step = make_eval_step(functions, next_token_objective(LossConfig(block=16)), mesh)
    with np.load(troubled / "trouble" / "step-00000010" / "process-0.npz") as kept:
        totals = evaluate_loss(step, state.params, state.buffers, [dict(kept)], mesh)
    assert results["steps"][0]["median_row_loss"] == pytest.approx(totals.nll_per_token, rel=1e-5)


def test_without_a_checkpoint_from_before_the_texts_are_shown_alone(troubled, tmp_path):
    (troubled / "checkpoints").unlink()
    results, _ = _inspected(troubled, tmp_path / "out", "--config.samples=6")
    (spike, _) = results["steps"]
    assert spike["checkpoint"] is None and "worst_row_loss" not in spike and spike["worst_row"] == "0:0"
    assert "QQ zz" in (tmp_path / "out" / "samples.html").read_text()


def test_a_run_without_trouble_is_said_to_be_one(trained, tmp_path):
    results, printed = _inspected(trained, tmp_path / "out")
    assert f"No step of {trained} was troubled" in printed.replace("\n", "")
    assert results["troubled_steps"] == 0 and results["steps"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "tokenizer").unlink(), "is no workdir of a training run: it has no tokenizer/."),
        (lambda run: (run / "model.json").unlink(), "model.json cannot be read"),
        (lambda run: _damaged(run), "none of the checkpoints in"),
    ],
)
def test_what_cannot_be_read_is_said(troubled, tmp_path, change, message):
    change(troubled)
    result = _run("--config=configs/inspect_trouble.py", f"--workdir={tmp_path}/out", f"--config.run={troubled}")
    assert result.returncode == 2 and message in result.stderr


def _damaged(run):
    (run / "checkpoints").unlink()
    (run / "checkpoints" / "00000008" / "state").mkdir(parents=True)
    (run / "checkpoints" / "00000008" / "manifest.json").write_text("{}")


def test_a_negative_number_of_samples_is_refused(trained, tmp_path):
    result = _run(
        "--config=configs/inspect_trouble.py", f"--workdir={tmp_path}/out", f"--config.run={trained}", "--config.samples=-1"
    )
    assert result.returncode == 2 and "samples must not be negative, got -1" in result.stderr
