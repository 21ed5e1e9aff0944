"""The study: its recorded report, figures known from elsewhere, the ranges that it warns by, and a sweep of one's own."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from experiments import scaling_study
from experiments.results import read_results
from experiments.scaling_fit import published_data, repeated_runs
from experiments.scaling_fit.published_data import NEEDED
from experiments.scaling_study import Config, budgets, laws, own_sweep, report, risks, sections, use
from experiments.scaling_study.costs import Costs
from experiments.scaling_study.laws import Estimate, Range, StudyLaw
from lfm_jax.configuration import ConfigError
from lfm_jax.models import preset
from lfm_jax.models.accounting import decode_bytes_per_token
from lfm_jax.scaling.chinchilla import BESIROGLU, Chinchilla
from lfm_jax.sharding.chips import CHIPS

COSTS = Costs()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("study"))
    scaling_study.main(Config(), folder)
    return folder


@pytest.fixture(scope="module")
def figures(workdir):
    return read_results(workdir)


@pytest.fixture(scope="module")
def found():
    return laws.read(laws.RECORDED / laws.FILE)


def of(figures, table, **wanted):
    (row,) = (row for row in figures[table] if all(row[key] == value for key, value in wanted.items()))
    return row


def test_the_recorded_report_is_what_the_recorded_runs_give(workdir):
    assert (workdir / "scaling_study.md").read_text() == (ROOT / "docs" / "scaling_study.md").read_text(), (
        "run configs/scaling_study.py, and copy scaling_study.md and scaling_study.png to docs"
    )
    assert (workdir / "scaling_study.png").read_bytes()[:4] == b"\x89PNG"


def test_the_recorded_laws_are_those_of_the_published_runs(published_data, found):
    """The first of the recorded resamples, which are the same however many follow."""
    missing = [name for name in NEEDED if not (published_data / name).exists()]
    if missing:
        pytest.skip(f"no {missing} in {published_data}")
    for ours, recorded in zip(laws.fit(published_data, 3, 42), found, strict=True):
        assert (ours.name, ours.points) == (recorded.name, recorded.points)
        np.testing.assert_allclose(ours.law, recorded.law, rtol=1e-4)
        np.testing.assert_allclose(ours.range, recorded.range, rtol=1e-6)
        for mine, theirs in zip(ours.draws, recorded.draws, strict=True):
            assert len(theirs) == Config().resamples
            np.testing.assert_allclose(mine, theirs[:3], rtol=1e-4)


def test_with_the_published_runs_the_laws_are_fitted_anew(published_data, tmp_path, found):
    if any(not (published_data / name).exists() for name in NEEDED):
        pytest.skip(f"not all of {NEEDED} in {published_data}")
    fitted = scaling_study._laws(Config(data=str(published_data), resamples=2), epath.Path(tmp_path))
    assert [len(each.draws.E) for each in fitted] == [2, 2, 2, 2]
    np.testing.assert_allclose([each.law for each in fitted], [each.law for each in found], rtol=1e-4)


def test_the_ranges_of_printed_laws_are_those_of_their_runs(found, published_data):
    printed = {each.name: each.range for each in laws.PRINTED}
    np.testing.assert_allclose(printed["Besiroglu et al."], found[0].range, rtol=2e-3)
    models = published_models(published_data)
    params, tokens = (np.array([getattr(model, key) for model in models]) for key in ("params", "tokens"))
    np.testing.assert_allclose(
        printed["Gadre et al., C4"], (params.min(), params.max(), tokens.max(), (tokens / params).max()), rtol=3e-3
    )
    runs = np.array([[float(value) for value in run.split()] for run in repeated_runs._RUNS.split(",")])
    params, tokens, unique = runs[:, :3].T * 1e6
    once = tokens == unique
    reached = params[once].min(), params[once].max(), tokens[once].max(), (tokens / params)[once].max()
    np.testing.assert_allclose(printed["Muennighoff et al."], reached, rtol=2e-3)


def published_models(folder):
    return published_data.read_overtraining(folder)


def test_the_plans_are_those_of_the_documentation():
    rows = (ROOT / "docs" / "benchmarks" / "pod_plan.md").read_text().splitlines()
    for name, speed in budgets.PLANNED_TOKENS_PER_SECOND.items():
        (row,) = (row for row in rows if row.startswith(f"| {name} | v5p:8x8x8 |"))
        assert f"| {speed:,} |" in row
    assert budgets.PLANNED_CHIPS == 8 * 8 * 8
    assert budgets.chip_hours("lfm2_350m", 28e12) == pytest.approx(28e12 / 49_918_024 / 3600 * 512)


def test_350m_on_28t_is_what_was_computed_elsewhere(found):
    """With 350e6 parameters, by the Huber minimum; tests/scaling/test_deployment.py has the formulas' own tests."""
    row = budgets.equals(found, 350e6, 28e12, COSTS)[0]
    expected = {"loss": 2.3570, "params": 2.08e9, "tokens": 45.2e9, "training_ratio": 104.4, "params_ratio": 5.94}
    expected |= {"break_even_tokens": 1.68e13, "implied_demand": 1.57e15}
    for key, value in expected.items():
        assert row[key].value == pytest.approx(value, rel=3e-3), key
        assert row[key].low < row[key].value < row[key].high, key
    assert row["beyond"]["multiplier"] == pytest.approx(80_000 / 341, rel=1e-3)
    costs = {row["unique_tokens"]: row["350M"] for row in risks.repetition({"350M": 350e6})}
    assert (costs[7e12], costs[3e12]) == pytest.approx((0.0007, 0.0023), abs=6e-5)


def test_an_estimate_has_the_middle_of_its_resamples():
    constants = np.linspace(1.0, 2.0, 101)
    draws = BESIROGLU._replace(E=constants, **{key: np.full(101, getattr(BESIROGLU, key)) for key in BESIROGLU._fields[1:]})
    reach = Range(1e8, 1e9, 1e11, 500)
    each = StudyLaw(name="a", source="b", law=BESIROGLU._replace(E=1.4), range=reach, draws=draws)
    assert each.estimate(lambda law: law.E) == pytest.approx((1.4, 1.025, 1.975))
    assert laws.PRINTED[0].estimate(lambda law: law.E) == Estimate(BESIROGLU.E)
    assert each.beyond(2e9, 1e12) == {"tokens": 10, "multiplier": 1, "params": 2}
    assert each.beyond(5e7, 1e9)["params"] == 2


def test_the_report_says_what_it_does_not_know(workdir, figures):
    text = (workdir / "scaling_study.md").read_text()
    for law in figures["losses"]:
        assert law["beyond"]["multiplier"] > 15 and law["beyond"]["tokens"] > 30
    for words in ("123 to 261 times beyond", "What the laws cannot say", "are no forecast", "no measurement"):
        assert words in " ".join(text.split()), words
    assert ("No runs are recorded yet" in text) == (figures["own_runs"] == 0)


def test_the_report_counts_the_resamples_that_there_are(found):
    few = [dataclasses.replace(each, draws=Chinchilla(*(values[:7] for values in each.draws))) for each in found]
    text = report.markdown(report.figures(few, laws.RECORDED, Config()), Config())
    assert "the middle 95 % of 7 refits" in " ".join(text.split())


def test_marginal_tokens(figures):
    """By differences of the losses that the same report predicts."""
    for row in figures["next_trillion"]:
        loss = of(figures, "losses", model="lfm2_350m", law=row["law"])
        assert row["10T_to_28T"][0] == pytest.approx(loss["10T"][0] - loss["28T"][0])
        assert row["1T"][0] == pytest.approx(loss["1T"][0] - loss["2T"][0])
    assert figures["gain_10T_to_28T"] == pytest.approx(0.0114, abs=5e-5)


def test_totals_cross_where_break_even_says(figures):
    """Linear in demand, through two of the table's columns, in FLOPs and in energy."""
    small = figures["totals"][0]
    (larger,) = (row for row in figures["totals"] if "of the first one's loss" in row["budget"])
    equal = of(figures, "equals", law="Chinchilla's points")
    for unit, key in (("flops", "break_even_tokens"), ("mwh", "break_even_tokens_on_devices")):
        low, high = (larger[f"{unit}_{demand}"] - small[f"{unit}_{demand}"] for demand in ("1e13", "1e16"))
        crossing = 1e13 - low * (1e16 - 1e13) / (high - low)
        assert equal[key][0] == pytest.approx(crossing, rel=1e-6)
    assert small["loss"] == pytest.approx(larger["loss"], rel=1e-9)


def test_serving_that_is_dearer_moves_every_figure_of_it(found):
    """Five times as dear: a fifth of the demand pays, and is right, for the same training."""
    laws, params = (found[0],), budgets.sizes()
    small, dearer = params[budgets.SMALLEST], Costs(inference_mfu_share=0.08)
    before, after = (budgets.equals(laws, small, budgets.MOST_TOKENS, costs)[0] for costs in (Costs(), dearer))
    for key in ("break_even_tokens", "implied_demand"):
        assert before[key].value == pytest.approx(5 * after[key].value)
        assert before[f"{key}_on_devices"] == after[f"{key}_on_devices"]
    row = use.totals(found[0], params, dearer)[0]
    assert row["flops_1e15"] == pytest.approx(small * (6 * budgets.MOST_TOKENS + 10 * 1e15))


def test_what_a_device_pays(figures):
    row = of(figures, "devices", model="lfm2_350m")
    weights, cache = 354_483_968 * 4.5 / 8, 6 * 2 * 8 * 64 * 4096 * 2 + 10 * 2 * 1024 * 2
    assert row["read_bytes"] == pytest.approx(weights + cache)
    assert row["read_bytes"] == decode_bytes_per_token(preset("lfm2_350m"), 4096, 4.5 / 8)
    assert row["joules"] == pytest.approx(1e-10 * (weights + cache))
    assert row["battery_tokens"] * row["joules"] == pytest.approx(50e3)
    assert row["milliseconds"] == pytest.approx((weights + cache) / 38e6)
    # Its model card has 188 tokens/s on a Snapdragon, with little in the cache.
    assert 1 / COSTS.device.seconds(weights) == pytest.approx(188, rel=0.03)


def test_answers_together_on_a_device(figures):
    row = of(figures, "answers_for_one", compared_with="the same loss")
    cache = 6 * 2 * 8 * 64 * 4096 * 2 + 10 * 2 * 1024 * 2
    together = 354_483_968 * 4.5 / 8 + row["samples_on_device"] * cache
    assert together == pytest.approx(row["params"] * 4.5 / 8)
    same = of(figures, "answers_for_one", compared_with="the same training FLOPs")
    assert 6 * same["params"] * same["tokens"] == pytest.approx(6 * 354_483_968 * 28e12)


def test_sampled_accuracy_is_that_of_drawn_questions():
    """By drawing the chances of 400,000 questions."""
    generator = np.random.default_rng(0)
    for row in use.sampled_accuracy([4.0]):
        chances = generator.beta(0.3 * row["spread"], 0.7 * row["spread"], 400_000)
        assert row["k=1"] == pytest.approx(0.3)
        assert row["k=4"] == pytest.approx(1 - ((1 - chances) ** 4).mean(), abs=3e-3)


def test_published_samples_spend_the_budget():
    row = use.published_samples()[1]
    assert (row["samples"], row["optimal_samples"]) == pytest.approx((27, 1.1), abs=0.1)
    assert row["multiplier"] == pytest.approx(2.56e19 / 6 / 37e6 / 37e6)


def test_rounding_grows_as_kumar_has_it():
    """67 times from 7B to 28T tokens at any size and number of bits."""
    rows = {(row["model"], row["tokens"]): row for row in risks.rounding()}
    for name in budgets.MODELS:
        for bits in ("4_bits", "8_bits"):
            assert rows[name, 28e12][bits] / rows[name, 7e9][bits] == pytest.approx(4000**0.5068)
    assert rows["lfm2_350m", 28e12]["body_params"] == 354_483_968 - 65_536 * 1024
    assert 0.4 < rows["lfm2_350m", 28e12]["4_bits"] < 0.6


def write_runs(folder, held_out_factor=1.0):
    """A sweep whose losses are a law's, but for what is held out."""
    law = Chinchilla(1.0, 20.0, 30.0, 0.3, 0.25)
    lines = []
    for params in (8e4, 1.5e5, 3e5, 6e5):
        for multiplier in (5, 20, 80, 320):
            held_out = params < 2e5 and multiplier == 320
            loss = float(law.loss(params, multiplier * params)) * (held_out_factor if held_out else 1)
            run = {"params": params, "tokens": multiplier * params, "loss": loss, "architecture": "hybrid"}
            lines.append(json.dumps({**run, "held_out": held_out, "seed": 0}))
    (folder / own_sweep.POINTS).write_text("\n".join(lines) + "\n")


def test_a_sweep_of_ones_own_is_fitted_without_what_is_held_out(tmp_path):
    write_runs(tmp_path, held_out_factor=1.1)
    found = own_sweep.study(tmp_path, 3, 0)
    assert (found["own_runs"], found["own_held_out"], found["own_probes"]) == (16, 2, 0)
    law = next(row for row in found["own_laws"] if row["law"] == "chinchilla")
    assert law["constants"]["E"] == pytest.approx(1.0, abs=1e-3) and law["constants"]["alpha"] == pytest.approx(0.3, abs=1e-3)
    assert law["points"] == 14 and law["fitted_error_share"] < 1e-5
    assert law["held_out_error_share"] == pytest.approx(1 - 1 / 1.1, abs=1e-4)
    text = "\n".join(sections.own(found, Config()))
    assert "16 runs, 2 of them held out" in text and "worst -9.09 %" in text and "No probes" in text
    runs = [json.loads(line) for line in (tmp_path / own_sweep.POINTS).read_text().splitlines()]
    alone = [{key: run[key] for key in ("params", "tokens", "loss")} for run in runs]
    (tmp_path / own_sweep.POINTS).write_text("\n".join(map(json.dumps, alone)))
    found = own_sweep.study(tmp_path, 3, 0)
    assert found["own_held_out"] == 0 and "held_out" not in found["own_laws"][0]
    assert "16 runs, 0 of them held out" in "\n".join(sections.own(found, Config()))


def test_runs_of_a_sweep_that_are_not_to_be_fitted_are_in_no_fit(tmp_path):
    """A second seed far off, and a twin of too few runs, of which the report says so."""
    write_runs(tmp_path)
    more = [{"params": 8e4, "tokens": 4e5, "loss": 50.0, "architecture": "hybrid", "held_out": False, "fitted": False}]
    more += [{"params": 8e4, "tokens": 4e5 * step, "loss": 3.0, "architecture": "attention", "fitted": True} for step in (1, 2)]
    more += [{"params": 8e4, "tokens": 4e5, "loss": 3.0, "architecture": "none", "fitted": False}]
    law = Chinchilla(1.0, 20.0, 30.0, 0.3, 0.3)
    more += [
        {"params": params, "tokens": step * params, "loss": float(law.loss(params, step * params)), "architecture": "four"}
        for params, step in ((8e4, 5), (8e4, 40), (3e5, 5), (3e5, 40))
    ]
    with (tmp_path / own_sweep.POINTS).open("a") as file:
        file.writelines(json.dumps(run) + "\n" for run in more)
    found = own_sweep.study(tmp_path, 3, 0)
    assert found["own_laws"][0]["points"] == 14 and found["own_laws"][0]["fitted_error_share"] < 1e-5
    text = "\n".join(sections.own(found, Config()))
    assert "- Not fitted: attention, any law: 4 constants need at least as many points, got 2." in text
    assert "- Not fitted: four, chinchilla: 5 constants need at least as many points, got 4." in text
    tied = next(row for row in found["own_laws"] if (row["architecture"], row["law"]) == ("four", "overtraining"))
    assert tied["constants"]["E"] == pytest.approx(1.0, abs=1e-3)
    assert "- Not fitted: none, any law: none of its runs is to be fitted." in text


def test_probes_give_back_their_exponents(tmp_path):
    probes = [
        {"params": params, "tokens": multiplier * params, "probe": "4 bits",
         "loss": 1e-3 * (multiplier * params) ** 0.5 / params**0.3}
        for params in (8e4, 3e5) for multiplier in (5, 20, 80)
    ]  # fmt: skip
    probes += [{"params": 8e4, "tokens": 1e6 * step, "probe": "noise", "loss": -0.1 * step} for step in (1, 2)]
    (tmp_path / own_sweep.PROBES).write_text("\n".join(map(json.dumps, probes)))
    rounded, noise = own_sweep.study(tmp_path, 3, 0)["own_probe_exponents"]
    assert (rounded["token_exponent"], rounded["param_exponent"]) == pytest.approx((0.5, 0.3))
    assert noise == {"probe": "noise", "runs": 2, "harmed": 0, "token_exponent": None, "param_exponent": None}
    assert "| 4 bits | 6 | 6 | +0.50 | +0.30 |" in sections.own(own_sweep.study(tmp_path, 3, 0), Config())


def test_a_run_that_lacks_something_is_named(tmp_path):
    (tmp_path / own_sweep.POINTS).write_text('{"params": 1, "tokens": 2, "loss": 3}\n{"params": 1, "tokens": 2}\n')
    with pytest.raises(ValueError, match=re.escape(f"{own_sweep.POINTS}: the run on line 2 has no loss")):
        own_sweep.study(tmp_path, 3, 0)


def test_missing_data_and_other_files_are_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="overtraining/models, overtraining/evals; .* --config.data=None for the recorded"):
        scaling_study.main(Config(data=str(tmp_path)), epath.Path(tmp_path))
    with pytest.raises(ConfigError, match=r"--config.recorded: .*laws.json"):
        scaling_study.main(Config(recorded=str(tmp_path / "none")), epath.Path(tmp_path))
    (tmp_path / "laws.json").write_text('{"laws": [{"name": "a"}]}')
    with pytest.raises(ConfigError, match="--config.recorded: .* is no file of laws as configs/scaling_study.py writes it"):
        scaling_study.main(Config(recorded=str(tmp_path)), epath.Path(tmp_path))


def test_laws_are_read_as_they_were_written(tmp_path, found):
    laws.write(found, epath.Path(tmp_path) / "again.json", report.COMMAND)
    assert (tmp_path / "again.json").read_text() == (laws.RECORDED / laws.FILE).read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chip": "v5d"}, "chip: no peak is known of 'v5d'. Did you mean 'v5"),
        ({"mfu_share": 0.0}, "mfu_share must be above 0 and at most 1, got 0.0"),
        ({"inference_mfu_share": 40.0}, "inference_mfu_share must be above 0 and at most 1, got 40.0"),
        ({"weight_bits": 0.0}, "weight_bits must be above zero, got 0.0"),
        ({"device_joules_per_byte": float("nan")}, "device_joules_per_byte must be above zero, got nan"),
    ],
)
def test_wrong_costs_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Costs(**settings)


def test_a_single_resample_is_refused():
    with pytest.raises(ValueError, match="resamples and own_resamples must be at least 2, got 400 and 1"):
        Config(own_resamples=1)


def test_prices_and_chip_hours():
    costs = Costs(chip="tpu7x", mfu_share=0.5, inference_mfu_share=0.1)
    hour = 3600 * 2 * CHIPS["tpu7x"].flops * 0.5  # a chip has two devices
    assert costs.chip_hours(10 * hour) == pytest.approx(10)
    assert tuple(costs.served) == pytest.approx((6, 10))
    assert tuple(costs.on_devices) == pytest.approx((6 * 3.2e-12, 4.5 / 8 * 1e-10))
    # A DGX H100: 10.2 kW for eight GPUs, 40 % of their peak.
    assert costs.joules_per_flop == pytest.approx(10.2e3 / (8 * CHIPS["h100"].flops * 0.4), rel=0.01)
