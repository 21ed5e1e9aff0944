"""The whole chain of a tiny model, stopped in the middle and gone on with; what counts as fewer doom loops; what is left out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from etils import epath

import run
from data_pipelines.tasks.numbers_game import NumbersGame
from experiments import doom_loop
from experiments.doom_loop import Config
from experiments.doom_loop.figures import claims_of, differs, markdown, pooled
from experiments.doom_loop.steps import ABLATIONS, CHAIN, Step, changed
from lfm_jax.configuration import ConfigError, from_mapping

COMMAND = "--config=configs/doom_loop.py:quick"
STAGES = ("pretrain", "sft", "preferences", "dpo", "rl")
STEPS = (*STAGES, "loops", "ftpo")
TINY = {
    "texts": 300, "conversations.conversations": 200, "ablations": "final_token", "pretrain.optimizer.matrices": "adamw",
    "pretrain.model.embed_dim": 16,
    "pretrain.model.layer_types": "conv,full_attention", "pretrain.model.mlp_dim": 32, "pretrain.model.num_heads": 1,
    "pretrain.model.head_dim": 16, "measure.problems": 8, "measure.temperatures": "0,0.6", "measure.max_new_tokens": 32,
    "preferences.max_new_tokens": 46, "preferences.prompts": 32, "preferences.temperature": 5.0, "text.tokenization.workers": 1,
    "rl.rollouts.max_new_tokens": 32, "rl.rollouts.seq_len": 64, "rl.rollouts.prompts": 8,
    "rl.rollouts.temperatures": "((1.0,1),(0.0,1))", "rl.evaluation.problems": 8, "rl.rollouts.buckets": 1,
    "dpo.data.held_out_share": 0.5, "ftpo.held_out_share": 0.5, "ftpo.loader.batch_size": 8,
    **{f"{stage}.loader.seq_len": 64 for stage in ("pretrain", "sft", "dpo")},
    **{f"{stage}.loader.batch_size": 8 for stage in ("pretrain", "sft", "dpo")},
    **{f"{stage}.train.{what}": 2 for stage in (*STAGES, "ftpo") if stage != "preferences"
       for what in ("steps", "evaluate_every", "checkpoint_every")},
    **{f"{stage}.optimizer.schedule.warmup_steps": 0 for stage in (*STAGES, "ftpo") if stage != "preferences"},
}  # fmt: skip


def settings(**changes):
    request = run._read(COMMAND.partition("=")[2], list(changes.items()))
    return from_mapping(Config, request.settings)


def start(workdir, *more):
    """As a process of its own on one device: on eight, programs of many small parts take several times as long to compile."""
    command = [sys.executable, "run.py", COMMAND, f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in TINY.items()]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_whole_chain_stopped_in_the_middle_goes_on_where_it_was(tmp_path):
    seed = tmp_path / "seed_0"
    stopped = start(tmp_path, "--config.dpo.data.held_out_share=0.00001")
    assert stopped.returncode == 2 and "is in the 'held_out' split with held_out_share 1e-05" in stopped.stderr
    written = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("results.json"))}
    names = ["preferences", "pretrain", "pretrain_measured", "sft", "sft_measured"]
    assert [path.parent.name for path in written if path.parent.parent == seed] == names

    went_on = start(tmp_path, "--allow_config_change")
    assert went_on.returncode == 0, went_on.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a stage that had ended was run again"
    results = json.loads((tmp_path / "results.json").read_text())
    _check_results(results, seed)
    _check_starts(tmp_path)

    before = {path: path.read_bytes() for path in seed.rglob("results.json")}
    doom_loop.main(from_mapping(Config, results["config"]), epath.Path(tmp_path))  # there is nothing left to do but the figures
    assert {path: path.read_bytes() for path in seed.rglob("results.json")} == before
    again = json.loads((tmp_path / "results.json").read_text())
    assert (again["rows"], again["claims"]) == (results["rows"], results["claims"])


def _check_results(results, seed):
    rows = results["rows"]
    assert [(row["step"], row["temperature"]) for row in rows] == [
        (step, temperature) for step in STEPS if step not in ("preferences", "loops") for temperature in (0.0, 0.6)
    ]
    for row in rows:
        answers = [json.loads(line) for line in (seed / f"{row['step']}_measured" / "answers.jsonl").read_text().splitlines()]
        answers = [each for each in answers if each["temperature"] == row["temperature"]]
        assert row["tail_loop_share"] == np.mean([each["ending"] == "tail_loop" for each in answers]) and row["answers"] == 8
    assert set(results["seconds_by_step"]) == set(STEPS) and min(min(each) for each in results["seconds_by_step"].values()) > 0
    assert [claim["step"] for claim in results["claims"]] == ["dpo", "rl", "ftpo"]


def _check_starts(workdir):
    """Each stage began with the model of the stage before, by the tokenizer that the text was read with."""
    config = lambda name: json.loads((workdir / "seed_0" / name / "config.json").read_text())
    assert {name: epath.Path(config(name)["init_from"]).name for name in STEPS[1:]} == {
        "sft": "pretrain", "preferences": "sft", "dpo": "sft", "rl": "dpo", "loops": "sft", "ftpo": "sft",
    }  # fmt: skip
    tokenizers = {(workdir / "seed_0" / name / "tokenizer" / "tokenizer.model").read_bytes() for name in ("sft", "dpo", "rl")}
    assert tokenizers == {(workdir / "text" / "tokenizer" / "tokenizer.model").read_bytes()}
    line = json.loads((workdir / "text.jsonl").read_text().splitlines()[0])
    assert line["text"] == NumbersGame().rough_text(0, 2)
    pair = json.loads((workdir / "seed_0" / "preferences" / "pairs" / "000000.jsonl").read_text().splitlines()[0])
    assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_the_stage_with_one_thing_changed(name):
    """Its settings are valid, differ from the chain's, and each step starts from one that is there by then."""
    config, made = settings(), {step.name for step in CHAIN}
    for step in ABLATIONS[name]:
        assert step.after in made and (step.pairs is None or step.pairs in made) and step.name not in made
        made.add(step.name)
        chain = next((each for each in CHAIN if each.stage == step.stage), Step("none", step.stage, None))
        same = getattr(config, step.stage)
        assert changed(same, step.changes or {}) != same or (step.after, step.pairs) != (chain.after, chain.pairs)


def test_a_change_of_a_field_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="rewards.ngram_penalti"):
        changed(settings().rl, {"rewards.ngram_penalti": 0.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": "0"}, "seeds, texts and processes must be at least 1, and ablation_seeds from 0 to seeds, got 0"),
        ({"ablation_seeds": "2"}, "ablation_seeds from 0 to seeds, got 1, .* and 2"),
        ({"hard_share": "1.5"}, "hard_share must be from 0 to 1, got 1.5"),
        ({"ablations": "no_penalti"}, "no ablation is named 'no_penalti'. Did you mean 'no_penalty'"),
        ({"measure.temperatures": "0.1,0.6"}, r"measure.temperatures must have 0, where loops are, got \(0.1, 0.6\)"),
    ],
)
def test_settings_that_make_no_experiment_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def measured(loops, right, of=200, tokens=50.0):
    """Rows of a step at temperatures 0 and 0.6, as of a measurement; loops and right: of the greedy answers, and of the drawn."""
    shares = lambda name, count: {f"{name}_count": count, f"{name}_share": count / of}
    return {"seconds": 1.0, "rows": [
        {"task": "a", "temperature": temperature, "answers": of, **shares("tail_loop", count), **shares("inner_loop", count),
         **shares("limit", 0), **shares("right", correct), "mean_tokens": 90.0, "mean_tokens_right": tokens, "repetition": 0.1}
        for temperature, count, correct in zip((0.0, 0.6), loops, right, strict=True)
    ]}  # fmt: skip


SFT = measured((60, 2), (100, 150))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (measured((4, 0), (104, 150)), (True, [], True, True)),
        (measured((55, 0), (104, 150)), (False, [], True, False)),
        (measured((4, 0), (60, 150)), (True, [0.0], True, False)),
        (measured((4, 0), (104, 90)), (True, [0.6], True, False)),  # the sampled answers pay for it
        (measured((0, 0), (104, 150), tokens=12.0), (True, [], False, False)),
        (measured((4, 30), (104, 150)), (True, [], True, False)),  # it loops elsewhere
        (measured((0, 0), (0, 0), tokens=None), (True, [0.0, 0.6], False, False)),  # it says nothing, and so does not loop
    ],
)
def test_fewer_doom_loops_count_only_if_nothing_else_is_lost(after, expected):
    (claim,) = claims_of([{"pretrain": measured((90, 9), (20, 90)), "sft": SFT, "dpo": after}])
    assert (claim["doom_loops_fell"], claim["accuracy_fell_at"], claim["length_kept"], claim["counts"]) == expected


def test_a_step_that_one_seed_has_is_compared_with_the_sft_of_that_seed():
    other = {"sft": measured((0, 0), (100, 150))}
    (claim,) = claims_of([{"sft": SFT, "rl": measured((4, 0), (100, 150))}, other])
    assert claim["counts"]


def test_shares_differ_as_a_chi_squared_test_says():
    """Without Yates' correction it is the test of two proportions."""
    row = lambda count, of: {"x_share": count / of, "answers": of}
    for (a, n), (b, m) in (((30, 200), (48, 200)), ((30, 200), (46, 200)), ((7, 90), (25, 400)), ((48, 200), (30, 200))):
        table = [[a, n - a], [b, m - b]]
        significant = scipy.stats.chi2_contingency(table, correction=False).pvalue < 0.05
        assert differs(row(a, n), row(b, m), "x") == significant * (1 if b / m > a / n else -1)
    assert differs(row(0, 5), row(0, 9), "x") == 0


def test_shares_are_of_the_answers_of_all_seeds():
    rows = pooled([{"sft": SFT}, {"sft": measured((20, 0), (40, 50), of=100, tokens=30.0)}, {"sft": measured((0, 0), (0, 0))}])
    assert rows[0]["answers"] == 500 and rows[0]["tail_loop_share"] == 80 / 500 and rows[0]["tail_loop_of_seeds"] == [0.3, 0.2, 0]
    interval = scipy.stats.binomtest(80, 500).proportion_ci(method="wilson")
    assert (rows[0]["tail_loop_low"], rows[0]["tail_loop_high"]) == pytest.approx((interval.low, interval.high))
    assert rows[0]["mean_tokens_right"] == pytest.approx(130 / 3) and rows[0]["seeds"] == 3
    assert "| sft | 3 | 0 | 16.0 % (13.0 to 19.5) |" in markdown(rows, [], [])


def test_an_ablation_stands_beside_the_chain_of_its_own_seed(tmp_path, monkeypatch):
    of_seeds = [
        {"pretrain": SFT, "sft": SFT, "dpo": SFT, "rl": SFT, "dpo_plain": measured((4, 0), (1, 1))},
        dict.fromkeys(("pretrain", "sft", "dpo", "rl"), measured((20, 0), (40, 50))),
    ]
    monkeypatch.setattr(doom_loop, "_prepare", lambda *_: None)
    monkeypatch.setattr(doom_loop, "run_chain", lambda config, workdir, seed, steps: of_seeds[seed])
    doom_loop.main(settings(seeds="2", ablations="plain_dpo"), epath.Path(tmp_path))
    chain, beside = (part.splitlines()[2:] for part in (tmp_path / "doom_loop.md").read_text().split("\n\n")[:2])
    greedy = lambda lines: [line.split(" | ")[:4] for line in lines if " | 0 | " in line]
    begins = lambda lines: [(step, seeds, share.partition(" ")[0]) for step, seeds, _, share in greedy(lines)]
    assert begins(chain) == [(f"| {step}", "2", "20.0") for step in ("pretrain", "sft", "dpo", "rl")]
    assert begins(beside) == [(f"| {step}", "1", "30.0") for step in ("sft", "dpo", "rl")] + [("| dpo_plain", "1", "2.0")]
    assert len(markdown(pooled(of_seeds[1:]), pooled(of_seeds[1:]), []).split("\n\n")) == 2  # nothing was left out
