"""The benchmark's counting, by hand, and one small run of it."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental import pallas as pl

from experiments.benchmarks import short_conv, tpu_compiler


def test_bundles_are_counted_by_loop():
    text = """
     0   :  { %s0 = sld [smem:[#allocation0]] } /* Start region 0 */
   0x1 LB: > { %s1 = sand.u32 1023, %s0 } /* the grid's loop */
   0x2   : > { %s2 = sadd.s32 1, %s1 }
   0x3 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x4   : >> { %v2 = vadd.f32 %v1, %v1
base_bounds: (3, 1, 512, 8) } /* a comment of several lines */
   0x5   : >> { %v3 = vmul.f32 %v1, %v1 }
   0x6   : > {}
   0x7 LB: >> { %v1 = vld [vmem:[%s1]] }
   0x8 PF: > { %s3 = smov 0 }
   0x9   :  { %s3 = smov 0 }
"""
    assert tpu_compiler.parse_schedule(text) == tpu_compiler.Schedule(step=4, loops=(3, 1))


def test_estimates_are_summed_over_instructions():
    line = '%a = f32[] add(%b, %c), backend_config={"estimated_cycles":"21"}'
    assert tpu_compiler.estimated_cycles(f"{line}\n{line}") == 42
    assert tpu_compiler.estimated_cycles(line.replace("21", str(2**63 - 1))) is None


def test_operands_that_xla_keeps_in_vmem_are_found():
    hlo = """
      %in.1 = bf16[3,8]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop
      %edge = f32[8]{0:T(128)} broadcast(%c), dimensions={}
      %conv.7 = (bf16[8]{0:T(8,128)S(1)}, f32[4]{0}) custom-call(%in.1, %edge, %in.1), custom_call_target="tpu_custom_call"
    """
    assert tpu_compiler.operands_in_vmem(hlo) == {"conv": [True, False, True, True, False]}


def test_block_bytes_count_each_block_when_it_changes_and_no_padding():
    def copy(rows, constant, out):
        out[...] = rows[...] + constant[...]

    def function(rows, constant):
        return pl.pallas_call(
            copy,
            grid=(2, 3),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j: (j, i)), pl.BlockSpec((8, 128), lambda i, j: (0, i))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (j, i)),
            out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
            interpret=True,
        )(rows, constant)

    jaxpr = jax.make_jaxpr(jax.jit(function))(jnp.zeros((20, 256)), jnp.zeros((8, 256))).jaxpr
    # Rows and output once, without the 4 rows behind the end; the constant twice, once for each column of blocks.
    assert tpu_compiler.block_bytes(jaxpr) == [4 * 20 * 256, 4 * 2 * 8 * 128, 4 * 20 * 256]


def test_least_bytes_by_hand():
    assert short_conv.least_bytes((2, 100, 8, 3), "forward", packed=False) == 2 * 4 * 2 * 100 * 8 + 4 * 3 * 8
    assert short_conv.least_bytes((2, 100, 8, 3), "backward", packed=True) == 2 * 7 * 2 * 100 * 8 + 2 * 4 * 3 * 8 + 4 * 2 * 100


def test_a_failed_compilation_says_why():
    pytest.importorskip("libtpu")
    with pytest.raises(RuntimeError, match=r"(?s)compiling .* failed:.*KeyError: 'v1'"):
        tpu_compiler.measure(short_conv.__name__, {"chip": "v1", "shape": (1, 128, 128, 3), "schedules": True})


@pytest.mark.heavy
def test_kernel_meets_its_bounds_on_v5e(tmp_path):
    """A small run: the bytes are near the floor, the arithmetic is hidden, and the tables hold what results.json holds."""
    pytest.importorskip("libtpu")
    config = short_conv.Config(chips=("v5e",), presets=("lfm2_350m",), batches=(2,), long_seq=8192)
    short_conv.main(config, epath.Path(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["most_bytes_over_least"] < 1.05
    assert results["most_compute_over_memory"] < 1
    assert results["least_xla_over_kernel_block"] > 1
    assert len(results["kernels"]) == 8 and len(results["blocks"]) == 4
    tables = (tmp_path / "short_conv.md").read_text()
    assert all(f"{row['kernel_cycles']:,}" in tables for row in results["kernels"])
    assert (tmp_path / "short_conv.png").stat().st_size > 10_000


def test_a_width_of_seven_shares_more_passes_with_a_border():
    share = functools.partial(short_conv._masked_share, short_conv.Config(chips=(), presets=(), document_length=640))
    assert share(3, "forward", 64) == pytest.approx(65 / 640)
    assert share(7, "backward", 64) == pytest.approx(75 / 640)
