"""The benchmark's counting, by hand, and one small run of it."""

import itertools

import pytest

from experiments.benchmarks import grouped_matmul
from lfm_jax.sharding.chips import CHIPS

SHAPE = 32_768, 32, 2048, 1792


def _row(**found):
    return grouped_matmul._kernel_row("v5p", "lfm2_8b_a1b", SHAPE, {"xla_cycles": 1000, "pass": "product", **found})


def test_a_kernel_takes_as_long_as_its_slowest_part_and_xla_beside_it():
    row = _row(implementation="pallas", grid=(2, 96), tile=(512, 896), step_bundles=200, loop_bundles=[3000, 100])
    chunks, visits = 32_768 // 128 + 31, 32_768 // 512 + 31
    assert row["bundle_cycles"] == visits * 200 + chunks * 3000
    peak = CHIPS["v5p"].flops / CHIPS["v5p"].clock_hz
    assert row["unit_cycles"] == round(2 * chunks * 128 * 2048 * 1792 / peak)
    moved = 2 * (32_768 * (2 * 2048 + 2 * 1792) + 32 * 2048 * 1792)
    assert row["memory_cycles"] <= round(moved * 1.75e9 / CHIPS["v5p"].hbm_bytes)
    assert row["cycles"] == max(row["bundle_cycles"], row["unit_cycles"], row["memory_cycles"]) + 1000
    assert row["floor_over_cycles"] == pytest.approx(2 * 32_768 * 2048 * 1792 / peak / row["cycles"], rel=1e-4)


def test_three_blocks_of_columns_leave_one_of_two_cores_idle():
    """As XLA's own kernel has them."""
    row = _row(implementation="ragged_dot", grid=(3, 287, 1), tile=(128, 640), step_bundles=2000, loop_bundles=[])
    assert row["bundle_cycles"] == 2 * 287 * 2000
    peak = CHIPS["v5p"].flops / CHIPS["v5p"].clock_hz
    assert row["unit_cycles"] == round(2 * 287 * 128 * 2048 * 1792 / peak * 4 / 3)


def test_without_a_kernel_there_are_xlas_cycles_alone():
    row = _row(implementation="ragged_dot")
    assert row["cycles"] == 1000 and "tile_rows" not in row


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'v7p' is none. Did you mean"):
        grouped_matmul.Config(chips=("v7p",), presets=())
    with pytest.raises(ValueError, match="lfm2_350m has no experts"):
        grouped_matmul.Config(chips=("v5e",), presets=("lfm2_350m",))


def test_a_small_run_fills_the_tables():
    """Rows that tiles divide, 4 experts of 256 x 256."""
    pytest.importorskip("libtpu")
    shape = 512, 4, 256, 256
    rows = [
        grouped_matmul._kernel_row("v5e", "small", shape, found)
        for found in grouped_matmul._measure({"chip": "v5e", "shape": shape})
    ]
    assert {(row["implementation"], row["pass"]) for row in rows} == set(
        itertools.product(grouped_matmul.IMPLEMENTATIONS, grouped_matmul.PASSES)
    )
    assert all(row["cycles"] > row["floor_cycles"] > 0 for row in rows)
    without = [(row["implementation"], row["pass"]) for row in rows if "tile_rows" not in row]
    assert without == [("ragged_dot", "gradient of matrices")]
    block = {"topology": "v5p:2x2x1", "share": 4, "exchange": "gather", "link_bytes": 2e6, "link_seconds": 1e-3}
    block |= {"beside_bytes": 3e6, "beside_cycles": 7, "temporary_bytes": 4e6}
    lines = grouped_matmul._markdown(rows, [block]).splitlines()
    assert len(lines) == 2 + len(rows) + 1 + 3
    assert lines[-1] == "| v5p:2x2x1 | 4 | gather | 2 | 1.00 | 3 | 7 | 4 |"
