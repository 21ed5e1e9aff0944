"""The table of peaks against the compiler's device descriptions and the published ratios."""

import jax
import pytest

from lfm_jax.sharding import aot
from lfm_jax.sharding.chips import CHIPS, chip_of


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.topology])
def test_the_compiler_knows_the_chip_by_the_kind_in_the_table(name):
    pytest.importorskip("libtpu")
    assert chip_of(aot.tpu_devices(CHIPS[name].topology)[0]) is CHIPS[name]


def test_a_cpu_has_no_published_peak():
    assert chip_of(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize("name, ratio", [("v5e", 241), ("v5p", 166), ("v6e", 560), ("tpu7x", 313), ("h100", 295), ("h200", 206)])
def test_operations_per_byte_are_the_published_ones(name, ratio):
    assert CHIPS[name].flops / CHIPS[name].hbm_bytes == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("name, matrix_units", [("v5e", 4), ("v5p", 8), ("v6e", 16), ("tpu7x", 16)])
def test_clocks_make_the_peak_a_whole_number_of_matrix_units(name, matrix_units):
    """Counted in units of 128 x 128."""
    chip = CHIPS[name]
    assert chip.flops / (chip.clock_hz * 2 * 128**2) == pytest.approx(matrix_units, rel=0.01)
