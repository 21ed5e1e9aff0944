"""Fine-tuning and both kinds of preference optimisation on two processes of a device each are those of one with two devices."""

import json
import sys

import jax
import numpy as np
import pytest
from tasks_of_slurm import run_tasks

from data_pipelines import Document, TokenizerConfig, load_tokenizer, train_tokenizer
from experiments.results import read_results
from experiments.stages import load_stage
from lfm_jax.interop import export_folder, import_folder
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, functional
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import read_metrics

pytestmark = pytest.mark.heavy
MODEL = ModelConfig(
    vocab_size=320, embed_dim=32, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
    context_length=128,
)  # fmt: skip
# As run.py is started, but one stage after the other in the same processes, which join once.
CODE = """
import functools, sys
import run
from lfm_jax.sharding import distributed

distributed.join = functools.cache(distributed.join)
sys.exit(max(run.main(stage.split()) for stage in sys.argv[1:]))
"""
STAGES = {
    "sft": {"data.sources": "conversations.jsonl", "data.held_out_share": 0.2, "export.formats": "hf", "export.check_tokens": 0},
    "dpo": {"data.sources": "pairs.jsonl", "data.held_out_share": 0.2},
    "ftpo": {"pairs": "loops.jsonl", "held_out_share": 0.3, "flatten": 0.0, "low_rank.rank": 4},
}
COMMON = {
    "loader.seq_len": 64, "loader.batch_size": 8, "train.steps": 4, "train.log_every": 1, "train.evaluate_every": 4,
    "train.checkpoint_every": 2, "optimizer.schedule.warmup_steps": 0, "optimizer.learning_rate": 0.003,
    "optimizer.eps": 1e-4,  # else Adam makes of what rounding leaves of a small gradient as large a step as of any other
}  # fmt: skip


def write_data(folder):
    """A model of random weights; conversations, pairs of answers, and places where a text goes on in a loop, by questions."""
    pairs = [
        {"prompt": [{"role": "user", "content": f"{a} or {b}?"}], "chosen": f"The greater is {b}.", "rejected": f"{a}"}
        for a in range(8) for b in range(10, 16)
    ]  # fmt: skip
    train_tokenizer(TokenizerConfig(vocab_size=310), [Document(json.dumps(pairs) * 3, "a")], folder / "tokenizer")
    params, buffers = functional(lambda rngs: Decoder(MODEL, rngs=rngs)).init(jax.random.key(0))
    export_folder(MODEL, params, buffers, folder / "model", tokenizer=folder / "tokenizer")
    fingerprint, rng = load_tokenizer(folder / "model").fingerprint, np.random.default_rng(0)
    answered = [{"messages": [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]} for pair in pairs]
    token = lambda: {"token": int(rng.integers(20, 300))}
    loops = [
        {"messages": pair["prompt"], "prefix_ids": [1, *rng.integers(20, 300, 9).tolist()], "rejected": token(),
         "chosen": [token(), token()], "tokenizer": fingerprint}
        for pair in pairs
    ]  # fmt: skip
    for name, records in (("conversations", answered), ("pairs", pairs), ("loops", loops)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """one and two: for each stage the workdir of a run that has ended."""
    folder = tmp_path_factory.mktemp("fine_tuning_two_processes")
    write_data(folder)
    for name, processes in (("one", 1), ("two", 2)):
        stages = []
        for stage, settings in STAGES.items():
            files = {field: f"{folder}/{value}" for field, value in settings.items() if str(value).endswith(".jsonl")}
            given = {"init_from": f"{folder}/model", **COMMON, **settings, **files}
            options = [f"--config.{field}={value}" for field, value in given.items()]
            stages.append(" ".join([f"--config=configs/{stage}.py", f"--workdir={folder / name / stage}", *options]))
        codes, logs = run_tasks([sys.executable, "-c", CODE, *stages], folder, name, processes)
        assert codes == [0] * processes, logs
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_figures_are_those_of_one_process(folder, stage):
    """But for clocks, and for what several processes leave to one. Sums of gradients come in another order."""
    one, two = (read_metrics(folder / name / stage) for name in ("one", "two"))
    losses = [[record["train/loss"] for record in records if "train/loss" in record] for records in (one, two)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    expected, found = (read_results(folder / name / stage) for name in ("one", "two"))
    assert found.keys() == expected.keys()
    of_one = lambda name: "second" in name or name.startswith("hf_")
    figures = [name for name, value in expected.items() if isinstance(value, float) and not of_one(name)]
    assert figures
    assert [found[name] for name in figures] == pytest.approx([expected[name] for name in figures], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_whoever_goes_on_from_it_has_the_model_of_one_process(folder, stage):
    """Merged, where adapters were trained."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    start, one, two = (
        load_stage(str(folder / name), ComputeConfig(), mesh).params for name in ("model", f"one/{stage}", f"two/{stage}")
    )
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, one, rtol=0, atol=1e-5), one, two)
    moved = jax.tree.leaves(jax.tree.map(lambda one, two: float(abs(one - two).max()), start, two))
    assert max(moved) > 1e-3


def test_the_export_is_the_model_and_is_made_once(folder):
    stage = load_stage(str(folder / "two" / "sft"), ComputeConfig(), make_mesh(MeshConfig(), jax.devices()[:1]))
    exported = import_folder(folder / "two" / "sft" / "export" / "hf").params
    jax.tree.map(np.testing.assert_array_equal, exported, stage.params)
    assert "results.json" in (folder / "two-0.log").read_text() and "results.json" not in (folder / "two-1.log").read_text()
