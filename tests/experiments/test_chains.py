"""Stages one after the other, of several processes as well."""

import json
import types

import jax
import pytest
from etils import epath
from jax.experimental import multihost_utils

from experiments.chains import run_stage


@pytest.mark.parametrize("late", [False, True])
def test_another_process_waits_for_the_figures_of_the_first(monkeypatch, tmp_path, late):
    """late: the first has ended the stage before this one looks for it, and waits for it all the same."""
    results, waited, ran = tmp_path / "stage" / "results.json", [], []

    def first(name):
        waited.append(name)
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps({"loss": 1.5}))

    if late:
        results.parent.mkdir()
        results.write_text(json.dumps({"loss": 1.5}))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", first)
    stage = types.SimpleNamespace(__name__="experiments.stage", main=lambda config, workdir: ran.append(workdir))
    assert run_stage(stage, None, epath.Path(tmp_path / "stage")) == {"loss": 1.5}
    assert len(waited) == 1 and len(ran) == (not late)
