"""Both sides of the benchmark train the same model on the same batch, and it says what it found."""

import json

import pytest
from etils import epath

from experiments.benchmarks import train_step
from lfm_jax.models import preset
from lfm_jax.models.accounting import training_flops_per_token


def test_a_short_run_trains_alike_and_writes_its_figures(tmp_path):
    """Losses of three updates within 1e-3: float32, summed in another order, and updates of Adam that follow signs."""
    config = train_step.Config(preset="nano", rows=2, seq=32, accumulation=2, steps=1, rounds=3, compiled=False)
    train_step.main(config, epath.Path(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["transformers_loss_difference"] < 1e-3
    flops = 64 * training_flops_per_token(preset("nano"), 32)
    for name in ("ours", "transformers"):
        assert figures[f"{name}_tokens_per_second"] == pytest.approx(64 / figures[f"{name}_seconds"])
        rate = figures["matmul_flops_per_second"]
        assert figures[f"{name}_flops_utilization"] == pytest.approx(flops / figures[f"{name}_seconds"] / rate)
    assert figures["floor_seconds"] == pytest.approx(flops / figures["matmul_flops_per_second"])
    assert figures["ours_over_transformers"] > 0


def test_one_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 2, since the first is not timed; got 1"):
        train_step.Config(preset="nano", rows=2, seq=32, accumulation=2, steps=1, rounds=1)
