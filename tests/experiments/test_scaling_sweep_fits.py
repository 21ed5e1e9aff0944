"""The fits of a sweep on points made by a known law: constants, noise, intervals; and the same runs as jobs."""

import dataclasses
import json
import os
import subprocess

import numpy as np
import pytest
import yaml
from etils import epath

import run
from experiments import scaling_sweep
from experiments.scaling_sweep import Config, fits, tables
from experiments.scaling_sweep.pictures import plot
from experiments.scaling_sweep.runs import about
from experiments.scaling_sweep.text import Known
from lfm_jax.configuration import from_mapping
from lfm_jax.scaling.chinchilla import Chinchilla

CONFIG = "configs/scaling_sweep.py"
LAW = Chinchilla(2.9, 6.3, 33.0, 0.3, 0.33)
KNOWN = Known(2.9, 2.9, 0.001)


@pytest.fixture(scope="module")
def planned():
    config = from_mapping(Config, run._read(CONFIG, []).settings)
    return scaling_sweep.runs_of(config.trunks, config.budgets, config.pretrain, config.rules)


def rows(planned, shared=0.0, own=0.0, seed=0):
    """The law's losses at the runs, with noise that the runs of a trunk have in common and with noise of their own."""
    random = np.random.default_rng(seed)
    of_trunk = {each.trunk.name: shared * random.standard_normal() for each in planned}
    found = []
    for each in planned:
        off = of_trunk[each.trunk.name] + own * random.standard_normal()
        loss = float(LAW.loss(each.counts.params, each.tokens) * np.exp(off))
        found.append(about(each) | {"loss": loss, "excess_loss": loss - KNOWN.log_loss})
    return found


@pytest.fixture(scope="module")
def noisy(planned):
    points = rows(planned, own=5e-4)
    noise = fits.noise_of(points)
    return points, noise, fits.fit_laws(points, noise, KNOWN, draws=12, seed=0)


def test_the_law_that_made_the_points_is_found_and_foresees_what_was_held_out(planned):
    found = fits.fit_laws(rows(planned), None, KNOWN, draws=2, seed=0)
    row = next(row for row in found if (row["law"], row["count"]) == ("chinchilla", "without_embedding"))
    assert row["constants"] == pytest.approx(LAW._asdict(), rel=2e-3) and row["E_minus_known"] == pytest.approx(0, abs=1e-3)
    assert [each["name"] for each in row["held_out"]] == ["48x3/m1280", "64x3/m320", "128x6/m20"]
    assert max(abs(each["error_share"]) for each in row["held_out"]) < 1e-5
    assert row["points"] == sum(each.fitted for each in planned) == 25
    assert row["optimal_exponent"] == pytest.approx(0.33 / 0.63, rel=1e-2)
    assert not any("within_noise" in each for row in found for each in row["held_out"])


def test_intervals_have_what_noise_does_and_miss_what_a_wrong_law_does(noisy):
    _, _, found = noisy
    held_out = lambda law: next(
        row["held_out"] for row in found if (row["law"], row["count"]) == (law, "without_embedding")
    )
    # The ends of twelve draws are no sharp limits: an error may be twice as large by chance.
    beyond = lambda each: abs(each["error_share"]) / max(-each["noise_low_95"], each["noise_high_95"])
    assert max(map(beyond, held_out("chinchilla"))) < 2
    assert all(each["noise_low_95"] < 0 < each["noise_high_95"] < 0.01 for each in held_out("chinchilla"))
    assert min(map(beyond, held_out("kaplan"))) > 2, "it has no E, and cannot bend as these points do"
    assert not any(each["within_noise"] for each in held_out("kaplan"))
    row = next(row for row in found if row["law"] == "chinchilla_alpha_is_beta")
    low, high = row["intervals_95"]["E"]
    assert low < row["constants"]["E"] < high and row["draws"] == 12


def test_noise_is_told_apart_into_what_a_trunk_shares_and_what_is_a_runs_own(planned):
    """Each in its own plan of many seeds; with three of them it is only about right."""
    columns = [each for each in planned if each.trunk.name in ("48x3", "48x3-seed1") and each.multiplier in (10, 20, 40, 80)]
    columns = [each for each in columns if each.trunk.seed == 1]
    many = [each._replace(trunk=dataclasses.replace(each.trunk, seed=seed)) for each in columns for seed in range(300)]
    noise = fits.noise_of(rows(many, shared=2e-3, own=1e-3))
    assert (noise.seeds, noise.columns) == (300, 4)
    assert noise.shared == pytest.approx(2e-3, rel=0.1) and noise.own == pytest.approx(1e-3, rel=0.1)
    one = [each for each in many if each.multiplier == 10]
    assert fits.noise_of(rows(one, shared=3e-3, own=4e-3)).own == pytest.approx(5e-3, rel=0.1)
    assert fits.noise_of(rows([each for each in many if each.trunk.seed == 0])) is None


def test_optima_are_those_of_the_law(planned):
    """Parabolas through the columns of points that the law makes: nearly its own optimum."""
    budgets = (6.2e12, 2.5e13, 4.15e13)
    found = {row["way"]: row for row in fits.optima(rows(planned), budgets)}
    for budget in budgets:
        row = found[f"IsoFLOP, {budget:.3g}"]
        if "not_found" not in row:
            assert row["params"] == pytest.approx(LAW.optimum(budget)[0], rel=0.25)
    assert "params" in found["IsoFLOP, 2.5e+13"]
    worse = [row | {"loss": row["params"] ** 0.1} for row in rows(planned)]
    assert "no minimum" in fits.optima(worse, budgets)[0]["not_found"]


def test_pairs_differ_in_one_thing(noisy):
    points, noise, _ = noisy
    found = fits.compared(points, noise)
    assert [(pair["name"], pair["other"]) for pair in found["apart"]] == [("48x3/m20-apart", "48x3/m20")]
    twins = {f"48x3/m{multiplier}" for multiplier in (20, 40, 80)}
    assert {pair["other"] for pair in found["attention_only"]} == twins
    names = {f"{size}-rate{rate}/{end}" for size, end in (("48x3", "m20"), ("64x6", "m10")) for rate in ("0.5", "2")}
    assert {pair["name"] for pair in found["rates"]} == names
    assert found["apart"][0]["noise_of_a_difference_share"] == pytest.approx(2**0.5 * np.hypot(noise.shared, noise.own))


def test_tables_and_picture_show_all_of_it(noisy, tmp_path):
    points, noise, laws = noisy
    figures = {
        "points": 52, "points_wanted": 53, "runs": 92, "runs_done": 91, "failed_attempts": 2, "tokens_trained": 1,
        "tokens_of_separate_runs": 2, "flops_trained": 1.0, "flops_of_separate_runs": 2.0, "saving_factor": 2.0,
        "missing": [{"name": "48x3/m640", "state": "failed", "attempts": 2}], "entropy": 2.9, "entropy_error": 0.001,
        "log_loss_of_source": 2.9, "noise": noise._asdict(), "laws": laws, "optima": fits.optima(points, (2.5e13,)),
        "ends": [point for point in points if point["multiplier"] is not None], **fits.compared(points, noise),
    }  # fmt: skip
    text = tables.markdown(figures)
    assert "52 of 53 points, 91 of 92 runs; 2 attempts failed." in text
    assert "| 48x3/m640 | failed | 2 |" in text.split("## Missing, and in no fit")[1]
    assert text.count("| 48x3/m1280 |") == 8 + 1 and "held out |" in text
    for line in text.splitlines():
        assert "nan" not in line
    plot(points, figures, epath.Path(tmp_path) / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def render(workdir, folder):
    """As run.py would be asked for jobs; the scripts."""
    command = ["--config.attempts=3", "--config.train_tokens=450000", "--config.render=true", f"--config.folder={folder}"]
    assert run.main([f"--config={CONFIG}:quick", f"--workdir={workdir}", *command]) == 0
    return workdir / "jobs" / "sweep.sbatch", workdir / "jobs" / "launch.sh"


@pytest.fixture
def shell(tmp_path):
    """(script, arguments, exit code of what it calls, variables) -> exit code, and what was called, with its arguments."""
    for name in ("srun", "scontrol", "python"):
        text = f'#!/bin/bash\nprintf "%s\\n" {name} "$@" >> "{tmp_path}/called"\necho >> "{tmp_path}/called"\nexit $CODE\n'
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(script, *arguments, code=0, **variables):
        (tmp_path / "called").unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)} | variables
        ended = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)
        assert not ended.stderr
        return ended.returncode, [each.splitlines() for each in (tmp_path / "called").read_text().split("\n\n") if each]

    return call


def read(arguments):
    """The experiment's configuration and the workdir that a command asks for."""
    arguments, overrides = run._split_overrides(arguments)
    values = run._parse_flags(arguments)
    return from_mapping(Config, run._read(values.config, overrides).settings), values.workdir


def test_an_array_of_slurm_runs_each_trunk_and_asks_for_another_turn(shell, tmp_path):
    folder = tmp_path / "shared by all"
    script, _ = render(tmp_path / "jobs", folder)
    assert (folder / "text" / "tokens" / "train" / "index.json").exists()
    assert json.loads((tmp_path / "jobs" / "results.json").read_text())["jobs"] == 4
    assert "#SBATCH --array=0-3\n" in script.read_text()
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    for code, after in ((0, []), (1, []), (75, [["scontrol", "requeue", "7_1"]])):
        ended, ((*program, config), *others) = _split(shell(script, code=code, **task))
        assert (ended, program, others) == (code, ["srun", "python", "run.py"], after)
        config, workdir = read(config)
        assert (config.only, config.folder, config.processes, config.render) == ("8x2-seed1", str(folder), 1, False)
        assert (config.attempts, config.train_tokens) == (3, 450_000), "what was changed on the command line is lost"
        assert workdir == f"{folder}/jobs/8x2-seed1"


def _split(called):
    ended, ((*first,), *others) = called
    return ended, [[*first[:3], first[3:]], *others]


def test_each_trunk_is_launched_under_a_name_of_its_own(shell, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(scaling_sweep, "prepare_text", lambda folder, *rest: asked.append(os.fspath(folder)))
    _, script = render(tmp_path / "jobs", "gs://bucket/sweep")
    assert asked == ["gs://bucket/sweep"]
    _, called = shell(script, "--launch=gke", "--launch.topology=v5e:1x1", "--launch.image=image", "--dry_run")
    assert [each[:2] for each in called] == [["python", "run.py"]] * 4
    manifests = []
    for each in called:
        capsys.readouterr()
        assert run.main(each[2:]) == 0
        manifests.append(next(yaml.safe_load_all(capsys.readouterr().out)))
    trunks = ["8x2", "8x2-seed1", "16x2", "16x3"]
    assert [each["metadata"]["name"] for each in manifests] == [f"sweep-{trunk}" for trunk in trunks]
    for trunk, manifest in zip(trunks, manifests, strict=True):
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        config, workdir = read(pod["containers"][0]["command"][2:])
        assert (config.only, config.folder, workdir) == (trunk, "gs://bucket/sweep", f"gs://bucket/sweep/jobs/{trunk}")
