"""The benchmark of the replicas' comparison times what it says, and counts bytes as by hand."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from experiments.benchmarks import replica_check
from experiments.benchmarks.replica_check import Config, Plan
from lfm_jax.sharding import MeshConfig
from lfm_jax.training import replicas


@pytest.mark.heavy
def test_a_short_run_writes_its_figures(tmp_path, monkeypatch):
    checked = []
    check = replicas.check_replicas
    monkeypatch.setattr(replicas, "check_replicas", lambda state, mesh, step: (checked.append(state), check(state, mesh, step)))
    config = Config(
        preset="nano", rows=2, seq=16, repetitions=3, every=10,
        meshes=(MeshConfig(data=1, fsdp=1, tensor=2), MeshConfig(data=16, fsdp=1)),
    )  # fmt: skip
    replica_check.main(config, epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert (row["mesh"], row["devices"], results["meshes_left_out"], results["guarded"]) == ("tensor=2", 2, 1, [])
    assert row["share_of_time"] == pytest.approx(row["check_ms"] / (10 * row["step_ms"])) == results["most_share_of_time"]
    held = [
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(checked[0]) if leaf.sharding.is_fully_replicated
    ]
    assert row["copied_bytes"] == sum(held) > 0
    assert row["state_bytes"] == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(checked[0]))
    # Each second one is of a state that both devices hold all of.
    assert len(checked) == 6 and all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(checked[1]))


def test_what_has_copies_is_counted_from_shapes():
    """On a slice whose replicas divide every array but the smallest."""
    pytest.importorskip("libtpu")
    plan = Plan(preset="nano", topology="v5e:2x2", mesh=MeshConfig(data=4, fsdp=1))
    found = replica_check._guarded(plan)
    assert found["state_bytes"] == pytest.approx(3 * 4 * found["parameters"], abs=64)
    assert 0 < found["copied_bytes"] < 64 and found["guarded_share"] == found["copied_bytes"] / found["state_bytes"]
    whole = replica_check._guarded(Plan(preset="nano", topology="v5e:2x2", mesh=MeshConfig(fsdp=1, tensor=4)))
    assert whole["guarded_share"] > 0.01 and np.isclose(whole["state_bytes"], found["state_bytes"])


def test_a_single_repetition_is_refused():
    with pytest.raises(ValueError, match="repetitions must be at least 2, since the first is not timed; got 1"):
        Config(preset="nano", rows=2, seq=16, meshes=(), repetitions=1)
