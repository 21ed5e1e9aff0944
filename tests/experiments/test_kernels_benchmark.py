"""The benchmark of kernels as they run: its errors, floors and table, on a CPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.benchmarks import device_rates, kernels
from lfm_jax.configuration import ConfigError
from lfm_jax.models import preset

NANO = preset("nano")


def config_of(**changes):
    small = {
        "platform": "cpu", "presets": ("nano",), "tokens": 128, "seqs": (64,), "document_length": 16, "dtype": "float32",
        "attention": ("rows", "reference"), "short_conv": ("reference",), "matmul": 64, "read_bytes": 2**16,
        "grouped_matmul": ("blocks", "reference"), "experts": ((4, 2, 16, 24),), "expert_tokens": 128, "least_seconds": 0.0,
    }  # fmt: skip
    return kernels.Config(**{**small, **changes})


def test_every_implementation_is_timed_and_held_against_the_exact_one(tmp_path):
    """Also one that the device does not take, whose reason stands in its row."""
    kernels.main(config_of(attention=("rows", "cudnn", "reference")), epath.Path(tmp_path))
    rows = json.loads((tmp_path / "results.json").read_text())["kernels"]
    assert [(row["kernel"], row["packed"], row["implementation"]) for row in rows] == [
        *(("short_conv", packed, "reference") for packed in (False, True)),
        *(("attention", packed, name) for packed in (False, True) for name in ("rows", "cudnn", "reference")),
        *(("grouped_matmul", False, name) for name in ("blocks", "reference")),
    ]
    failed = [row for row in rows if "failed" in row]
    assert {row["implementation"] for row in failed} == {"cudnn"} and "in bfloat16 or float16" in failed[0]["failed"]
    for row in rows:
        if row not in failed:
            assert len(row["errors"]) == {"attention": 4, "short_conv": 3, "grouped_matmul": 3}[row["kernel"]]
            assert max(row["errors"]) < 1e-5
            assert 0 < row["forward_seconds"] and 0 < row["of_both_floor"]
    table = (tmp_path / "kernels.md").read_text().splitlines()
    assert len(table) == 2 + len(rows) and table[2].split(" | ")[-2] == "1.00"


def test_an_error_is_of_each_output_and_gradient():
    case = kernels._attention(config_of(), NANO, 64, None)
    exact = kernels._exact(case)
    assert [array.shape[0] for array in exact] == [1] * 4  # of the first row alone
    output, (first, *others) = kernels._both(case.make("rows"))(case.slope, *case.inputs)
    errors = kernels._errors(case, (output, (1.5 * first, *others)), exact)
    assert errors == pytest.approx([0, 0.5, 0, 0], abs=1e-5)


@pytest.mark.parametrize("make", [kernels._attention, kernels._short_conv])
def test_packed_rows_are_those_of_their_documents(make):
    """The first document is computed as in a row of its own; those behind it see nothing of what is before them."""
    whole, packed = (make(config_of(), NANO, 64, length) for length in (None, 16))
    of_row, of_documents = (np.asarray(case.make("reference")(*case.inputs)) for case in (whole, packed))
    assert of_documents[:, :16] == pytest.approx(of_row[:, :16], abs=1e-6)
    assert abs(of_documents[:, 16] - of_row[:, 16]).max() > 0.1
    assert (whole.about["packed"], packed.about["packed"]) == (False, True)


def test_what_is_least_by_hand():
    """Two products, below the diagonal of each document, and five backward; each array once."""
    least = lambda length: kernels._attention(config_of(), NANO, 64, length).least
    queries, keys = 4 * 128 * NANO.num_heads * NANO.head_dim, 4 * 128 * NANO.num_kv_heads * NANO.head_dim
    flops = 2 * (2 * 128 * NANO.num_heads * NANO.head_dim * 64) / 2
    assert least(None) == [(2 * (queries + keys), flops), (4 * (queries + keys), 2.5 * flops)]
    assert least(16)[0][1] == flops / 4
    forward, backward = kernels._short_conv(config_of(dtype="bfloat16"), NANO, 64, None).least
    taps = 4 * 3 * NANO.embed_dim
    assert forward == (2 * 4 * 128 * NANO.embed_dim + taps, 0) and forward[0] < backward[0]
    assert kernels._short_conv(config_of(), NANO, 64, None).least[0] == (4 * 4 * 128 * NANO.embed_dim + taps, 0)
    rows, matrices, out, flops = 256 * 16, 4 * 16 * 24, 256 * 24, 2 * 256 * 16 * 24
    assert kernels._grouped_matmul(config_of(), (4, 2, 16, 24)).least == [
        (4 * (rows + matrices + out), flops), (4 * (2 * rows + 2 * matrices + out), 2 * flops),
    ]  # fmt: skip


def test_a_floor_is_the_longer_of_bytes_and_flops(monkeypatch):
    monkeypatch.setattr(kernels, "seconds_of", lambda *_, least_seconds: [9.0, 2.0, 1.0])
    case = kernels._attention(config_of(), NANO, 64, None)
    case = kernels.dataclasses.replace(case, least=[(10, 1), (1, 30)])
    rates = {"read_bytes_per_second": 10.0, "matmul_flops_per_second": 10.0}
    (row,) = kernels._rows(config_of(), case, ("rows",), rates)
    assert (row["floor_forward_seconds"], row["floor_both_seconds"]) == (1, 4)
    assert (row["forward_seconds"], row["of_forward_floor"], row["of_both_floor"]) == (2, 0.5, 2)


def test_rows_too_long_for_the_reference_have_no_error():
    case = kernels._attention(config_of(longest_reference=32), NANO, 64, None)
    assert kernels._exact(case) is None
    assert kernels._markdown([
        {**case.about, "implementation": "rows", "forward_seconds": 0.001, "both_seconds": 0.002, "of_forward_floor": 0.5,
         "of_both_floor": 0.25, "errors": None},
    ]).splitlines()[-1].endswith("| rows | 1.000 | 50% | 2.000 | 25% | 1.00 |  |")  # fmt: skip


def test_nothing_that_runs_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no implementation could be run; the first said ValueError: cuDNN's attention takes"):
        kernels.main(config_of(attention=("cudnn",), short_conv=(), experts=()), epath.Path(tmp_path))
    assert "cuDNN's attention takes" in (tmp_path / "kernels.md").read_text()


def test_another_platform_is_no_place_for_it(tmp_path):
    with pytest.raises(ConfigError, match="platform='tpu', and jax computes on a cpu: run it on a machine with a tpu"):
        kernels.main(config_of(platform="tpu"), epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": ("huge",)}, "no model preset 'huge'"),
        ({"attention": ("flash",)}, "attention has 'flash'; known are splash, cudnn, rows, reference, pallas"),
        ({"short_conv": ("cudnn",)}, "short_conv has 'cudnn'; known are pallas, reference"),
        ({"grouped_matmul": ("megablox",)}, "grouped_matmul has 'megablox'; known are pallas, blocks, reference"),
        ({"seqs": (48,)}, "tokens=128 must divide into rows of 48, and these into documents of 16"),
        ({"document_length": 48}, "tokens=128 must divide into rows of 64, and these into documents of 48"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_rates_are_those_of_the_turns(monkeypatch):
    """A product of 8 x 8 is 1,024 FLOPs, and its rate that of the fastest turn; a matrix's that of the middle one."""
    turns = iter([[4.0, 2.0, 8.0], [4.0, 2.0, 8.0]])
    monkeypatch.setattr(device_rates, "seconds_of", lambda call, *inputs, least_seconds: (call(*inputs), next(turns))[1])
    assert device_rates.matmul_flops_per_second(8, "float32") == 512
    assert device_rates.read_bytes_per_second(3 * 2 * 4096, "bfloat16") == 3 * 2 * 4096 / 4


def test_a_turn_is_of_calls_that_have_ended():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, x: x @ x / 300, x))
    inputs = jnp.ones((300, 300))
    (one, *_), none = (device_rates.seconds_of(call, inputs, least_seconds=0.0) for call in (slow, jax.jit(lambda x: x)))
    assert one > 10 * min(none) and len(none) >= 3
