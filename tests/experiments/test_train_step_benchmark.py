"""All sides of the benchmark train the same model on the same batch, one process each, and it says what it found."""

import io
import json
import sys
from importlib.util import find_spec

import jax
import pytest
from etils import epath
from jax._src.cudnn import fused_attention_stablehlo

import run
from experiments.benchmarks import train_step, train_step_engines
from lfm_jax.configuration import from_mapping, to_mapping
from lfm_jax.models import ComputeConfig, preset
from lfm_jax.models.accounting import training_flops_per_token
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import OptimizerConfig, abstract_state

BFLOAT16 = ComputeConfig(dtype="bfloat16")


def config_of(**changes):
    small = {"rows": 4, "seq": 32, "accumulation": 2, "steps": 2, "rounds": 3, "matmul": 64}
    return train_step.Config(**{**small, "engines": ("ours", "transformers"), **changes})


def losses(name, config, folder, steps=3, **settings):
    make, given = train_step_engines._SIDES[name]
    side = make(config, "nano", folder, **{**given, **settings})
    return train_step_engines._timed(side, steps)["losses"]


@pytest.mark.heavy
def test_every_side_trains_alike_in_either_type(tmp_path):
    """Of three updates; those of Adam follow signs. Float32 differs by the order of sums alone.

    A bfloat16 loss of 9.0 has errors of single numbers (2^-8) averaged over 128 tokens.
    """
    weights = epath.Path(tmp_path) / "weights"
    exact = losses("ours", config_of(), weights)
    assert exact[-1] < exact[0] - 0.05
    assert losses("transformers", config_of(), weights) == pytest.approx(exact, abs=1e-3)
    for name, settings in [
        ("ours_whole_rows", {}), ("transformers", {}), ("transformers_compiled_bfloat16", {"compiled": False}),
    ]:  # fmt: skip
        rounded = losses(name, config_of(compute=BFLOAT16), weights, **settings)
        assert rounded == pytest.approx(exact, abs=0.03) and rounded != exact


def test_the_optimizer_of_theirs_has_our_settings_and_is_fused():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, clip_norm = train_step_engines._adamw([parameter], 1e-6)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    settings = OptimizerConfig()
    assert clip_norm == settings.clip_norm
    assert parameter.detach().numpy() == pytest.approx(1 - 1e-6 * (1 + settings.weight_decay), abs=1e-7)
    assert optimizer.defaults["fused"]


def test_processes_take_turns_and_leave_their_figures(tmp_path):
    config = config_of(steps=1)
    train_step.main(config, epath.Path(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    ours, theirs = figures["engines"]
    assert (ours["engine"], theirs["engine"]) == config.engines and figures["failures"] == {}
    assert theirs["first_loss_difference"] < 1e-5 and theirs["first_loss_difference"] <= theirs["loss_difference"] < 1e-3
    assert min(ours["peak_bytes"], theirs["peak_bytes"]) > 50e6  # two Pythons, each with its libraries
    assert figures["nano_ours_over_transformers"] > 0
    assert figures["causal_conv1d"] == (find_spec("causal_conv1d") is not None)


@pytest.mark.parametrize(
    ("kept", "keeping"),
    [
        ("none", []),
        ("ours", ["ours", "ours_whole_rows"]),
        ("all", ["ours", "ours_whole_rows", "transformers", "transformers_compiled"]),
    ],
)
def test_freed_memory_is_kept_where_it_is_asked_for(kept, keeping, monkeypatch):
    """Before anything of an engine is made."""
    order = []
    made = lambda name: lambda *arguments, **settings: order.append(name)
    monkeypatch.setattr(train_step_engines, "keep_freed_memory", lambda: order.append("kept"))
    for name in ("ours", "ours_whole_rows", "transformers", "transformers_compiled"):
        monkeypatch.setitem(train_step_engines._SIDES, name, (made(name), {}))
        job = {"engine": name, "config": to_mapping(config_of(kept_memory=kept)), "preset": "nano", "folder": "nowhere"}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job) + "\n"))
        train_step_engines._answer_lines(lambda _: None)
    expected = [part for name in order if name != "kept" for part in (["kept"] if name in keeping else []) + [name]]
    assert order == expected and order.count("kept") == len(keeping)


def answers_of(seconds, loss):
    return [{"seconds": each, "losses": [loss, loss], "peak_bytes": 7} for each in seconds]


def test_rates_are_medians_of_timed_turns_and_utilization_is_of_the_measured_peak():
    config = config_of(seq=64)
    answers = {"ours": answers_of([99, 2, 4, 8], 3.0), "transformers": answers_of([99, 6, 6, 6], 3.25)}
    ours, theirs = train_step._rows(config, "nano", answers, peak=1e9)
    flops = 4 * 64 * training_flops_per_token(preset("nano"), 64)
    assert (ours["seconds"], theirs["seconds"]) == (2, 3)  # of a step, and a turn has two
    assert ours["tokens_per_second"] == 4 * 64 / 2
    assert ours["floor_seconds"] == flops / 1e9 and ours["flops_utilization"] == pytest.approx(flops / 2 / 1e9)
    assert (ours["loss_difference"], theirs["loss_difference"]) == (0, 0.25)
    assert theirs["first_loss_difference"] == 0.25 and theirs["losses"] == [3.25] * 8
    assert train_step._ratios([ours, theirs]) == {"nano_ours_over_transformers": 1.5}


class Engine:
    """Stands for a process; `alive` are those that are within their `with`."""

    alive: set[str] = set()
    most = 0

    def __init__(self, engine, config, preset, folder):
        if engine == "transformers_compiled":
            raise train_step._Failed("OutOfMemoryError: no room")
        self.name, self.ready = engine, {"flops_per_second": 1e9}

    def __enter__(self):
        self.alive.add(self.name)
        Engine.most = max(Engine.most, len(self.alive))
        return self

    def __exit__(self, *_):
        self.alive.remove(self.name)

    def ask(self, steps):
        if self.name == "ours_whole_rows":
            raise train_step._Failed("the process ended with -9")
        return {"seconds": 1.0, "losses": [1.0] * steps, "peak_bytes": 1}


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(train_step, "_Engine", Engine)
    Engine.most = 0


def test_engines_that_fail_are_named_and_the_others_go_on(engines, tmp_path):
    names = ("ours", "transformers_compiled", "ours_whole_rows", "transformers")
    with pytest.raises(
        RuntimeError, match="nano transformers_compiled: OutOfMemoryError: no room; nano ours_whole_rows: the pro"
    ):
        train_step.main(config_of(engines=names), epath.Path(tmp_path))
    figures = json.loads((tmp_path / "results.json").read_text())
    assert [row["engine"] for row in figures["engines"]] == ["ours", "transformers"]
    assert figures["failures"].keys() == {"nano transformers_compiled", "nano ours_whole_rows"}


@pytest.mark.parametrize(("platform", "most"), [("cpu", 2), ("gpu", 1)])
def test_a_gpu_is_of_one_engine_at_a_time(engines, tmp_path, platform, most):
    config = config_of(platform=platform, compute=BFLOAT16)
    answers = train_step._timed(config, "nano", epath.Path(tmp_path), None, {})
    assert Engine.most == most and [len(turns) for turns in answers.values()] == [3, 3]


def test_no_engine_is_started_after_the_limit(engines, tmp_path):
    with pytest.raises(RuntimeError, match="nano ours: not started, limit_seconds=0.0 were over; nano transformers: not"):
        train_step.main(config_of(limit_seconds=0.0), epath.Path(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["engines"] == []


def test_what_an_engine_dies_of_is_told(tmp_path):
    with pytest.raises(train_step._Failed, match="KeyError: 'nobody'"):
        train_step._Engine("nobody", config_of(), "nano", epath.Path(tmp_path))


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run.main(["--config=configs/benchmarks/train_step.py:gpu", f"--workdir={tmp_path}/run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("run.py: platform='gpu' needs an NVIDIA GPU") and told.count("\n") == 1
    assert f"PyTorch {torch.__version__} sees none" in told and "JAX says: Unknown backend: 'gpu'" in told


def test_the_gpu_config_is_as_the_page_says():
    config = from_mapping(train_step.Config, run._read("configs/benchmarks/train_step.py:gpu", []).settings)
    assert config.engines == train_step.ENGINES and config.presets == ("lfm2_350m", "lfm2_1_2b")
    assert (config.compute.dtype, config.compute.attention, config.compute.remat) == ("bfloat16", "cudnn", "none")


@pytest.mark.parametrize(("segments", "bias"), [(True, "ScaleBias"), (False, "")])
def test_on_a_gpu_our_whole_step_is_lowered_to_cudnns_attention(segments, bias, monkeypatch):
    """Forward and backward, with the settings of the GPU's config; only rows that are one document have no mask."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of a machine that has it
    compute = from_mapping(train_step.Config, run._read("configs/benchmarks/train_step.py:gpu", []).settings).compute
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    functions, optimizer, step, batch = train_step_engines._our_step(config_of(compute=compute), "nano", mesh, segments)
    traced = step.trace(abstract_state(functions, optimizer, mesh), batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"__cudnn$fmha{bias}Softmax(" in text and f"__cudnn$fmha{bias}SoftmaxBackward(" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "rounds must be at least 2, since the first is not timed; got 1"),
        ({"rows": 3}, "rows=3 do not divide into accumulation=2 micro-batches"),
        ({"engines": ("ours", "jax")}, "engines has 'jax'; known are ours, transformers"),
        ({"engines": ("transformers", "ours")}, "engines must begin with 'ours', which writes the weights"),
        ({"platform": "gpu"}, "compute.dtype is 'float32' with platform='gpu': name the type"),
        ({"compute": ComputeConfig()}, "compute.dtype is 'auto' with platform='cpu': name the type"),
        ({"engines": ("ours", "transformers_compiled_bfloat16")}, "has no float32 to compute in; leave it out"),
    ],
)
def test_settings_that_compare_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
