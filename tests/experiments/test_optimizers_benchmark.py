"""The comparison of optimizers, in small, and how it counts tokens to the same loss."""

import json

import numpy as np
import pytest
from etils import epath

from data_pipelines import DocumentsConfig, LoaderConfig, TokenizerConfig
from experiments.benchmarks import optimizers
from experiments.benchmarks.optimizers import Arm, Config, tokens_to
from lfm_jax.models import ModelConfig
from lfm_jax.training import OptimizerConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=512, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32
)


def _config(folder, **changes):
    words = np.random.default_rng(0).choice(["salt", "tide", "lamp", "rope", "keel", "gull"], (40, 200))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(row)}) for row in words))
    settings = {
        "arms": (Arm(name="adamw", rates=(1e-3, 1e-2)),
                 Arm(name="muon", rates=(1e-2,), shorter=(0.5,), optimizer=OptimizerConfig(matrices="muon"))),
        "model": MODEL, "data": DocumentsConfig(source=str(folder / "text.jsonl"), held_out_share=0.2),
        "tokenizer": TokenizerConfig(vocab_size=300), "loader": LoaderConfig(seq_len=32, batch_size=2),
        "train": TrainConfig(steps=6, evaluate_every=3, checkpoint_every=6), "seeds": 1, "evaluation_batches": 2,
    }  # fmt: skip
    return Config(**settings | changes)


@pytest.mark.heavy
def test_runs_are_compared_and_kept(tmp_path, monkeypatch):
    """Two rates and a shorter run: four trainings; the second time none."""
    config = _config(tmp_path)
    optimizers.main(config, epath.Path(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    adamw, muon = figures["arms"]
    assert adamw["nll_per_token"] == min(each["nll_per_token"] for each in adamw["grid"])
    assert [each["tokens"] for each in muon["lengths"]] == [3 * 64, 6 * 64] and figures["tokens"] == 6 * 64
    assert [point[0] for point in muon["curve"]] == [3 * 64, 6 * 64] and muon["curve"][-1][1] == muon["nll_per_token"]
    np.testing.assert_allclose(muon["above_first_arm_by_seed"], [muon["nll_per_token"] - adamw["nll_per_token"]])
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4
    assert (tmp_path / "optimizers.png").exists() and "| muon | 0.01 |" in (tmp_path / "optimizers.md").read_text()
    monkeypatch.setattr(optimizers, "run_module", None)
    optimizers.main(config, epath.Path(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == figures["arms"]


def test_tokens_to_a_loss_lie_on_a_line_in_their_logarithm():
    """loss = 5 - log2(tokens / 100), at 100, 200 and 800 tokens."""
    tokens, losses = [100, 800, 200], [5.0, 2.0, 4.0]
    for loss in (4.9, 4.0, 3.3, 2.0):
        assert tokens_to(loss, tokens, losses) == pytest.approx(100 * 2 ** (5 - loss))
    assert tokens_to(1.9, tokens, losses) is None and tokens_to(5.0, tokens, losses) is None
    assert tokens_to(3.0, [100, 200], [float("inf"), 2.0]) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": (Arm(name="a", rates=(1.0,)),)}, r"arms must be at least two of different names, got \['a'\]"),
        ({"seeds": 0}, "seeds and processes must be at least 1, got 0 and 2"),
    ],
)
def test_impossible_comparisons_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [({"rates": ()}, "arm 'a' has no learning rate"), ({"shorter": (1.0,)}, "shorter of arm 'a' must be shares of the steps")],
)
def test_impossible_arms_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Arm(**{"name": "a", "rates": (1.0,), **changes})
