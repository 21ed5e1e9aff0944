"""Runs side by side: where they part, to the bit, and what of it is only the clock."""

import json
import struct

import pytest

import run as entry
from experiments.compare import Config, differences, main, part, read_runs, side_by_side, tokens_by_step
from experiments.results import read_results
from lfm_jax.configuration import ConfigError, from_mapping
from lfm_jax.training import MetricsWriter
from lfm_jax.training.goodput import Ledger

SETTINGS = {
    "experiment": "pretrain",
    "invocation": {"config": "configs/quickstart.py"},
    "train": {"seed": 0, "steps": 40},
    "model": {"layer_types": ["conv", "full_attention"]},
}
ABOUT = {"config": {}, "seed": 0, "versions": {"jax": "0.10.2", "commit": "a"}, "device": {"platform": "cpu", "count": 8}}


def loss(step):
    return 9.0 / (1 + step / 7)


def make(workdir, steps=range(1, 41), losses=loss, settings=None, results=None):
    """A run's workdir, by the writer that a run has."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(SETTINGS | (settings or {})))
    writer = MetricsWriter(workdir, 0)
    for step in steps:
        own = ord(workdir.name[0]) / 1000 + step
        clock = {"train/tokens_per_second": own, "train/model_flops_utilization": own, "goodput/step": own}
        writer.write(step, {"train/loss": losses(step), "train/gradient_norm": 1.0, "train/tokens": 100.0} | clock)
        if step % 10 == 0:
            writer.write(step, {"eval/bits_per_byte": losses(step) / 3})
    writer.close()
    if results is not None:
        (workdir / "results.json").write_text(json.dumps(ABOUT | results))
    return str(workdir)


def compare(workdir, *runs):
    workdir.mkdir()
    main(Config(runs=runs), workdir)
    return read_results(workdir)


def test_two_runs_that_differ_in_the_clock_only_are_bit_equal(tmp_path, capsys):
    runs = (make(tmp_path / name, results={"seconds": seconds}) for name, seconds in (("a", 1.0), ("b", 2.0)))
    results = compare(tmp_path / "c", *runs)
    (row,) = results["parting"]
    assert row["bit_equal"] and row["step"] is None and results["first_differences"] == []
    assert (row["steps_compared"], row["values_compared"]) == (40, 40 * 3 + 4)
    assert results["runs_bit_equal"] == results["runs_compared"] == 1
    assert "b and a: bit-equal in 124 values, of 40 steps" in capsys.readouterr().out
    assert {"figure": "seconds", "a": 1.0, "b": 2.0} in results["final_figures"]


def test_the_first_step_that_differs_by_the_least_bit_is_named(tmp_path, capsys):
    def nudged(step):
        (bits,) = struct.unpack("<q", struct.pack("<d", loss(step)))
        return struct.unpack("<d", struct.pack("<q", bits + (step >= 17)))[0]

    results = compare(tmp_path / "c", make(tmp_path / "a"), make(tmp_path / "b", losses=nudged), make(tmp_path / "same"))
    row, same = results["parting"]
    assert not row["bit_equal"] and same["bit_equal"] and results["runs_bit_equal"] == 1
    assert (row["step"], row["figure"], row["first"], row["other"]) == (17, "train/loss", loss(17), nudged(17))
    assert row["difference"] == nudged(17) - loss(17) > 0
    assert [(entry["figure"], entry["step"], entry["last_step"]) for entry in results["first_differences"]] == [
        ("train/loss", 17, 40),
        ("eval/bits_per_byte", 20, 40),
    ]
    assert results["first_differences"][0]["last_difference"] == nudged(40) - loss(40)
    assert f"b and a: they part at step 17, where train/loss is {loss(17)} in a and {nudged(17)} in b" in capsys.readouterr().out


def test_only_steps_that_both_have_logged_are_compared(tmp_path):
    """A run that is going on, killed in the midst of a line, and one that logs every third step."""
    other = make(tmp_path / "b", steps=range(1, 31))
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "train/loss": 77')
    results = compare(tmp_path / "c", make(tmp_path / "a", results={}), other, make(tmp_path / "third", steps=range(3, 60, 3)))
    assert [row["steps_compared"] for row in results["parting"]] == [30, 13] and results["runs_bit_equal"] == 2
    assert [(row["ended"], row["last_step"]) for row in results["runs"]] == [(True, 40), (False, 30), (False, 57)]
    assert results["different_circumstances"] == []


def test_runs_without_a_step_in_common_are_not_said_to_be_equal(tmp_path, capsys):
    results = compare(tmp_path / "c", make(tmp_path / "a", steps=[1, 3]), make(tmp_path / "b", steps=[2]))
    assert not results["parting"][0]["bit_equal"] and results["runs_bit_equal"] == 0
    assert "b and a: no step has been logged by both" in capsys.readouterr().out


def test_what_is_no_number_equals_itself_and_nothing_else(tmp_path):
    nan = lambda step: float("nan") if step > 3 else 1.0
    runs = read_runs([make(tmp_path / name, losses=losses) for name, losses in (("a", nan), ("b", nan), ("d", lambda _: 1.0))])
    assert part(runs[0], runs[1])[0]["bit_equal"]
    row, _ = part(runs[0], runs[2])
    assert (row["step"], row["first"], row["other"], row["difference"]) == (4, None, 1.0, None)


def test_settings_and_circumstances_that_differ_are_listed_and_told(tmp_path, capsys):
    changed = {"train": {"seed": 1, "steps": 40}, "model": {"layer_types": ["conv"]}, "invocation": {}, "new": True}
    about = {"versions": ABOUT["versions"] | {"jax": "0.11"}, "device": ABOUT["device"] | {"platform": "tpu"}, "seed": 1}
    results = compare(
        tmp_path / "c", make(tmp_path / "a", results={}), make(tmp_path / "b", settings=changed, results=about),
        make(tmp_path / "going_on"),
    )  # fmt: skip
    assert results["different_settings"] == [
        {"name": "train.seed", "a": 0, "b": 1, "going_on": 0},
        {"name": "model.layer_types", "a": "conv, full_attention", "b": "conv", "going_on": "conv, full_attention"},
        {"name": "new", "a": "(none)", "b": True, "going_on": "(none)"},
    ]
    assert results["different_circumstances"] == [
        {"name": "seed", "a": 0, "b": 1},
        {"name": "versions.jax", "a": "0.10.2", "b": "0.11"},
        {"name": "device.platform", "a": "cpu", "b": "tpu"},
    ]
    told = capsys.readouterr().out
    layers = "model.layer_types is conv, full_attention in a and conv in b"
    assert f"b and a: train.seed is 0 in a and 1 in b; {layers}; new is (none) in a and True in b\n" in told
    assert "going_on and a: no setting differs\n" in told


def test_of_many_settings_that_differ_a_dozen_are_told(tmp_path, capsys):
    many = {f"x{number}": number for number in range(13)}
    compare(tmp_path / "c", make(tmp_path / "a"), make(tmp_path / "b", settings=many))
    assert "x11 is (none) in a and 11 in b; and 1 more, in results.json\n" in capsys.readouterr().out


def test_true_and_one_are_different_settings(tmp_path):
    runs = read_runs([make(tmp_path / "a", settings={"x": True}), make(tmp_path / "b", settings={"x": 1})])
    assert differences(runs, lambda run: run.settings) == [{"name": "x", "a": True, "b": 1}]


def test_figures_stand_side_by_side(tmp_path):
    runs = read_runs([make(tmp_path / "a", losses=lambda step: 1.0 * step), make(tmp_path / "b", steps=[1, 2])])
    rows = {row["figure"]: row for row in side_by_side(runs, lambda run: run.records[max(run.records)])}
    assert rows["train/loss"] == {"figure": "train/loss", "a": 40.0, "b": loss(2)}
    assert rows["eval/bits_per_byte"] == {"figure": "eval/bits_per_byte", "a": 40 / 3, "b": None}


def test_steps_that_are_not_logged_count_as_the_next_that_is():
    records = {1: {"train/tokens": 10.0}, 4: {"train/tokens": 20.0}, 5: {"eval/loss": 1.0}, 6: {"train/tokens": 5.0}}
    assert tokens_by_step(records) == {1: 10.0, 4: 70.0, 6: 80.0}
    assert tokens_by_step({5: {"eval/loss": 1.0}}) == {}


def test_the_goodput_is_the_ledgers(tmp_path):
    runs = make(tmp_path / "a"), make(tmp_path / "b")
    with Ledger(tmp_path / "a", age=3600.0):
        pass
    a, b = read_runs(runs)
    assert a.goodput == pytest.approx(0.0, abs=1e-3) and b.goodput is None


def test_every_figure_that_is_there_is_drawn_and_on_the_page(tmp_path):
    """The page's curves have the names of the runs."""
    compare(tmp_path / "c", make(tmp_path / "a"), make(tmp_path / "b"))
    for name in ("loss", "held_out", "gradient_norm", "tokens_per_second"):
        picture = (tmp_path / "c" / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    page = (tmp_path / "c" / "report.html").read_text()
    assert page.count('class="curve"') == 8 and f"b, step 40: {loss(40):.4g}" in page
    assert all(f'data-table="{table}"' in page for table in ("runs", "parting", "last_logged"))


def test_what_nobody_has_logged_is_not_drawn(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.0}\n')
    compare(tmp_path / "c", str(tmp_path / "a"), str(tmp_path / "b"))
    assert [path.name for path in (tmp_path / "c").glob("*.png")] == ["loss.png"]


def test_runs_of_the_same_name_have_their_paths(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    runs = read_runs([make(tmp_path / "x" / "nano"), make(tmp_path / "y" / "nano")])
    assert [run.name for run in runs] == [f"{tmp_path}/{name}/nano".replace("/", "_") for name in "xy"]


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--config.runs: .*nothing has neither config.json nor metrics.jsonl"):
        read_runs([make(tmp_path / "a"), str(tmp_path / "nothing")])


@pytest.mark.parametrize(("runs", "got"), [((), "none"), (("a",), "a"), (("a", "b", "a"), "a, b, a")])
def test_one_run_is_not_compared(runs, got):
    with pytest.raises(ConfigError, match=f"runs must be two or more different workdirs, got {got}"):
        from_mapping(Config, {"runs": runs})


def test_it_is_run_from_the_command_line(tmp_path, monkeypatch):
    runs = ",".join([make(tmp_path / "a"), make(tmp_path / "b", losses=lambda step: 2.0)])
    arguments = ["--config=configs/compare.py", f"--workdir={tmp_path / 'c'}", f"--config.runs={runs}"]
    assert entry.main(arguments) == 0
    (row,) = read_results(tmp_path / "c")["parting"]
    assert (row["step"], row["figure"]) == (1, "train/loss")
