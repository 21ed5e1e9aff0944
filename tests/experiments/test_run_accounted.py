"""The time of a run is told at its end, whatever that is."""

import dataclasses
import json

import pytest
from etils import epath

from experiments.accounting import run_accounted
from lfm_jax.configuration import ConfigError
from lfm_jax.training.stopping import EXIT_INTERRUPTED, Interrupted


@dataclasses.dataclass(frozen=True)
class Config:
    """Of nothing."""

    seed: int = 0


def _raises(error):
    def run(ledger):
        with ledger.kind("save"):
            raise error

    return run


def test_the_shares_are_told_and_written_with_the_figures(tmp_path, capsys):
    run_accounted(Config(), epath.Path(tmp_path), lambda ledger: {"loss": 1.0})
    assert "all starts of the run together: " in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss"] == 1 and sum(row["share"] for row in results["goodput"]) == pytest.approx(1)


@pytest.mark.parametrize("error", [Interrupted(EXIT_INTERRUPTED), OSError("the disk is full")])
def test_a_run_that_does_not_come_to_its_end_tells_them_too(error, tmp_path, capsys):
    with pytest.raises(type(error)):
        run_accounted(Config(), epath.Path(tmp_path), _raises(error))
    assert "all starts of the run together: " in capsys.readouterr().out
    assert '"finished": false' in (tmp_path / "goodput.jsonl").read_text()


def test_a_mistake_has_taken_no_time_worth_telling(tmp_path, capsys):
    with pytest.raises(ConfigError):
        run_accounted(Config(), epath.Path(tmp_path), _raises(ConfigError("no such field")))
    assert capsys.readouterr().out == ""
