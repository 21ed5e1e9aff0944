"""The planner of a budget: its recommendation by brute force, its warnings, and chip-hours from a plan."""

import json
import re

import numpy as np
import pytest
from etils import epath

from experiments import budget
from experiments.budget import Config
from experiments.results import read_results
from experiments.scaling_study import laws
from experiments.scaling_study.costs import Costs
from lfm_jax.configuration import ConfigError
from lfm_jax.scaling import inference_aware
from lfm_jax.scaling.chinchilla import BESIROGLU


def run(tmp_path, capsys, **settings):
    """(figures, what was printed)."""
    capsys.readouterr()
    budget.main(Config(**settings), epath.Path(tmp_path))
    return read_results(tmp_path), " ".join(capsys.readouterr().out.split())


def rows_of(figures):
    return {row["law"]: row for row in figures["budgets"]}


def test_the_recommended_budget_is_the_cheapest_of_its_loss(tmp_path, capsys):
    """Sardana et al.'s search for the loss that the recommendation reaches comes back to the size that was asked."""
    figures, text = run(tmp_path, capsys)
    rows = rows_of(figures)
    assert len(rows) == 10
    row = rows["Besiroglu et al."]
    found = inference_aware.cheapest(BESIROGLU, row["loss"][0], 1e15)
    assert (found.params, found.tokens) == pytest.approx((350e6, row["tokens"][0]), rel=1e-3)
    value, low, high = rows["Chinchilla's points"]["tokens"]
    assert (value, low, high) == pytest.approx((20.2e12, 15.3e12, 25.2e12), rel=0.01)
    assert rows["Besiroglu et al."]["tokens"][1:] == [None, None]
    assert figures["least_tokens"] == min(row["tokens"][0] for row in rows.values())
    assert row["training_flops"] == pytest.approx(6 * 350e6 * row["tokens"][0]) and row["inference_flops"] == 2 * 350e6 * 1e15
    hour = 3600 * 459e12 * 0.4
    assert row["chip_hours"] == pytest.approx(row["training_flops"] / hour)
    assert "20.2 (15.3 to 25.2)" in text and "6 N D at 40 % of a v5p's peak" in text


def test_prices_move_it(tmp_path, capsys):
    """What is dearer to serve should be trained for longer: twice the price is twice the demand."""
    dear, _ = run(tmp_path, capsys, costs=Costs(mfu_share=0.4, inference_mfu_share=0.2))
    more, _ = run(tmp_path, capsys, inference_tokens=2e15)
    for law, row in rows_of(dear).items():
        assert row["tokens"] == pytest.approx(rows_of(more)[law]["tokens"])
    on_devices, _ = run(tmp_path, capsys, costs=Costs(weight_bits=8 * 2 * 3.2e-12 / 1e-10))
    for row in rows_of(on_devices).values():  # there a byte is priced as two FLOPs are
        assert row["tokens_on_devices"] == pytest.approx(row["tokens"])


def test_it_warns_where_it_extrapolates(tmp_path, capsys):
    figures, text = run(tmp_path, capsys, tokens=28e12)
    recorded = laws.read(laws.RECORDED / laws.FILE)[0]
    row = rows_of(figures)["Chinchilla's points"]
    assert row["beyond"]["multiplier"] == pytest.approx(row["tokens"][0] / 350e6 / recorded.range.multiplier)
    beyond = [each["beyond"]["multiplier"] for each in figures["budgets"]]
    least, most = f"{min(beyond):.3g}", f"{max(beyond):.3g}"
    warning = f"the budgets: tokens a parameter are beyond the runs of all 10 laws, {least} to {most} times"
    assert figures["warnings"][0] == warning and f"Extrapolated: {warning}." in text
    assert figures["warnings"][2] == "28T tokens: tokens a parameter are beyond the runs of all 10 laws, 125 to 264 times"
    assert row["demand_of_tokens"][0] == pytest.approx(1.57e15, rel=0.01)
    assert row["loss_of_tokens"][0] == pytest.approx(2.3570, abs=5e-5)


def test_within_the_runs_it_does_not_warn(tmp_path, capsys):
    figures, text = run(tmp_path, capsys, params=1e9, inference_tokens=0.0)
    assert figures["warnings"] == [] and "Extrapolated" not in text
    assert rows_of(figures)["Besiroglu et al."]["tokens"][0] == pytest.approx(float(BESIROGLU.optimal_tokens(1e9)))


def test_only_those_laws_are_named_that_are_exceeded(tmp_path, capsys):
    figures, _ = run(tmp_path, capsys, params=12e9, inference_tokens=0.0)
    sizes = "C4 models, RedPajama models, RefinedWeb models, Muennighoff et al., Gadre et al., C4, Gadre et al., RedPajama, Gadre"
    assert any(line.startswith(f"the budgets: parameters are beyond the runs of {sizes}") for line in figures["warnings"])


def test_repetition(tmp_path, capsys):
    figures, text = run(tmp_path, capsys, unique_tokens=7e12)
    assert 1e-4 < rows_of(figures)["Hoffmann et al."]["loss_by_repetition"] < 2e-3 and "repetition" in text
    figures, _ = run(tmp_path, capsys, unique_tokens=1e14)
    assert all(row["loss_by_repetition"] == 0 for row in figures["budgets"])


def write_plan(folder, **plan):
    plans = [
        {"preset": "lfm2_350m", "topology": "v5e:16x16", "fits": True, "tokens_per_second_per_chip": 45_520.0, **plan},
        {"preset": "lfm2_350m", "topology": "v5e:4x4", "fits": True, "tokens_per_second_per_chip": 44_000.0, **plan},
        {"preset": "lfm2_1_2b", "topology": "v5p:2x2x4", "fits": False, "tokens_per_second_per_chip": None},
    ]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"plans": plans}))


def test_chip_hours_come_from_a_plan(tmp_path, capsys):
    write_plan(tmp_path / "plan")
    figures, text = run(tmp_path, capsys, plan=str(tmp_path / "plan"))
    row = rows_of(figures)["C4 models"]
    assert row["chip_hours"] == pytest.approx(row["tokens"][0] / 45_520 / 3600)
    assert figures["chip_hours_from"] == "the plan of lfm2_350m on v5e:16x16, an estimate" and "the plan of lfm2_350m" in text


def test_a_plan_of_another_size_is_refused(tmp_path, capsys):
    write_plan(tmp_path / "plan")
    with pytest.raises(ConfigError, match=r"no plan that fits of a model of about 1.2B .*\(it has lfm2_350m with 354M\)"):
        run(tmp_path, capsys, params=1.2e9, plan=str(tmp_path / "plan"))
    write_plan(tmp_path / "none", fits=False)
    with pytest.raises(ConfigError, match=r"of about 350M parameters \(it has none\); plan one with configs/pod_plan.py"):
        run(tmp_path, capsys, plan=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"--config.plan: .* does not exist"):
        run(tmp_path, capsys, plan=str(tmp_path / "nowhere"))


def test_what_the_device_pays(tmp_path, capsys):
    figures, text = run(tmp_path, capsys, params=1e9, costs=Costs(weight_bits=8.0))
    assert figures["device_token_joules"] == pytest.approx(0.1)  # MobileLLM: a token and billion parameters of 8 bits
    assert figures["device_token_seconds"] == pytest.approx(1e9 / 38e9) and "users pay 26.3 ms and 0.100 J a token" in text


def test_other_laws(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--config.laws: .*nowhere.json"):
        run(tmp_path, capsys, laws=str(tmp_path / "nowhere.json"))
    only = laws.read(laws.RECORDED / laws.FILE)[:1]
    laws.write(only, epath.Path(tmp_path) / "one.json", "by hand")
    figures, _ = run(tmp_path, capsys, laws=str(tmp_path / "one.json"))
    assert len(figures["budgets"]) == 1 + len(laws.PRINTED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": 0.0}, "params must be above zero, got 0.0"),
        ({"tokens": -1.0}, "tokens must be above zero, got -1.0"),
        ({"unique_tokens": np.nan}, "unique_tokens must be above zero, got nan"),
        ({"inference_tokens": -1.0}, "inference_tokens must be at least 0, got -1.0"),
    ],
)
def test_a_wrong_value_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**settings)
