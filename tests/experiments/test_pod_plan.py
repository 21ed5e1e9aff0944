"""The planner's search and tables by hand, and one small run of it."""

import itertools
import json

import pytest
from etils import epath
from matplotlib.image import imread
from rich.console import Console

from configs.pod_plan import get_config
from experiments import pod_plan
from experiments.pod_plan import compilation, figures, planner, tables
from experiments.pod_plan.search import Batch, Layout, best, ladder, mesh_text, search, split_sequences, starting_mesh
from lfm_jax.configuration import from_mapping
from lfm_jax.models import ComputeConfig, ModelConfig, preset
from lfm_jax.sharding import MeshConfig

WHOLE, HALVES = MeshConfig(), MeshConfig(data=2)
PLENTY = Batch(rows=64, seq_len=256, devices=4)
# Convolutions alone: compiling attention's kernels takes longer than all else here.
TINY = ModelConfig(vocab_size=512, embed_dim=128, layer_types=("conv",), num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=256)


def config(**settings):
    return pod_plan.Config(**{"presets": (), "topologies": (), "tokens_per_device": 1024} | settings)


def attempts(peaks, capacity=10.0):
    """An attempt whose memory is looked up, and whose time is longer the less memory it takes; a peak of None is refused."""

    def attempt(layout):
        peak = peaks(layout)
        seconds = None if peak is None else 100.0 - peak
        return {"fits": peak is not None and peak <= capacity, "peak_bytes": peak, "seconds_per_step": seconds}

    return attempt


def peak(layout):
    size = {"none": 16.0, "dots": 9.0, "full": 5.0}[layout.remat] / layout.accumulation
    return size + (4.0 if layout.mesh == HALVES else 0.0)


def test_the_greedy_search_takes_one_choice_after_the_other():
    settings = config(meshes=(HALVES,), accumulations=(2,), remats=("none", "dots", "full"))
    tried = search(settings, PLENTY, Layout(WHOLE, 1, "none"), attempts(peak))
    # Neither mesh fits, so the smaller one goes on; two micro-batches fit; of the policies none is the fastest then.
    assert [str(layout) for layout in tried] == [
        "fsdp=all, 1 x none", "data=2 fsdp=all, 1 x none", "fsdp=all, 2 x none", "fsdp=all, 2 x dots", "fsdp=all, 2 x full",
    ]  # fmt: skip
    assert best(tried) == Layout(WHOLE, 2, "none")


def test_the_full_search_takes_all_products():
    settings = config(search="full", meshes=(HALVES,), accumulations=(2, 4), remats=("none", "dots"))
    assert len(search(settings, PLENTY, Layout(WHOLE, 1, "none"), attempts(peak))) == 2 * 3 * 2


def test_the_first_that_fits_ends_the_search_from_the_fastest_to_the_leanest():
    settings = config(search="first", accumulations=(2,), remats=("dots", "full"))
    tried = search(settings, PLENTY, Layout(HALVES, 1, "none"), attempts(peak))
    assert [str(layout) for layout in tried] == [
        "data=2 fsdp=all, 1 x none", "data=2 fsdp=all, 2 x none", "data=2 fsdp=all, 1 x dots", "data=2 fsdp=all, 2 x dots",
    ]  # fmt: skip
    assert best(tried) == Layout(HALVES, 2, "dots")


def test_layers_in_loops_are_the_last_that_is_tried():
    settings = config(search="first", accumulations=(2,), remats=("full",), scan_layers=(True,))
    halved = lambda layout: peak(layout) * (0.5 if layout.scan_layers else 1.0)
    tried = search(settings, PLENTY, Layout(WHOLE, 1, "none"), attempts(halved, capacity=2.0))
    assert [str(layout) for layout in tried][3:] == [
        "fsdp=all, 2 x full", "fsdp=all, 1 x none in loops", "fsdp=all, 2 x none in loops", "fsdp=all, 1 x full in loops",
        "fsdp=all, 2 x full in loops",
    ]  # fmt: skip
    assert best(tried) == Layout(WHOLE, 2, "full", True)
    settings = config(accumulations=(2,), remats=("full",), scan_layers=(True,))
    tried = search(settings, PLENTY, Layout(WHOLE, 1, "none"), attempts(halved, capacity=2.0))
    assert list(tried)[-1] == best(tried) == Layout(WHOLE, 2, "full", True)
    (remedy, *_) = ladder(Layout(WHOLE, 1, "none"), tried)
    assert remedy["remedy"] == "accumulation 2, remat full, scan_layers True" and remedy["fits"]


@pytest.mark.parametrize(
    "name, topology, fsdp",
    [
        ("lfm2_1_2b", "v5e:16x16", 1), ("lfm2_2_6b", "v5e:16x16", 16), ("lfm2_8b_a1b", "v5p:8x8x8", 1),
        ("lfm2_8b_a1b", "tpu7x:2x2x1", 1), ("lfm2_24b_a2b", "v5p:8x8x8", 8), ("lfm2_24b_a2b", "v5e:2x2", 4),
    ],
)  # fmt: skip
def test_the_mesh_to_start_from_leaves_room(name, topology, fsdp):
    """By hand: 6 bytes a parameter are 7.0, 15.4, 50.0 and 143 GB, half of the HBM 8.5, 51.4 and 50.9 GB (v5e, v5p, tpu7x)."""
    assert starting_mesh(preset(name), topology) == MeshConfig(data=-1, fsdp=fsdp)


@pytest.mark.parametrize(
    "mesh, accumulation, rows, found",
    [
        ({"data": -1, "fsdp": 1}, 1, 64, {"data": -1, "fsdp": 1, "context": 4}),
        ({"data": -1, "fsdp": 1}, 2, 64, {"data": -1, "fsdp": 1, "context": 8}),
        ({"data": -1, "fsdp": 16}, 1, 64, {"data": -1, "fsdp": 4, "context": 4}),  # replicas of 16 devices as before
        ({"data": 16, "fsdp": 16}, 1, 64, {"data": 16, "fsdp": 4, "context": 4}),
        ({"data": 16}, 1, 64, {"data": 16, "context": 4}),
        ({"data": -1, "fsdp": 1, "tensor": 2}, 1, 64, {"data": -1, "fsdp": 1, "tensor": 2, "context": 2}),
        ({"data": -1, "fsdp": 1, "context": 8}, 1, 64, {"data": -1, "fsdp": 1, "context": 8}),  # as it was asked for
        ({"data": -1, "fsdp": 1, "context": 2}, 1, 64, {"data": -1, "fsdp": 1, "context": 4}),
        ({"data": -1, "fsdp": 1}, 1, 512, {"data": -1, "fsdp": 1}),
        ({"data": -1, "fsdp": 1}, 1, 96, {"data": -1, "fsdp": 1, "context": 8}),  # 32 shards of three rows
        ({"data": 256, "fsdp": 1}, 1, 64, {"data": 256, "fsdp": 1}),  # no room for it: the compilation says so
    ],
)
def test_sequences_are_split_over_as_few_devices_as_use_all(mesh, accumulation, rows, found):
    """By hand, for 256 devices."""
    layout = split_sequences(Layout(MeshConfig(**mesh), accumulation, "none"), Batch(rows, 32_768, 256))
    assert layout == Layout(MeshConfig(**found), accumulation, "none")


def test_a_sequence_that_does_not_divide_is_not_split():
    layout = Layout(MeshConfig(data=-1, fsdp=1), 1, "none")
    assert split_sequences(layout, Batch(2, 36, 8)) == layout  # 36 are no 8 chunks
    assert split_sequences(layout, Batch(2, 40, 8)).mesh.context == 4


def test_the_search_finds_the_context_anew_for_each_number_of_micro_batches():
    attempt = lambda layout: {"fits": True, "peak_bytes": 1.0, "seconds_per_step": 10.0 - layout.accumulation}
    settings, layout = config(accumulations=(1, 4), remats=("full",)), Layout(MeshConfig(data=-1, fsdp=1), 2, "none")
    tried = search(settings, Batch(8, 4096, 16), layout, attempt)
    assert [str(each) for each in tried] == [
        "data=all context=4, 2 x none", "data=all context=2, 1 x none", "data=all context=8, 4 x none",
        "data=all context=8, 4 x full",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, devices, context",
    [("scale", (16, 64, 256), 16), ("scale_v5p", (16, 64, 256, 512), 16), ("scale_v6e", (16, 64, 256), 16)],
)
def test_the_scales_cover_chips_and_contexts(name, devices, context):
    """With 8,192 tokens a device, contexts of 16,384 and more are split over 2 to 16."""
    settings = from_mapping(pod_plan.Config, {key: value for key, value in get_config(name).items() if key != "experiment"})
    batches = [planner._batch(settings, *shape) for shape in planner._shapes(settings)]
    contexts, largest = (8192, 16_384, 32_768, 65_536, 131_072), devices[-1]
    assert [(batch.devices, batch.seq_len) for batch in batches] == [
        *((count, 4096) for count in devices), *((largest, seq_len) for seq_len in contexts)
    ]  # fmt: skip
    first = Layout(starting_mesh(preset("lfm2_350m"), settings.topologies[-1]), 1, "none")
    found = [split_sequences(first, batch).mesh for batch in batches]
    assert [mesh.context for mesh in found] == [1] * (len(devices) + 1) + [2, 4, 8, context]
    assert {(mesh.data, mesh.fsdp) for mesh in found} == {(-1, 1)}


def test_layouts_that_are_refused_do_not_stop_the_search():
    refused = lambda layout: None if layout.accumulation > 1 else peak(layout)
    settings = config(accumulations=(2,), remats=("full",))
    tried = search(settings, PLENTY, Layout(WHOLE, 1, "none"), attempts(refused))
    assert best(tried) == Layout(WHOLE, 1, "full")


def test_where_nothing_fits_the_remedies_are_told_with_what_they_save():
    settings = config(meshes=(HALVES,), accumulations=(2,), remats=("dots",))
    first = Layout(WHOLE, 1, "none")
    tried = search(settings, PLENTY, first, attempts(peak, capacity=1.0))
    assert best(tried) is None
    assert [(row["remedy"], row["saved_bytes"]) for row in ladder(first, tried)] == [
        ("accumulation 2, remat dots", 11.5), ("accumulation 2", 8.0),
    ]  # fmt: skip


def test_a_mesh_is_told_by_its_axes():
    assert mesh_text(WHOLE) == "fsdp=all"
    assert mesh_text(MeshConfig(data=4, fsdp=2, tensor=2)) == "data=4 fsdp=2 tensor=2"
    assert mesh_text(MeshConfig(fsdp=1)) == "one device"


@pytest.mark.parametrize(
    "message, needed",
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * 2**30),
        ("the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)", 2**29),
        ("something else", None),
    ],
)
def test_the_compilers_refusal_says_what_is_needed(message, needed):
    assert compilation.parse_needed_bytes(message) == needed


@pytest.mark.parametrize("topology, devices", [("v5e:16x16", 256), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_devices_of_a_topology(topology, devices):
    assert figures.device_count(topology) == devices


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"presets": ("lfm2_350",)}, "no model preset 'lfm2_350'; did you mean 'lfm2_350m'"),
        ({"topologies": ("v5:4x4",)}, "topologies: 'v5:4x4' is none, write it like v5e:16x16. Did you mean 'v5"),
        ({"batch_tokens": 1024}, "and not both"),
        ({"options": ("fast",)}, "options: 'fast' is not of the form NAME=VALUE"),
    ],
)
def test_mistakes_in_the_config_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_failed_compilation_is_told_and_not_kept(tmp_path, monkeypatch):
    def fail(module, job, seconds):
        raise RuntimeError("Traceback\n  File somewhere\nKeyError: 'nothing'\n")

    monkeypatch.setattr(compilation, "run_module", fail)
    assert compilation.compile_step(_job(), epath.Path(tmp_path), 10).problem == "failed: KeyError: 'nothing'"
    assert not list(tmp_path.iterdir())

    def late(module, job, seconds):
        raise TimeoutError

    monkeypatch.setattr(compilation, "run_module", late)
    assert compilation.compile_step(_job(), epath.Path(tmp_path), 10).problem == "not compiled in 10 s"


def _job():
    settings = config()
    return compilation.Job(
        model=TINY, topology="v5e:2x2", mesh=WHOLE, rows=4, seq_len=256, compute=ComputeConfig(), optimizer=settings.optimizer,
        loss=settings.loss,
    )  # fmt: skip


def test_a_scale_needs_two_slices_or_contexts(tmp_path):
    row = {"preset": "nano", "topology": "v5e:2x2", "seq_len": 512, "devices": 4, "seconds_per_step": 1.0}
    row |= {"interconnect_bytes": 1e6, "compile_seconds": 60.0}
    chips, contexts = row | {"topology": "v5e:4x4", "devices": 16}, row | {"seq_len": 2048}
    path = tmp_path / "scale.png"
    for alone in ([row], [row, row], [row, chips | {"seconds_per_step": None}], [row, chips | {"seq_len": 2048}]):
        assert not tables.plot_scale(alone, path)
        assert not path.exists()
    heights = []
    for together in ([row, chips], [row, contexts], [row, chips, contexts]):
        assert tables.plot_scale(together, path)
        heights.append(imread(path).shape[0])
    assert heights[0] == heights[1] == heights[2] // 2  # a row of panels for each of the two


def test_the_tables_tell_flops_and_bytes_by_kind():
    row = {"preset": "nano", "topology": "v5e:2x2", "seq_len": 512, "rows": 4, "mesh": "data=all", "accumulation": 1}
    row |= {"remat": "none", "scan_layers": True, "model_flops_per_device": 2.5e12, "compiled_matmul_flops_per_device": 2.25e12}
    row["collectives"] = [{"kind": "all-reduce", "bytes": 3e9}, {"kind": "all-gather", "bytes": 0.5e9}]
    known = ("preset", "topology", "seq_len", "rows", "accumulation", "remat")
    refused = {key: row[key] for key in known} | {"mesh": "none", "scan_layers": False}
    lines = tables.markdown([row, refused], [], [], []).splitlines()
    about = "| nano | v5e:2x2 | 4 x 512"
    columns = "model TFLOP | matmul TFLOP | all-gather GB | all-reduce GB | reduce-scatter GB | all-to-all GB"
    assert f"| preset | slice | rows x context | layout | {columns} | ragged-all-to-all GB | collective-permute GB |" in lines
    assert f"{about} | data=all; 1 x none in loops | 2.50 | 2.25 | 0.500 | 3.000 | 0.000 | 0.000 | 0.000 | 0.000 |" in lines
    assert f"{about} | none; 1 x none {'|  ' * 8}|" in lines
    assert ("sent by all-reduce", "3.0 GB") in list(tables.plan_lines(row))


def test_what_is_compiled_is_the_layout_that_is_tried(tmp_path, monkeypatch):
    jobs = []

    def refuse(job, *_):
        jobs.append(job)
        return {"fits": False, "problem": "refused", "peak_bytes": None, "seconds_per_step": None}

    monkeypatch.setattr(planner, "preset", lambda name: TINY)
    monkeypatch.setattr(planner, "measure", refuse)
    monkeypatch.setattr(planner, "_print_plan", lambda *_: None)
    settings = config(search="full", accumulations=(2,), remats=("full",), scan_layers=(True,))
    planner._plan(settings, epath.Path(tmp_path), Console(quiet=True), "nano", "v5e:2x2", 256)
    found = [(job.accumulation, job.compute.remat, job.compute.scan_layers) for job in jobs]
    assert found == list(itertools.product((1, 2), ("none", "full"), (False, True)))
    assert {(job.topology, job.rows, job.seq_len, job.compute.dtype) for job in jobs} == {("v5e:2x2", 16, 256, "bfloat16")}


def test_a_small_plan_splits_sequences_where_rows_are_few(tmp_path, monkeypatch):
    """Four rows of 256 tokens, and one of 1,024 that four devices share."""
    pytest.importorskip("libtpu")
    monkeypatch.setattr(planner, "preset", lambda name: TINY)
    settings = {"presets": ("nano",), "topologies": ("v5e:2x2",), "seq_lens": (256,), "seq_lens_on_last": (1024,)}
    pod_plan.main(config(tokens_per_device=256, **settings), epath.Path(tmp_path))
    plans = json.loads((tmp_path / "results.json").read_text())["plans"]
    assert [(plan["rows"], plan["seq_len"], plan["mesh"]) for plan in plans] == [
        (4, 256, "data=all"), (1, 1024, "data=all context=4")
    ]  # fmt: skip
    assert all(plan["fits"] and plan["seconds_per_step"] > 0 for plan in plans)
    sent = [{row["kind"]: row["bytes"] for row in plan["collectives"]} for plan in plans]
    assert [sum(each.values()) for each in sent] == [plan["interconnect_bytes"] for plan in plans]
    assert all(each["all-gather"] > 0 for each in sent)
    assert "## What a device computes and sends in a step" in (tmp_path / "pod_plan.md").read_text()
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_a_small_run_from_shapes_to_tables(tmp_path):
    pytest.importorskip("libtpu")
    run = {"source": "none", "model": TINY, "topology": "v5e:2x2", "devices": 2, "seq_len": 256, "tokens_per_second": 1e5}
    runs = pod_plan.PublishedRun(name="two devices", rows=4, **run), pod_plan.PublishedRun(name="no rows", rows=3, **run)
    pod_plan.main(config(published=runs), epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    found, refused = results["published"]
    assert found["fits"] and found["accumulation"] == 1 and found["devices"] == 2
    assert found["argument_bytes"] < found["peak_bytes"] < found["capacity_bytes"]
    assert 0 < found["mfu_share"] <= found["mfu_full_square_share"] < 1
    assert found["estimate_over_measured"] == pytest.approx(found["tokens_per_second_per_chip"] / 1e5)
    # The matmuls of three passes; the rest of the model's FLOPs are the convolution's.
    assert found["compiled_matmul_flops_per_device"] == pytest.approx(found["model_flops_per_device"], rel=0.02)
    assert sum(row["seconds"] for row in found["breakdown"]) == pytest.approx(found["seconds_per_step"])
    assert {row["kernel"] for row in found["kernels"]} == {"short_conv", "short_conv_grad"}
    assert all(row["schedule_read"] and row["loops_matched"] for row in found["kernels"])
    assert found["interconnect_bytes"] > 0
    assert refused["problem"].startswith("refused: a batch of 3 rows does not divide")
    assert tables.NOTE == results["note"]
    assert f"{found['tokens_per_second']:,.0f}" in (tmp_path / "pod_plan.md").read_text()
    assert (tmp_path / "pod_plan.png").stat().st_size > 10_000
