"""What the benchmark reads off compiled programs."""

import json

import pytest
from etils import epath

from experiments.benchmarks import quantized_matmul
from experiments.benchmarks.quantized_matmul import Config, operand_types

HLO = """
  %a.1 = s8[8,4]{1,0} parameter(0)
  %b = s8[4,2]{1,0} parameter(1)
  %c = bf16[4,2]{1,0} parameter(2)
  %convolution.2 = s32[8,2]{1,0} convolution(%a.1, %b), window={size=1}
  ROOT %dot = bf16[2,2]{1,0} dot(%c, %c), lhs_contracting_dims={0}
"""


def test_products_are_counted_by_the_numbers_they_multiply():
    assert operand_types(HLO) == {"s8 x s8": 1, "bf16 x bf16": 1}


def test_a_small_feed_forward_multiplies_eight_bits_forwards_and_for_the_gradient_by_its_input(tmp_path):
    pytest.importorskip("libtpu")
    config = Config(chips=("v5e",), presets=("nano",), matmuls=("plain", "int8"), rows=1, seq=256)
    quantized_matmul.main(config, epath.Path(tmp_path))
    plain, int8 = json.loads((tmp_path / "results.json").read_text())["feed_forwards"]
    assert plain["products"] == {"bf16 x bf16": 9} and plain["cycles_over_plain"] == 1
    assert int8["products"]["s8 x s8"] == 6 and sum(int8["products"].values()) == 9
    assert int8["cycles_over_plain"] == pytest.approx(int8["cycles"] / plain["cycles"])
    assert "| v5e | nano (192 x 512) | int8 |" in (tmp_path / "quantized_matmul.md").read_text()


def test_a_chip_that_is_none_is_refused():
    with pytest.raises(ValueError, match="chips: 'v5' is none"):
        Config(chips=("v5",), presets=("nano",))
