"""Probes of a sweep's ends: a small sweep probed for real, and every figure beside what it is by hand."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from scipy import stats

import run
from data_pipelines.sources.known_entropy import KnownEntropyConfig, KnownEntropySource
from experiments import scaling_probes, scaling_sweep
from experiments.results import read_results
from experiments.scaling_probes import fine_tuned, fits, perturbed, report
from experiments.scaling_probes.answers import QuestionsConfig, make_chances, make_questions
from experiments.scaling_probes.config import Config
from experiments.scaling_probes.ends import read_sweep
from experiments.scaling_probes.fine_tuned import FineTuningConfig
from experiments.scaling_study import own_sweep
from experiments.scaling_sweep.grid import RulesConfig, TrunkConfig
from experiments.stages import mesh_for, model_functions
from lfm_jax.configuration import ConfigError, from_mapping, to_mapping
from lfm_jax.models import ComputeConfig
from lfm_jax.scaling.precision import Degradation
from lfm_jax.scaling.train_to_test import TrainToTest
from lfm_jax.sharding import MeshConfig

# On eight devices, programs of many small parts take several times as long to compile.
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
HELD_OUT = 512
STILL = 1e-9  # a rate that changes nothing, so that nothing is forgotten
FIRST, SECOND = "32x1/m2", "8x1/m20"


@functools.cache
def tiny_sweep():
    """Of two widths, the first of which divides into the blocks of a q4_0 file."""
    config = from_mapping(scaling_sweep.Config, run._read("configs/scaling_sweep.py:quick", []).settings)
    model = dataclasses.replace(config.pretrain.model, layer_types=("conv",))
    trunks = tuple(TrunkConfig(embed_dim=width, layers=1, multipliers=(last,)) for width, last in ((32, 2), (8, 20)))
    return dataclasses.replace(
        config, trunks=trunks, pretrain=dataclasses.replace(config.pretrain, model=model), train_tokens=20_000,
        rules=RulesConfig(batch_exponent=0.0, warmup=0.25),
        held_out_tokens=HELD_OUT,
    )  # fmt: skip


def probes_of(sweep, **changes):
    given = {
        "sweep": os.fspath(sweep), "held_out_tokens": 4 * HELD_OUT, "bits": (3, 8), "noise": (0.5,), "noise_draws": 2,
        "resamples": 2, "fine_tuning": FineTuningConfig(tokens=1024, rates=(STILL,), rows=8),
        "questions": QuestionsConfig(count=16, beginning=3, symbols=(1, 2), samples=(1, 4)),
    }  # fmt: skip
    return Config(**given | changes)


CODE = """
import json, pathlib, sys
from etils import epath
from scipy import stats
from experiments import scaling_probes
from experiments.scaling_sweep import Config, carry_out, prepare_text, runs_of
from lfm_jax.configuration import from_mapping
given, sweep, workdir = json.load(sys.stdin), epath.Path(sys.argv[1]), epath.Path(sys.argv[2])
config = from_mapping(Config, given["sweep"])
prepare_text(sweep, config.source, {"train": config.train_tokens, "held_out": config.held_out_tokens}, 32)
carry_out(runs_of(config.trunks, (), config.pretrain, config.rules), sweep, sweep, 1, 1)
(sweep / "config.json").write_text(json.dumps({"experiment": "scaling_sweep", **given["sweep"]}))
done = sweep / "runs" / given["second"] / "results.json"
done.rename(done.parent / "kept.json")
probes = from_mapping(scaling_probes.Config, given["probes"])
scaling_probes.main(probes, workdir)
(workdir / "results.json").rename(workdir / "first.json")
(done.parent / "kept.json").rename(done)
scaling_probes.main(probes, workdir)
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """(sweep, workdir): probed when one of its two ends was done, and again when both were."""
    sweep, workdir = (epath.Path(tmp_path_factory.mktemp(name)) for name in ("sweep", "probes"))
    given = {"sweep": to_mapping(tiny_sweep()), "probes": to_mapping(probes_of(sweep)), "second": SECOND}
    command = [sys.executable, "-c", CODE, os.fspath(sweep), os.fspath(workdir)]
    ended = subprocess.run(
        command, input=json.dumps(given), cwd=ROOT, env=os.environ | ONE_DEVICE, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("a width of 8 is not probed as a q4_0 file: q4_0 has blocks of 32 weights") == 1
    return sweep, workdir


def record_of(workdir, end):
    return json.loads((workdir / "ends" / f"{end}.json").read_text())


def test_what_is_done_is_probed_and_what_is_missing_is_named(probed):
    sweep, workdir = probed
    first, both = json.loads((workdir / "first.json").read_text()), read_results(workdir)
    assert (first["ends_probed"], [each["name"] for each in first["missing"]]) == (1, [SECOND])
    assert (both["ends_probed"], both["missing"]) == (2, [])
    assert [row for row in both["probes"] if row["name"] == FIRST] == first["probes"], "what is done is not done again"
    times = [(workdir / "ends" / f"{end}.json").stat().mtime for end in (FIRST, SECOND)]
    assert times[0] < times[1]
    assert not list((workdir / "tuned").glob("*/*")), "checkpoints of the fine-tuned models are of no further use"
    text = (workdir / "scaling_probes.md").read_text()
    assert "2 ends of 2." in text and "Not fitted to 2 ends: exponents of N and D need 4 ends" in text
    assert (workdir / "scaling_probes.png").read_bytes().startswith(b"\x89PNG")
    missing = [{"name": "8x1/m80", "state": "failed"}]
    assert "1 ends of 2. Missing, and in no fit: 8x1/m80 (failed)." in report.markdown(first | {"missing": missing})


def test_losses_are_those_of_the_sweep_and_more_damage_costs_more(probed):
    sweep, workdir = probed
    for end in (FIRST, SECOND):
        record = record_of(workdir, end)
        assert record["loss"] == pytest.approx(read_results(sweep / "runs" / end)["nll_per_token"], rel=1e-6)
        added = {row["probe"]: row["loss"] for row in record["probes"]}
        in_file = {"q4_0"} if end == FIRST else set()
        assert set(added) == {"rounded to 3 bits", "rounded to 8 bits", "noise 0.5"} | in_file
        assert all(abs(added["rounded to 8 bits"]) < abs(added[name]) < abs(added["rounded to 3 bits"]) for name in in_file)
        assert abs(added["rounded to 8 bits"]) < 1e-3 < added["noise 0.5"]
        assert abs(added["rounded to 8 bits"]) < abs(added["rounded to 3 bits"])
        (noise,) = (row for row in record["probes"] if row["probe"] == "noise 0.5")
        assert noise["loss"] == pytest.approx(np.mean(noise["draws"])) and len(set(noise["draws"])) == 2
        (tuned,) = record["tuned"]
        assert abs(tuned["forgotten"]) < 1e-5 < abs(tuned["new_loss"] - record["loss"])
        about = json.loads((workdir / "text" / "source.json").read_text())
        assert tuned["new_excess"] == pytest.approx(tuned["new_loss"] - about["known"]["log_loss"]) and tuned["new_excess"] > 0
        assert np.shape(record["chances"]) == (16, 2)


def test_the_study_reads_the_probes(probed):
    _, workdir = probed
    found = own_sweep.study(workdir, resamples=2, seed=0)
    names = ["rounded to 3 bits", "rounded to 8 bits", "q4_0", "noise 0.5", f"fine-tuned at {STILL:g}"]
    assert found["own_probes"] == 9 and [row["probe"] for row in found["own_probe_exponents"]] == names
    lines = [json.loads(line) for line in (workdir / "probes.jsonl").read_text().splitlines()]
    assert lines == read_results(workdir)["probes"]
    assert lines[0]["perturbed_loss"] == pytest.approx(lines[0]["loss"] + record_of(workdir, FIRST)["loss"])


def test_other_settings_and_other_runs_are_refused(probed, monkeypatch):
    sweep, workdir = probed
    with pytest.raises(ConfigError, match=r"holds probes with other settings: noise was \[0.5\], is \[0.25\]"):
        scaling_probes.main(probes_of(sweep, noise=(0.25,)), workdir)
    place, path = sweep / "runs" / FIRST / "results.json", workdir / "ends" / f"{FIRST}.json"
    text = place.read_text()
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    try:
        place.write_text(json.dumps(json.loads(text) | {"nll_per_token": 1.0}))
        with pytest.raises(ConfigError, match=f"{path} is about another run than the sweep has now"):
            scaling_probes.main(probes_of(sweep), workdir)
    finally:
        place.write_text(text)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="the probes are for one machine"):
        scaling_probes.main(probes_of(sweep), workdir)


def test_ends_are_hybrids_at_the_rules_rate(tmp_path):
    """And what the manifest says is running is done, if its figures are there."""
    folder = epath.Path(tmp_path)
    with pytest.raises(ConfigError, match="expected the workdir of configs/scaling_sweep.py, with runs.jsonl"):
        read_sweep(os.fspath(folder))
    run_of = {
        "params": 10, "tokens": 200, "multiplier": 20, "budget": None, "fitted": True, "held_out": False, "apart": False,
        "rate": 1, "architecture": "hybrid", "status": "running",
    }  # fmt: skip
    other = {"trunk": {"multiplier": None}, "apart": {"apart": True}, "rate": {"rate": 2}, "twin": {"architecture": "attention"}}
    runs = [{"name": f"a/{name}", **run_of, **changes} for name, changes in {"m20": {}, "m40": {}, **other}.items()]
    (folder / "runs.jsonl").write_text("\n".join(map(json.dumps, runs)))
    (folder / "config.json").write_text(json.dumps(to_mapping(tiny_sweep())))
    with pytest.raises(ConfigError, match="none of the sweep's 2 ends is done"):
        read_sweep(os.fspath(folder))
    (folder / "runs/a/m20").mkdir(parents=True)
    (folder / "runs/a/m20/results.json").write_text('{"nll_per_token": 4.5}')
    sweep = read_sweep(os.fspath(folder))
    assert sweep.missing == [{"name": "a/m40", "state": "running"}]
    assert [(end["name"], end["trunk"], end["loss_in_sweep"]) for end in sweep.ends] == [("a/m20", "a", 4.5)]
    assert sweep.source == tiny_sweep().source


@pytest.fixture(scope="module")
def model():
    """(functions, parameters, buffers) of the sweep's quick base: two convolutions and an attention of width 16."""
    functions = model_functions(tiny_sweep_base(), ComputeConfig())
    params, buffers = jax.jit(functions.init)(jax.random.key(3))
    return functions, params, buffers


def tiny_sweep_base():
    return from_mapping(scaling_sweep.Config, run._read("configs/scaling_sweep.py:quick", []).settings).pretrain.model


def by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_rounding_takes_the_nearest_step_of_each_output(model):
    functions, params, _ = model
    before, after = by_path(params), by_path(perturbed.to_bits(functions, params, 3))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "'mlp'" in name or "_proj'" in name}, "neither table, norms nor taps"
    # By output: [outputs, inputs], where the projection out of attention sums over heads and their dimension.
    of_output = {"['mlp']['gate']": lambda w: w.T, "['operator']['out_proj']": lambda w: w.reshape(-1, w.shape[-1]).T}
    for end, turned in of_output.items():
        name = f"['layers'][2]{end}"
        for weights, found in zip(turned(before[name]), turned(after[name]), strict=True):
            steps = np.abs(weights).max() / 3 * np.arange(-3, 4)
            nearest = steps[np.abs(weights[:, None] - steps).argmin(axis=1)]
            np.testing.assert_allclose(found, nearest, rtol=1e-6)


def test_noise_has_the_deviation_of_the_initialisation(model):
    functions, params, _ = model
    deviations = by_path(perturbed.initial_deviations(functions, seed=5))
    assert deviations["['embed']['embedding']"] == pytest.approx(0.02, rel=0.05), "as it is drawn"
    assert deviations["['final_norm']['scale']"] == 0
    before = by_path(params)
    moved = [
        by_path(perturbed.with_noise(params, perturbed.initial_deviations(functions, 5), strength, seed))
        for strength, seed in ((0.5, 1), (1.0, 1), (0.5, 2))
    ]
    for name in before:
        half, whole, other = (each[name] - before[name] for each in moved)
        np.testing.assert_allclose(whole, 2 * half, atol=1e-6)
        if before[name].size > 200:
            assert half.std() == pytest.approx(0.5 * deviations[name], rel=0.2)
            assert abs(np.corrcoef(half.ravel(), other.ravel())[0, 1]) < 0.3
    assert np.array_equal(moved[0]["['final_norm']['scale']"], before["['final_norm']['scale']"])


SOURCE = KnownEntropyConfig(longest=31)


def test_the_right_answer_is_what_the_source_would_most_likely_say():
    config = QuestionsConfig(count=20, beginning=4, symbols=(2,))
    questions = make_questions(config, SOURCE, bos_id=1)
    assert questions.ids.shape == (20, 7) and set(questions.ids[:, 0]) == {1}
    known = KnownEntropySource(SOURCE)
    for row, chances in zip(questions.ids[:, 1:], questions.chances, strict=True):
        document = row.astype(np.uint8)
        for place in (4, 5):
            rivals = [np.append(document[:place], np.uint8(symbol)) for symbol in range(3, 256)]
            losses = np.array([known.certainty([each]).log_loss[place] for each in rivals[::16]])
            mine = known.certainty([document[: place + 1]]).log_loss[place]
            assert mine <= losses.min() + 1e-12
        assert chances[1] == pytest.approx(math.exp(-known.certainty([document]).log_loss[4:6].sum()))
    again = make_questions(dataclasses.replace(config, seed=4), SOURCE, bos_id=1)
    assert not np.array_equal(again.ids, questions.ids)


def test_a_models_chance_is_the_product_over_the_answer(model):
    functions, params, buffers = model
    questions = make_questions(QuestionsConfig(count=8, beginning=4, symbols=(2,)), SOURCE, bos_id=1)
    found = make_chances(functions, questions, mesh_for(MeshConfig()))(params, buffers)

    @jax.jit
    def logits(params):
        decoder = functions.bind(params, buffers)
        hidden = decoder(jnp.asarray(questions.ids)).hidden
        return hidden @ decoder.head.T

    chances = np.asarray(jax.nn.softmax(logits(params)), np.float64)
    for row, ids in enumerate(questions.ids):
        one = chances[row, 4, ids[5]]
        np.testing.assert_allclose(found[row], [one, one * chances[row, 5, ids[6]]], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "source", "message"),
    [
        ({"beginning": 30}, SOURCE, "a beginning of 30 and 3 symbols are more than source.longest=31"),
        ({"beginning": 20}, dataclasses.replace(SOURCE, end=0.9), "only 0 of 20 documents have 20 symbols"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(changes, source, message):
    with pytest.raises(ValueError, match=message):
        make_questions(QuestionsConfig(count=20, **changes), source, bos_id=1)


def test_fine_tuning_starts_from_the_end_at_a_share_of_its_rate(tmp_path, monkeypatch):
    seen = []
    run_stage = lambda stage, config, place: seen.append((config, place)) or {"nll_per_token": 4.0}
    monkeypatch.setattr(fine_tuned, "run_stage", run_stage)
    settings = dataclasses.replace(tiny_sweep().pretrain, tokens_from=("the old text",))

    class Sweep:
        source = SOURCE
        settings = staticmethod(lambda name: settings)
        place = staticmethod(lambda name: f"sweep/{name}")

    config = FineTuningConfig(tokens=32 * 8 * 20, rows=8, warmup_share=0.1)
    place, loss = fine_tuned.fine_tune(epath.Path(tmp_path), Sweep, "8x1/m20", config, rate=0.25)
    ((tuned, where),) = seen
    assert (place, loss) == (where, 4.0) and where == tmp_path / "tuned/8x1/m20/rate0.25"
    assert (tuned.init_from, tuned.model, tuned.tokens_from) == ("sweep/8x1/m20", None, (os.fspath(tmp_path / "text"),))
    assert (tuned.train.steps, tuned.optimizer.schedule.warmup_steps, tuned.optimizer.schedule.decay_share) == (20, 2, 0.2)
    assert tuned.optimizer.learning_rate == settings.optimizer.learning_rate / 4
    with pytest.raises(ValueError, match="fine_tuning.seed=0 is that of the sweep's own source"):
        fine_tuned.prepare_new_text(epath.Path(tmp_path), Sweep, FineTuningConfig(seed=0), 10, 32)


GRID = [(params, multiplier) for params in (1e5, 2e5, 4e5, 8e5) for multiplier in (5, 20, 80, 320)]
SAMPLES = (1, 4, 16)


def made(added=lambda probe, params, tokens: 0.1, chances=lambda params, tokens: [0.4, 0.6], held_out=()):
    """Records of a grid of ends."""
    records = []
    for params, multiplier in GRID:
        tokens = params * multiplier
        kept = (params, multiplier) in held_out
        end = {"name": f"{params:g}/m{multiplier}", "params": params, "tokens": tokens, "multiplier": multiplier}
        loss = 3 + 30 / params**0.3 + 30 / tokens**0.3
        end |= {"trunk": f"{params:g}", "fitted": not kept, "held_out": kept, "loss_in_sweep": loss}
        probes = ("rounded to 3 bits", "rounded to 4 bits", "noise 1")
        harms = [{"probe": probe, "loss": (harm := added(probe, params, tokens)), "draws": [harm, harm]} for probe in probes]
        tuned = [{"rate": 0.5, "new_loss": 4.0, "new_excess": 0.5, "forgotten": 0.2}]
        values = [[chance] for chance in chances(params, tokens)]
        records.append({"end": end, "loss": loss, "probes": harms, "tuned": tuned, "chances": values})
    return records


def test_kumars_constants_come_back():
    law = Degradation(0.06, 0.4, 0.3, 0.7)

    def added(probe, params, tokens):
        bits = {"rounded to 3 bits": 3, "rounded to 4 bits": 4}.get(probe)
        return 0.01 * tokens**0.5 / params**0.7 if bits is None else 0.06 * tokens**0.4 / params**0.3 * math.exp(-bits / 0.7)

    rows = fits.probe_rows(made(added))
    found = fits.kumar(rows, (3, 4), resamples=5, seed=0)
    assert found["ends"] == 16
    assert list(found["constants"].values()) == pytest.approx(list(law), rel=1e-3)
    for name, value in found["constants"].items():
        low, high = found["intervals_95"][name]
        assert low - 1e-6 <= value <= high + 1e-6
    powers = {row["probe"]: row for row in fits.exponents(rows, 5, 0)}
    assert powers["noise 1"]["constants"] == pytest.approx({"gamma_D": 0.5, "gamma_N": 0.7})
    assert powers["noise 1"]["intervals_95"]["gamma_D"] == pytest.approx((0.5, 0.5))
    assert powers["fine-tuned at 0.5"]["constants"] == pytest.approx({"gamma_D": 0, "gamma_N": 0}, abs=1e-9)


def test_ends_that_were_not_harmed_are_counted_and_in_no_fit():
    rows = fits.probe_rows(made(lambda probe, params, tokens: 0.1 if params == 1e5 else -0.1))
    found = {row["probe"]: row for row in fits.exponents(rows, 5, 0)}["noise 1"]
    assert (found["ends"], found["harmed"], found["not_fitted"]) == (
        16, 4, "exponents of N and D need 4 ends of several N and M, got 4 of 1 N",
    )  # fmt: skip
    assert fits.kumar(rows, (3, 4), 5, 0)["not_fitted"].startswith("exponents of N and D need 4 ends")


def test_a_trunk_whose_perturbed_loss_turns_is_found():
    added = {5: 0.1, 20: 0.3, 80: 0.2, 320: 5.0}
    rows = fits.probe_rows(made(lambda probe, params, tokens: added[round(tokens / params)]))
    found = {(row["trunk"], row["probe"]): row for row in fits.over_multipliers(rows)}
    row = found["100000", "noise 1"]
    assert (row["ends"], row["steps_up"], row["turns"], row["best_multiplier"], row["last_multiplier"]) == (4, 2, True, 80, 320)
    losses = {r["multiplier"]: r["perturbed_loss"] for r in rows if r["trunk"] == row["trunk"] and r["probe"] == "noise 1"}
    assert row["rise_after_best"] == pytest.approx(losses[320] - losses[80])
    flat = fits.over_multipliers(fits.probe_rows(made()))
    assert not any(row["turns"] or row["steps_up"] for row in flat), "the loss before falls, and as much is added everywhere"


def test_roberts_law_comes_back_and_foresees_what_was_held_out():
    law = TrainToTest(E=0.3, A=40, B=60, alpha=0.35, beta=0.3, G=1.5, gamma=0.6)
    config = QuestionsConfig(symbols=(1,), samples=SAMPLES)
    records = made(held_out=[(8e5, 320)])
    of = lambda record, samples: float(law.loss(record["end"]["params"], record["end"]["tokens"], samples))
    known = {(record["end"]["name"], samples): of(record, samples) for record in records for samples in SAMPLES}

    def rows(records, symbols, config):
        one = lambda record: {name: record["end"][name] for name in ("params", "tokens")}
        return [
            one(record)
            | {"samples": k, "loss": known[record["end"]["name"], k], "one_sample": known[record["end"]["name"], 1]}
            | {"accuracy": math.exp(-known[record["end"]["name"], k]), "error_of_one_sample": 0.1}
            for record in records
            for k in config.samples
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "_of_samples", rows)
        (found,) = fits.answer_laws(records, config, seed=0)
    assert found["ends"] == 15
    assert list(found["approach_1"].values()) == pytest.approx(list(law), rel=0.02)
    assert found["fitted_error_share"]["approach_1"] < 1e-4 and found["held_out_error_share"]["approach_1"] < 1e-3
    assert found["held_out_error_share"]["approach_2"] < 0.3


def test_the_best_size_is_that_of_least_loss_with_the_samples_it_can_pay():
    """With N k fixed a small model draws more: all answer alike here, so the smallest wins, whichever is best on text."""
    records = made(chances=lambda params, tokens: [0.1, 0.2])
    config = QuestionsConfig(symbols=(1,), samples=SAMPLES, inference_flops=(1.6e6, 1e5))
    budget = 6 * 2e5**2 * 80
    rows = fits.best_budgets(records, [{"symbols": 1}], (budget, 1e30), config)
    (row,) = rows
    assert (row["training_flops"], row["inference_flops"]) == (budget, 1.6e6), "of the others no size can draw, or none is there"
    assert row["best"]["name"] == "100000/m320" and row["best"]["samples"] == 8
    hand = [1 - 0.9**8, 1 - 0.8**8]
    assert row["best"]["pass_rate"] == pytest.approx(np.mean(hand))
    assert row["best"]["task_loss"] == pytest.approx(-np.mean(np.log(hand)))
    near = [record for record in records if abs(math.log(record["end"]["params"] * record["end"]["tokens"] * 6 / budget)) < 0.09]
    on_text = min(near, key=lambda record: record["loss"])["end"]
    assert (row["on_text"]["name"], row["on_text"]["samples"]) == (on_text["name"], int(1.6e6 / 2 / on_text["params"]))
    assert row["by_law"] is None
    law = TrainToTest(E=0.3, A=40, B=60, alpha=0.35, beta=0.3, G=1.5, gamma=0.6)
    (by_law, *_) = fits.best_budgets(records, [{"symbols": 1, "approach_1": law._asdict()}], (budget,), config)
    params, tokens, samples = law.optimum(budget, 1.6e6)
    assert by_law["by_law"] == {"params": params, "multiplier": tokens / params, "samples": samples}


def test_a_tasks_loss_has_the_error_of_its_questions():
    config = QuestionsConfig(symbols=(1,), samples=(1,))
    row = fits._of_samples(made(chances=lambda params, tokens: [0.1, 0.2, 0.4]), 1, config)[0]
    losses = [-math.log(chance) for chance in (0.1, 0.2, 0.4)]
    assert row["loss"] == row["one_sample"] == pytest.approx(np.mean(losses))
    assert row["error_of_one_sample"] == pytest.approx(stats.sem(losses))


def test_no_ends_to_fit_are_said():
    (row,) = fits.answer_laws(made(held_out=GRID), QuestionsConfig(symbols=(1,), samples=SAMPLES), seed=0)
    assert row["not_fitted"] == "none of the ends that laws are fitted to is done"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(sweep="", bits=(1,)), "bits must be at least 2"),
        (lambda: Config(sweep="", noise=(0.0,)), "noise must be above 0"),
        (lambda: Config(sweep="", noise_draws=0), "noise_draws must be at least 1, got 0"),
        (lambda: FineTuningConfig(rates=(0.0,)), "tokens, rows and rates must be above 0"),
        (lambda: FineTuningConfig(warmup_share=0.5), r"warmup_share must be in \[0, 0.5\), got 0.5"),
        (lambda: QuestionsConfig(samples=(0,)), "beginning, symbols and samples must be at least 1, got 8"),
        (lambda: QuestionsConfig(count=1), "count must be at least 2, for the error of a mean, got 1"),
        (lambda: QuestionsConfig(seed=2), "seed=2 is that of the sweep's own text"),
    ],
)
def test_settings_without_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
