"""The benchmark compares like with like, and says what it found."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from experiments.benchmarks import step_overhead


def _copied(state):
    return jax.tree.map(lambda leaf: leaf.copy(), state)


@pytest.fixture(scope="module")
def built():
    """() -> what `_build` returns for nano, compiled once, with a state of its own each time."""
    ours, plain, state, batch, walk = step_overhead._build("nano")
    return lambda: (ours, plain, _copied(state), batch, walk)


def test_both_sides_compute_the_same(built):
    ours, plain, state, batch, _ = built()
    leaves = jax.tree.leaves(_copied(state))
    for _ in range(3):
        state, metrics = ours(state, batch)
        leaves, plain_metrics = plain(leaves, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state), leaves)
    jax.tree.map(np.testing.assert_array_equal, metrics, plain_metrics)
    assert int(state.step) == 3


def test_a_short_run_writes_its_figures(built, tmp_path, monkeypatch):
    monkeypatch.setattr(step_overhead, "_build", lambda name: built())
    config = step_overhead.Config(presets=("nano",), repetitions=5, warmup=1)
    step_overhead.main(config, epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    # Four convolutions of 8 arrays with norms and feed-forward, two attentions of 11, embedding and final norm; each has two
    # moments beside it, and there are four scalars.
    assert row["arrays"] == results["nano_arrays"] == 3 * (4 * 8 + 2 * 11 + 2) + 4
    assert results["most_overhead_ms"] == row["overhead_ms"] == results["nano_overhead_ms"]
    for name in ("step", "plain", "overhead", "graph_walk"):
        assert row[f"{name}_ms_10_percent"] <= row[f"{name}_ms"] <= row[f"{name}_ms_90_percent"]


def test_no_repetition_is_refused():
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        step_overhead.Config(presets=("nano",), repetitions=0)
