"""The benchmark on a phone, with a program in adb's place that answers as a phone that gets warm."""

import json
import sys

import pytest

import run

ADB = """#!{python}
import json, pathlib, subprocess, sys
log = pathlib.Path({log!r})
log.write_text((log.read_text() if log.exists() else "") + json.dumps(sys.argv[1:]) + "\\n")
count = log.read_text().count("llama-bench -m")
command = sys.argv[-1]
if "push" in sys.argv:
    print("pushed")
elif "getprop" in command:
    print("A Phone")
elif "thermal" in command:
    zones = log.parent / "zones"
    for zone, value in enumerate((-273000, 0, 40000 + 1000 * count, 31000, 999999)):
        (zones / f"thermal_zone{{zone}}").mkdir(parents=True, exist_ok=True)
        (zones / f"thermal_zone{{zone}}" / "temp").write_text(f"{{value}}\\n")
    (zones / "thermal_zone9" / "temp").mkdir(parents=True, exist_ok=True)  # cannot be read
    sys.exit(subprocess.run(["sh", "-c", command.replace("/sys/class/thermal", str(zones))]).returncode)
elif {broken}:
    print("segmentation fault"); sys.exit(0 if {broken} == 1 else 3)
else:
    print(json.dumps([{{"n_prompt": 512, "n_gen": 0, "avg_ts": 300.0}}, {{"n_prompt": 0, "n_gen": 128, "avg_ts": 50.0 - count}}]))
"""


@pytest.fixture
def files(tmp_path):
    for name in ("model.gguf", "llama-bench", "libllama.so"):
        (tmp_path / name).write_bytes(b"12345")
    return tmp_path


def _command(files, broken=0, **settings):
    adb = files / "adb"
    adb.write_text(ADB.format(python=sys.executable, log=str(files / "log"), broken=broken))
    adb.chmod(0o755)
    values = {"gguf": files / "model.gguf", "llama_bench": files / "llama-bench", "adb": adb, "runs": 5, **settings}
    settings = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/phone_benchmark.py", f"--workdir={files / 'run'}", *settings]


def test_every_run_comes_back_with_the_temperature(files):
    """Also where the phone keeps that of one of its zones to itself, which is what adb ends with."""
    assert run.main(_command(files, serial="XYZ")) == 0
    figures = json.loads((files / "run" / "results.json").read_text())
    assert figures["phone"] == "A Phone" and figures["bytes"] == 5
    assert [row["celsius"] for row in figures["runs"]] == [41, 42, 43, 44, 45]
    assert [figures[f"decode_tokens_per_second_{which}"] for which in ("first", "median", "last")] == [49, 47, 45]
    assert figures["prefill_tokens_per_second_median"] == 300
    asked = [json.loads(line) for line in (files / "log").read_text().splitlines()]
    assert all(arguments[:2] == ["-s", "XYZ"] for arguments in asked)
    assert [arguments[3].rpartition("/")[2] for arguments in asked[:3]] == ["model.gguf", "llama-bench", "libllama.so"]


def test_a_dry_run_shows_the_commands_and_needs_no_phone(files, capsys):
    assert run.main(_command(files, dry_run=True, adb="no-such-adb")) == 0
    shown = capsys.readouterr().out
    assert shown.count("no-such-adb push") == 3 and "llama-bench -m model.gguf -p 512 -n 128 -t 4 -r 1 -o json" in shown
    assert not (files / "log").exists() and not (files / "run" / "results.json").exists()


def test_a_model_that_is_not_the_exported_one_is_not_pushed(files, capsys):
    (files / "MANIFEST.sha256").write_text(f"{'0' * 64}  model.gguf\n")
    assert run.main(_command(files)) == 2 and not (files / "log").exists()
    assert "model.gguf is not the file that was exported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adb": "no-such-adb"}, "no-such-adb is not installed"), ({"gguf": "nowhere"}, "nowhere is no file"),
        ({"broken": 1}, "gave no figures but 'segmentation fault'"), ({"broken": 2}, "ended with 3: segmentation fault"),
        ({"runs": 0}, "runs must be positive, got 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_paragraph(settings, message, files, capsys):
    assert run.main(_command(files, **settings)) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
