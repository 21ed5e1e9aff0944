"""A sweep's plan, its runs and what is done when they fail; branches that are, to the bit, the runs that they stand for."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from etils import epath

import run
from experiments import scaling_sweep
from experiments.json_lines import read_lines
from experiments.results import read_results
from experiments.scaling_sweep import Config, carry_out, runs, runs_of
from experiments.scaling_sweep.grid import RulesConfig, TrunkConfig, count, model_of
from lfm_jax.configuration import ConfigError, from_mapping, to_mapping
from lfm_jax.scaling import read_points
from lfm_jax.training.checkpoint_manifest import MANIFEST

CONFIG = "configs/scaling_sweep.py"
# On eight devices, programs of many small parts take several times as long to compile.
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def settings(argument="", **changes):
    config = from_mapping(Config, run._read(f"{CONFIG}{argument}", []).settings)
    return dataclasses.replace(config, **changes)


@functools.cache
def plan(config):
    return {each.name: each for each in runs_of(config.trunks, config.budgets, config.pretrain, config.rules)}


def tiny(**changes):
    """One trunk of one layer, in this process."""
    config = settings(":quick")
    model = dataclasses.replace(config.pretrain.model, layer_types=("conv",))
    trunk = TrunkConfig(embed_dim=8, layers=1, multipliers=(20.0, 40.0), apart=(20.0,))
    given = {
        "pretrain": dataclasses.replace(config.pretrain, model=model), "trunks": (trunk,), "processes": 1, "draws": 2,
        "rules": RulesConfig(batch_exponent=0.0), "train_tokens": 30_000, "held_out_tokens": 500,
    }  # fmt: skip
    return dataclasses.replace(config, **given | changes)


def test_the_sweep_has_the_sizes_columns_and_held_out_points_it_says():
    planned = plan(settings())
    ends = [each for each in planned.values() if each.multiplier is not None]
    assert sorted({each.counts.params for each in ends if each.trunk.fitted}) == [80528, 147296, 294528, 661408, 1174720]
    assert [each.name for each in ends if each.held_out] == ["48x3/m1280", "64x3/m320", "128x6/m20"]
    assert {each.multiplier for each in ends if each.fitted and each.budget is None} == {5, 10, 20, 40, 80, 160, 320, 640}
    assert {each.trunk.seed for each in ends if each.trunk.size == (48, 3)} == {0, 1, 2}
    for budget in settings().budgets:
        sizes = {each.trunk.size for each in ends if abs(math.log(each.flops / budget)) < math.log(1.1) and each.trunk.fitted}
        assert len(sizes) >= 3, f"{budget} has {sizes}"
    assert max(each.tokens for each in ends) <= settings().train_tokens


def test_the_recorded_runs_are_all_of_the_sweep_as_it_is():
    recorded, planned = epath.Path(ROOT) / "experiments" / "scaling_study" / "recorded", plan(settings())
    found = runs.read_recorded(recorded / "runs.jsonl", planned.values())  # refuses runs that had other settings
    assert found.keys() == planned.keys()
    lines = list(read_lines(recorded / "points.jsonl"))
    floor = lines[0]["loss"] - lines[0]["excess_loss"]
    made = [each for each in runs.points_of(planned.values(), found, floor) if each["multiplier"] is not None]
    assert [each | {"excess_loss": pytest.approx(each["excess_loss"])} for each in made] == lines


def test_a_models_parameters_are_those_counted_by_hand():
    """Conv: in, out, taps; attention: q, k, v, o and norms of q and k; feed-forward; two norms a block and one at the end."""
    d, f, hd = 48, 128, 16
    conv, attention, mlp = 4 * d * d + 3 * d, 2 * d * d + 2 * d * hd + 2 * hd, 3 * d * f
    found = next(each for each in plan(settings()).values() if each.trunk.size == (48, 3))
    assert found.counts.params == 2 * conv + attention + 3 * (mlp + 2 * d) + d
    assert found.counts.embedding == 256 * d


def test_branches_leave_the_trunk_where_they_begin_to_decay():
    for trunk in ("48x3", "96x6"):
        own = [each for each in plan(settings()).values() if each.trunk.name == trunk]
        pieces = {each.name: each for each in own if each.multiplier is None}
        for each in own:
            share = each.config.optimizer.schedule.decay_share
            assert share == (0.2 if each.multiplier else 0.0)
            assert each.start == (pieces[each.parent].steps if each.parent else 0) < each.steps
            assert each.start <= each.steps - round(share * each.steps), "a branch starts when its own rate has changed already"
            same = own[0].config.optimizer
            assert dataclasses.replace(each.config.optimizer.schedule, decay_share=0.0) == dataclasses.replace(
                same.schedule, decay_share=0.0
            )
            if each.multiplier:
                tokens = each.multiplier * each.counts.params
                assert abs(each.tokens - tokens) <= each.config.loader.positions(1) / 2
        assert sum(each.own_tokens for each in own) < 0.65 * sum(each.tokens for each in own if each.multiplier)


def test_what_a_run_is_trained_with_follows_the_rules():
    config, planned = settings(), plan(settings())
    base = config.pretrain
    of_base = count(base.model, 128).params
    for each in planned.values():
        optimizer, loader, params = each.config.optimizer, each.config.loader, each.counts.params
        assert optimizer.matrix_rate == 64 / each.trunk.embed_dim
        assert optimizer.learning_rate == base.optimizer.learning_rate * each.trunk.rate
        assert abs(math.log2(loader.batch_size / base.loader.batch_size) - 0.5 * math.log2(params / of_base)) <= 0.5
        assert abs(optimizer.schedule.warmup_steps * loader.positions(1) - params) <= loader.positions(1)
        assert (loader.seed, each.config.train.seed, loader.epochs) == (each.trunk.seed, each.trunk.seed, 1)
    wider = runs_of(config.trunks[-2:-1], (), base, RulesConfig(batch_exponent=1.0, warmup=2.0))[0]
    assert wider.config.loader.batch_size == 16 * 8
    assert wider.config.optimizer.schedule.warmup_steps == round(2 * wider.counts.params / (16 * 8 * 128))


def test_attention_only_has_as_many_parameters():
    base = settings().pretrain.model
    for size in ((48, 3), (64, 3), (128, 6)):
        trunk = TrunkConfig(embed_dim=size[0], layers=size[1], multipliers=(1,))
        twin = model_of(base, dataclasses.replace(trunk, attention_only=True))
        assert set(twin.layer_types) == {"full_attention"}
        assert count(twin, 128).params == pytest.approx(count(model_of(base, trunk), 128).params, rel=0.01)


def test_a_budget_near_a_column_that_is_there_makes_no_run_of_its_own():
    config = settings()
    trunk = TrunkConfig(embed_dim=48, layers=3, multipliers=(10, 20, 80))
    budget = lambda multiplier: 6 * 80528**2 * multiplier
    budgets = (budget(21), budget(40), budget(200), budget(5))
    found = runs_of((trunk,), budgets, config.pretrain, config.rules)
    assert [each.multiplier for each in found if each.budget] == pytest.approx([40])
    held_out = dataclasses.replace(trunk, held_out=(80,))
    assert not [each for each in runs_of((held_out,), budgets, config.pretrain, config.rules) if each.budget]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep that met half a copy of a checkpoint where a branch begins, as a kill leaves it."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("sweep")), tiny()
    branch = plan(config)["8x1/m20"]
    half = workdir / "runs" / branch.name / "checkpoints" / f"{branch.start:08d}" / "state"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_text("half of it")
    code = (
        "import json, sys; from etils import epath; from experiments import scaling_sweep; "
        "from lfm_jax.configuration import from_mapping; "
        "scaling_sweep.main(from_mapping(scaling_sweep.Config, json.load(sys.stdin)), epath.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, os.fspath(workdir)]
    ended = subprocess.run(
        command, input=json.dumps(to_mapping(config)), cwd=ROOT, env=os.environ | ONE_DEVICE, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return workdir


def last_checkpoint(workdir, each):
    manifest = workdir / "runs" / each.name / "checkpoints" / f"{each.steps:08d}" / MANIFEST
    return {name: json.loads(manifest.read_text())[name] for name in ("leaves", "data_state")}


def test_a_branch_is_to_the_bit_the_run_from_nothing(swept):
    """Parameters, the optimizer's averages, and where the data stand."""
    branch, apart = plan(tiny())["8x1/m20"], plan(tiny())["8x1/m20-apart"]
    assert branch.start > 0 == apart.start and branch.steps == apart.steps
    assert last_checkpoint(swept, branch) == last_checkpoint(swept, apart)
    (pair,) = read_results(swept)["apart"]
    assert pair["difference_share"] == 0
    started = [read_results(swept / "runs" / name)["resumed_at_step"] for name in (branch.name, apart.name, "8x1/m40")]
    assert started == [branch.start, 0, branch.start]
    assert "bigram_bits_per_byte" not in read_results(swept / "runs" / branch.name), "counting it takes longer than the run"


def test_a_process_of_its_own_does_the_same_and_says_in_a_file_what_it_says(swept, monkeypatch):
    for name, value in ONE_DEVICE.items():
        monkeypatch.setenv(name, value)
    branch = plan(tiny())["8x1/m20"]
    before = last_checkpoint(swept, branch)
    (swept / "runs" / branch.name).rmtree()
    found = carry_out(list(plan(tiny()).values()), swept, swept, attempts=2, processes=2)
    assert {status.state for status in found.values()} == {"done"}
    assert last_checkpoint(swept, branch) == before
    assert f"resumed at step {branch.start} of {branch.steps}" in (swept / "runs" / branch.name / "log.txt").read_text()


def test_a_sweep_says_what_it_saved_and_what_no_law_could_be_fitted_to(swept):
    results = read_results(swept)
    planned = plan(tiny()).values()
    assert results["runs_done"] == results["runs"] == 4 and results["points"] == results["points_wanted"] == 2
    assert results["tokens_of_separate_runs"] == sum(each.tokens for each in planned if each.multiplier and not each.apart)
    assert results["tokens_trained"] == sum(each.tokens for each in planned if each.name == "8x1/m40") + sum(
        each.tokens - each.config.loader.positions(each.start) for each in planned if each.name == "8x1/m20"
    )
    assert {row["not_fitted"] for row in results["laws"]} == {"4 constants need at least as many points, got 2"}
    assert results["noise"] is None
    points = read_points(swept / "points.jsonl")
    ends = ("m20", "m40")  # the run apart is in no fit
    assert points.loss.tolist() == [read_results(swept / "runs" / "8x1" / end)["nll_per_token"] for end in ends]
    assert results["log_loss_of_source"] < points.loss.min() < 6
    text = (swept / "scaling_sweep.md").read_text()
    assert "2 of 2 points, 4 of 4 runs" in text and "the noise is not known" in text
    assert (swept / "scaling_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_run_again(swept):
    written = {path: path.stat().mtime for path in sorted((swept / "runs").glob("*/*/results.json"))}
    results = read_results(swept)
    scaling_sweep.main(tiny(), swept)
    assert {path: path.stat().mtime for path in written} == written and len(written) == 4
    assert read_results(swept)["ends"] == results["ends"]
    config = tiny(pretrain=dataclasses.replace(tiny().pretrain, optimizer=dataclasses.replace(tiny().pretrain.optimizer, b2=0.9)))
    with pytest.raises(ConfigError, match=r"trunk-\d+ holds a run with other settings: optimizer.b2 was 0.95, is 0.9"):
        scaling_sweep.main(config, swept)


def test_what_was_done_elsewhere_is_not_done_here(swept, tmp_path, monkeypatch):
    """A part of a sweep, from its manifest alone: what is left needs the trunk, which is not here."""
    monkeypatch.setattr(runs, "run_one", lambda run, folder: pytest.fail(f"{run.name} is carried out"))
    manifest = swept / "runs.jsonl"
    folder = {"folder": os.fspath(swept), "recorded": os.fspath(manifest)}
    (swept / "runs").rename(swept / "elsewhere")
    try:
        scaling_sweep.main(tiny(**folder), epath.Path(tmp_path))
    finally:
        (swept / "elsewhere").rename(swept / "runs")
    for name in ("points.jsonl", "runs.jsonl"):
        assert (tmp_path / name).read_text() == (swept / name).read_text()
    assert read_results(epath.Path(tmp_path))["run_seconds"] == read_results(swept)["run_seconds"] > 0
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["config"]["optimizer"]["b2"] = 0.9
    other = tmp_path / "other.jsonl"
    for content, message in (
        (json.dumps(lines[0]), r"other.jsonl: 8x1/trunk-\d+ had other settings: optimizer.b2 was 0.9, is 0.95 \(1 such\)"),
        ('{"name": 1}', "other.jsonl is no runs.jsonl of a sweep: KeyError"),
        ("[", "other.jsonl is no runs.jsonl of a sweep: JSONDecodeError"),
    ):
        other.write_text(content)
        with pytest.raises(ConfigError, match=f"--config.recorded: .*{message}"):
            scaling_sweep.main(tiny(**folder | {"recorded": os.fspath(other)}), epath.Path(tmp_path))
    with pytest.raises(ConfigError, match=r"--config.recorded: .*nowhere"):
        scaling_sweep.main(tiny(**folder | {"recorded": os.fspath(tmp_path / "nowhere")}), epath.Path(tmp_path))


def test_a_branch_of_a_trunk_that_is_gone_is_refused(tmp_path):
    branch = plan(tiny())["8x1/m20"]
    with pytest.raises(ConfigError, match=f"{branch.start:08d} is no checkpoint, and a run is to start from it"):
        runs.run_one(branch, epath.Path(tmp_path))


FIGURES = {"nll_per_token": 4.0, "goodput": [{"kind": "step", "seconds": 2.0}, {"kind": "down", "seconds": 5.0}]}


def fake_work(each, folder, number):
    """Of a process of its own: what becomes of a run is said by its name."""
    place = epath.Path(folder) / "runs" / each.name
    place.mkdir(parents=True, exist_ok=True)
    tried = place / "tried"
    tried.write_text(f"{tried.read_text() if tried.exists() else ''}{number}")
    if each.trunk.seed == 1:
        (place / "log.txt").write_text("x" * 5000 + "the disk is full")
        sys.exit(3)
    if each.trunk.seed == 2 and len(tried.read_text()) == 1:
        os._exit(75)  # told to stop
    (place / "results.json").write_text(json.dumps(FIGURES))


def test_failed_runs_are_tried_again_marked_and_in_no_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_work", fake_work)
    trunks = [TrunkConfig(embed_dim=8, layers=1, multipliers=(20, 40)[: 3 - seed], seed=seed) for seed in (1, 2)]
    config = tiny(trunks=tuple(trunks))
    planned, folder = list(plan(config).values()), epath.Path(tmp_path)
    found = carry_out(planned, folder, folder, attempts=1, processes=2)
    states = {name: (status.state, len(status.attempts)) for name, status in found.items()}
    piece = next(each.name for each in planned if each.multiplier is None)
    blocked = dict.fromkeys(("8x1-seed1/m20", "8x1-seed1/m40"), ("blocked", 0))
    assert states == {piece: ("failed", 1), **blocked, "8x1-seed2/m20": ("done", 0)}
    assert [attempt["exit_code"] for attempt in found[piece].attempts] == [3]
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [states[each.name][0] for each in planned]
    assert lines[0]["error"].endswith("the disk is full") and len(lines[0]["error"]) == 2000
    assert (lines[-1]["nll_per_token"], lines[-1]["seconds"], lines[0]["seconds"]) == (4, 2, None)
    assert lines[-1]["config"]["train"]["steps"] == planned[-1].steps
    assert [point["name"] for point in runs.points_of(planned, found, floor=3.0)] == ["8x1-seed2/m20"]
    missing = scaling_sweep._summary(planned, found)["missing"]
    assert [each["name"] for each in missing] == [each.name for each in planned[:3]]

    assert carry_out(planned, folder, folder, attempts=1, processes=2) == found, "what has failed is not tried again"
    tried = lambda name: (folder / "runs" / name / "tried").read_text()
    assert {tried(piece), tried("8x1-seed2/m20")[:1]} == {"0", "1"}, "each works on a core of its own"
    assert len(tried("8x1-seed2/m20")) == 2, "it was told to stop once, which is no failure"
    again = runs.statuses(planned, folder, attempts=2)
    assert [again[each.name].state for each in planned] == ["waiting"] * 3 + ["done"], "unless more attempts are allowed"


def test_in_one_process_a_failed_run_is_not_the_end_of_the_others(tmp_path, monkeypatch, capsys):
    tried = []

    def fake(each, folder):
        tried.append(each.name)
        if each.trunk.seed == 1:
            raise OSError("x" * 5000 + "the disk is full")
        (folder / "runs" / each.name).mkdir(parents=True)
        (folder / "runs" / each.name / "results.json").write_text(json.dumps(FIGURES))

    monkeypatch.setattr(runs, "run_one", fake)
    config = tiny(trunks=tuple(TrunkConfig(embed_dim=8, layers=1, multipliers=(20, 40), seed=seed) for seed in (1, 2)))
    planned, folder = list(plan(config).values()), epath.Path(tmp_path)
    found = carry_out(planned, folder, folder, attempts=2, processes=1)
    assert [found[each.name].state for each in planned] == ["failed", "blocked", "blocked", "done", "done", "done"]
    assert tried == [planned[0].name, *(each.name for each in (planned[0], *planned[3:]))]
    assert found[planned[0].name].attempts[1]["log_end"].endswith("the disk is full\n")
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(runs, "run_one", lambda run, folder: (_ for _ in ()).throw(ConfigError("a mistake")))
    with pytest.raises(ConfigError, match="a mistake"):
        carry_out(planned, folder, folder, attempts=3, processes=1)


def test_a_piece_that_was_done_elsewhere_is_done_again_where_a_run_starts_from_it(tmp_path):
    config = tiny(trunks=tuple(TrunkConfig(embed_dim=8, layers=1, multipliers=(20, 40, 80), seed=seed) for seed in (0, 1)))
    planned, folder = list(plan(config).values()), epath.Path(tmp_path)
    of_seed = lambda seed: [each for each in planned if each.trunk.seed == seed]
    done = runs.Status("done", [], 4.0, 1.0)
    last = next(each for each in of_seed(0) if each.multiplier == 80)
    recorded = {each.name: done for each in planned if each is not last}
    pieces = [each.name for each in of_seed(0) if each.multiplier is None]
    assert len(pieces) == 2
    needed = runs._not_needed_here(planned, folder, recorded)
    assert set(recorded) - set(needed) == set(pieces)
    (folder / "runs" / pieces[0]).mkdir(parents=True)
    (folder / "runs" / pieces[0] / "results.json").write_text("{}")
    needed = runs._not_needed_here(planned, folder, recorded)
    assert set(recorded) - set(needed) == {pieces[1]}, "the first is here"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_tokens": 100}, "8x1/m40 sees 19968, and no token shall come twice"),
        ({"source": {"longest": 32}}, "source.longest=32 symbols and the beginning do not fit into rows of 32"),
        ({"source": {"first_id": 2, "longest": 31}}, "source.first_id=2: ids 0 to 2 are the tokenizer's"),
        ({"trunks": (TrunkConfig(embed_dim=8, layers=1, multipliers=(20,)),) * 2}, "two runs are called 8x1/m20"),
        ({"trunks": (TrunkConfig(embed_dim=12, layers=1, multipliers=(20,)),)}, "embed_dim=12, layers=1: expected a multiple"),
    ],
)
def test_what_cannot_be_swept_is_refused(changes, message, tmp_path):
    if "source" in changes:
        changes = {"source": dataclasses.replace(tiny().source, **changes["source"])}
    with pytest.raises(ValueError, match=message):
        scaling_sweep.main(tiny(**changes), epath.Path(tmp_path))


def test_several_machines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="each trunk of a sweep is for one machine"):
        scaling_sweep.main(tiny(), epath.Path(tmp_path))


def test_another_text_in_the_folder_is_refused(swept):
    with pytest.raises(ConfigError, match="text holds another text"):
        scaling_sweep.main(tiny(held_out_tokens=501), swept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"draws": 1}, "draws must be at least 2, got 1"),
        ({"only": "8x2"}, "no trunk is called '8x2'. Did you mean '8x1'"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    with pytest.raises(ValueError, match="pretrain.model must be given, and no pretrain.init_from"):
        tiny(pretrain=dataclasses.replace(tiny().pretrain, init_from="elsewhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multipliers": (20, 20)}, "multipliers must be different numbers above 0"),
        ({"held_out": (30,)}, "held_out has 30, which is none of multipliers"),
        ({"apart": (30,)}, "apart has 30, which is none of multipliers"),
    ],
)
def test_a_trunk_without_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrunkConfig(**{"embed_dim": 8, "layers": 1, "multipliers": (20,)} | changes)


def test_a_config_takes_no_other_argument():
    with pytest.raises(ConfigError, match="takes no argument but 'quick'"):
        settings(":slow")
