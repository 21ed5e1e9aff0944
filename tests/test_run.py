"""The command line: the same command resumes, and a mistake is one paragraph that names the nearest valid choice."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import types

import pytest
from conftest import ROOT

import run
from lfm_jax import host_memory
from lfm_jax.configuration import ConfigError
from lfm_jax.sharding import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1e-3
    warmup_steps: int = 0

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    steps: int
    optimizer: Optimizer = Optimizer()
    layers: tuple[str, ...] = ()


CONFIG_FILE = '''"""A toy.

python run.py --config=toy.py --workdir=toy
"""
from ml_collections import ConfigDict

def get_config(argument=""):
    if argument not in ("", "long"):
        raise ValueError(f"{argument!r} is no length; did you mean 'long'?")
    steps = {"steps": 1000 if argument else 10}
    return ConfigDict({"experiment": "toy", **steps, "layers": ("conv", "attention"), "optimizer": {"learning_rate": 0.1}})
'''


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the toy experiment's main was called with; the config file lies in the current folder as toy.py."""
    seen = []

    def main(config, workdir):
        assert json.loads((workdir / "config.json").read_text())["steps"] == config.steps
        seen.append((config, workdir))

    toy = types.SimpleNamespace(Config=Config, main=main)
    monkeypatch.setitem(sys.modules, "experiments.toy", toy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(CONFIG_FILE)
    return seen


def config_json(folder="out"):
    with open(f"{folder}/config.json") as file:
        return json.load(file)


def test_main_gets_the_config_with_overrides_and_the_workdir(calls):
    arguments = ["--config=toy.py:long", "--workdir=a/out", "--config.steps=7", "--config.optimizer.warmup_steps", "3"]
    assert run.main(arguments) == 0
    ((config, workdir),) = calls
    expected = Config(steps=7, optimizer=Optimizer(learning_rate=0.1, warmup_steps=3), layers=("conv", "attention"))
    assert config == expected and str(workdir) == "a/out"


def test_config_json_holds_every_field_and_what_the_preset_had(calls):
    run.main(["--config=toy.py", "--workdir=out", "--config.optimizer.warmup_steps=3", "--config.steps=10"])
    assert config_json() == {
        "experiment": "toy",
        "invocation": {"config": "toy.py", "preset_values": {"optimizer.warmup_steps": 0}},
        "steps": 10,
        "optimizer": {"learning_rate": 0.1, "warmup_steps": 3},
        "layers": ["conv", "attention"],
    }


def test_a_field_may_be_left_to_the_command_line(calls, tmp_path):
    (tmp_path / "toy.py").write_text(CONFIG_FILE.replace("**steps, ", ""))
    assert run.main(["--config=toy.py", "--workdir=out", "--config.steps=5"]) == 0
    assert config_json()["invocation"]["preset_values"] == {"steps": "(required)"}


def test_the_same_command_resumes(calls):
    command = ["--config=toy.py", "--workdir=out", "--config.steps=3"]
    assert run.main(command) == run.main(command) == 0
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confg.steps=1"], "--confg.steps: no such flag. Did you mean --config.steps?"),
        (["--workdr=out"], "--workdr: no such flag. Did you mean --workdir? Valid flags: "),
        (["--lanch.slices=2"], "--lanch.slices: no such flag. Did you mean --launch.slices?"),
        (["--zzz"], "--zzz: no such flag. Valid flags: --list, --describe, "),
        (["--config=toy.py", "--dry_run"], "--dry_run says nothing without --launch: say what for, --launch=gke, "),
        (["--config=toy.py", "--launch.slices=2"], "--launch.slices says nothing without --launch: say what for"),
        (["--config=toy.py", "--launch=gke", "--launch.slices"], "--launch.slices needs a value: --launch.slices=VALUE."),
        (["--config=toy.py", "--workdir=gs://b/n", "--launch=gke"], "--config=toy.py is not in the container image; put "),
        (["--list=perhaps"], "flag --list=perhaps: ('Non-boolean argument"),
        (["toy.py"], "'toy.py' stands alone: flags are written --name=value; did you mean --config=toy.py?"),
        ([], "--config is missing: say what to run. Valid choices: configs/"),
        (["--config=configs/parameter_audt.py"], "there is no such file. Did you mean 'configs/parameter_audit.py'?"),
        (["--config=toy.txt"], "--config=toy.txt: not a Python file."),
        (["--config=toy.py:lng", "--workdir=out"], "--config=toy.py:lng: 'lng' is no length; did you mean 'long'?"),
        (["--config=toy.py"], "--workdir is missing: name the folder"),
        (["--config=toy.py", "--workdir=toy.txt"], "--workdir=toy.txt cannot be made (File exists): name a folder"),
        (["--config=toy.py", "--config.steps"], "--config.steps needs a value: --config.steps=VALUE."),
        (["--config=toy.py", "--config.steps", "--workdir=out"], "--config.steps needs a value"),
        (
            ["--config=toy.py", "--config.stps=1"],
            "--config.stps: no such field. Did you mean 'steps'? Valid choices: steps, optim",
        ),
        (["--config=toy.py", "--config.optim.learning_rte=1"], "no such field. Did you mean 'optimizer.learning_rate'?"),
        (["--config=toy.py", "--config.steps=many"], "--config.steps: expected a whole number, got 'many' (str)."),
        (["--config=toy.py", "--config.optimizer.learning_rate=-1"], "optimizer: learning_rate must be positive, got -1.0"),
    ],
)
def test_a_mistake_is_told_in_one_paragraph(calls, tmp_path, capsys, arguments, message):
    (tmp_path / "toy.txt").write_text("")
    assert run.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("run.py: ") and message in told and told.count("\n") == 1
    assert not calls and not (tmp_path / "out").exists()


def test_a_config_error_of_the_experiment_is_told_alike(calls, monkeypatch, capsys):
    def main(config, workdir):
        raise ConfigError("init_from=nowhere: there is no such run.")

    monkeypatch.setattr(sys.modules["experiments.toy"], "main", main)
    assert run.main(["--config=toy.py", "--workdir=out"]) == 2
    assert capsys.readouterr().err == "run.py: init_from=nowhere: there is no such run.\n"


def test_a_fault_of_the_experiment_keeps_its_traceback(calls, monkeypatch):
    def main(config, workdir):
        raise ValueError("a bug")

    monkeypatch.setattr(sys.modules["experiments.toy"], "main", main)
    with pytest.raises(ValueError, match="a bug"):
        run.main(["--config=toy.py", "--workdir=out"])


def test_a_changed_setting_is_refused_until_it_is_allowed(calls, capsys):
    run.main(["--config=toy.py", "--workdir=out"])
    changed = ["--config=toy.py", "--workdir=out", "--config.optimizer.learning_rate=0.5"]
    assert run.main(changed) == 2
    told = capsys.readouterr().err
    assert "out holds a run with other settings: optimizer.learning_rate was 0.1, is 0.5. Give another --workdir" in told
    assert len(calls) == 1 and config_json()["optimizer"]["learning_rate"] == 0.1
    assert run.main([*changed, "--allow_config_change"]) == 0
    assert "config changed in out: optimizer.learning_rate was 0.1, is 0.5" in capsys.readouterr().out
    assert len(calls) == 2 and config_json()["optimizer"]["learning_rate"] == 0.5


def test_another_experiments_workdir_is_refused(calls, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"experiment": "distill"}')
    assert run.main(["--config=toy.py", "--workdir=out", "--allow_config_change"]) == 2
    assert "out holds a run of the experiment 'distill', this is 'toy'; give another --workdir." in capsys.readouterr().err


def test_describe_shows_the_card_and_every_field(calls, capsys):
    assert run.main(["--describe", "--config=toy.py", "--config.steps=3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "A toy."
    assert shown[-4:] == [
        "--config.steps=3",
        "--config.optimizer.learning_rate=0.1",
        "--config.optimizer.warmup_steps=0",
        "--config.layers=conv,attention",
    ]
    assert not calls


def test_describe_shows_what_must_be_given(calls, tmp_path, capsys):
    (tmp_path / "toy.py").write_text(CONFIG_FILE.replace("**steps, ", ""))
    assert run.main(["--describe", "--config=toy.py"]) == 0
    assert "--config.steps=(required)" in capsys.readouterr().out
    assert run.main(["--config=toy.py", "--workdir=out"]) == 2
    assert capsys.readouterr().err == "run.py: steps: there is no default, so a value must be given.\n"


def test_a_config_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--describe", "--config=configs/parameter_audit.py"]) == 0


def test_describes_lines_are_a_command_line(calls, capsys):
    run.main(["--describe", "--config=toy.py:long"])
    overrides = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--config.")]
    run.main(["--config=toy.py:long", "--workdir=a"])
    run.main(["--config=toy.py", "--workdir=b", *overrides])
    assert calls[0][0] == calls[1][0]


def test_help_shows_how_to_run_and_how_to_launch(capsys):
    assert run.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python run.py --list" in shown and "--launch.topology=(required)" in shown.splitlines()


def test_of_several_processes_the_first_writes_config_json(calls, monkeypatch, tmp_path):
    joined = []
    monkeypatch.setattr(distributed, "join", lambda: joined.append(None) or 1)
    monkeypatch.setattr(sys.modules["experiments.toy"], "main", lambda config, workdir: None)
    assert run.main(["--config=toy.py", "--workdir=out"]) == 0
    assert joined == [None] and (tmp_path / "out").is_dir() and not (tmp_path / "out" / "config.json").exists()


def test_freed_memory_is_kept_before_anything_computes(calls, monkeypatch):
    order = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: order.append("kept"))
    monkeypatch.setattr(distributed, "join", lambda: order.append("joined") or 0)
    assert run.main(["--config=toy.py", "--workdir=out"]) == 0
    assert order == ["kept", "joined"] and len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--list"], 0), (["--help"], 0), (["--describe", "--config=toy.py"], 0), (["--config=toy.py"], 2)]
)
def test_what_runs_nothing_joins_nobody(calls, monkeypatch, arguments, code):
    joined = []
    monkeypatch.setattr(distributed, "join", lambda: joined.append(None) or 0)
    assert run.main(arguments) == code
    assert not joined and not calls


@pytest.mark.parametrize(("error", "code"), [(ValueError("a bug"), 1), (ConfigError("a mistake"), 2), (SystemExit(75), 75)])
def test_a_process_ends_with_the_code_of_what_happened(calls, monkeypatch, capsys, error, code):
    def main(config, workdir):
        raise error

    monkeypatch.setattr(sys.modules["experiments.toy"], "main", main)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config=toy.py", "--workdir=out"])
    with pytest.raises(SystemExit) as ended:
        run._process()
    assert ended.value.code == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)


@pytest.mark.parametrize(("error", "code"), [(ValueError("a bug"), 1), (ConfigError("a mistake"), 2)])
def test_a_process_that_cannot_write_to_its_log_tells_the_others_all_the_same(calls, monkeypatch, error, code):
    def main(config, workdir):
        raise error

    told = []
    monkeypatch.setattr(sys.modules["experiments.toy"], "main", main)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config=toy.py", "--workdir=out"])
    monkeypatch.setattr(run, "_raised", lambda error, code: told.append(error) or code)
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # which fails to close as well
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(SystemExit) as ended:
            run._process()
    assert told == [error] and ended.value.code == code


def test_list_shows_every_config_with_its_first_line_and_imports_no_jax():
    """In a process of its own, which says at its end what it has imported."""
    code = "import sys, run; code = run.main(['--list']); print('jax' in sys.modules, file=sys.stderr); sys.exit(code)"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stderr == "False\n"
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py")}
    lines = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    assert set(lines) == names
    assert lines["configs/parameter_audit.py"].startswith("Where the parameters of each preset")


def test_a_mistake_on_the_shell_exits_with_2_and_no_traceback():
    command = [sys.executable, "run.py", "--config=configs/parameter_audit.py", "--config.contxt=1", "--workdir=unused"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr.startswith("run.py: --config.contxt: no such field. Did you mean 'context'?")
    assert not (ROOT / "unused").exists()


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("configs/parameter_audit.py", "presets=lfm2_350", "no model preset 'lfm2_350'; did you mean 'lfm2_350m'?"),
        ("configs/benchmarks/short_conv.py", "chips=v5", "chips: 'v5' is none. Did you mean 'v5p'? Valid choices: v5e, "),
        ("configs/benchmarks/short_conv.py", "presets=lfm3", "no model preset 'lfm3'; did you mean 'lfm3_1_7b'?"),
    ],
)
def test_a_wrong_value_of_a_real_config_names_the_nearest(config, override, message, capsys, tmp_path):
    assert run.main([f"--config={ROOT}/{config}", f"--workdir={tmp_path}/out", f"--config.{override}"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
