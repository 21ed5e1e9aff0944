"""The benchmark of attention's blocks: what it reads and counts, by hand and against the kernel's own tables."""

import numpy as np
import pytest

from experiments.benchmarks import attention
from experiments.benchmarks.attention import Branches, Problem
from lfm_jax.kernels import attention_tpu


def test_bundles_are_counted_by_branch():
    text = """
     0   :  { %s0 = sld [smem:[#allocation0]] } /* Start region 0 */
   0x1 LB: > { %s1 = sand.u32 1023, %s0 }
   0x2   : > { %9 = sbr.rel (%p1) target = $region44 } /* around all of a step */
   0x3   : > { %10 = sbr.rel (%p2) target = $region48 }
   0x4   : > { %v1 = vld [vmem:[%s1]] }
   0x5 PF: > { %s2 = sld [smem:[#allocation4]] } /* Start/End empty region 48 :: Start region 49 */
   0x6   : > { %11 = sbr.rel (%p3) target = $region52 }
   0x7   : > { %v2 = vadd.f32 %v1, %v1 }
   0x8   : > { %v3 = vadd.f32 %v1, %v1 }
   0x9   : > {}
   0xa PF: > { %s2 = sld [smem:[#allocation4]] } /* Start/End empty region 52 :: Start region 54 */
   0xb   : > { %12 = sbr.rel (%p4) target = $region56 }
   0xc   : > { %v4 = vld [vmem:[%s1]] }
   0xd   : > { %v4 = vld [vmem:[%s1]] }
   0xe PF: > { %s3 = smov 0 } /* Start/End empty region 56 */
   0xf PF: > { %s3 = smov 0 } /* Start/End empty region 44 :: Start region 140 */
  0x10   :  { %13 = sbr.rel (!%p5) target = $region141 }
"""
    assert attention.parse_branches(text) == Branches(always=6, begin=2, work=4, end=3)


@pytest.mark.parametrize("block_q, block_kv", [(256, 128), (128, 256)])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("group", [1, 4])
def test_blocks_that_work_are_those_of_the_kernels_mask(block_q, block_kv, window, group):
    problem = Problem(heads=4, head_dim=64, window=window, seq=1024, group=group)
    live = problem.live(block_q, block_kv)
    place, key = np.repeat(np.arange(1024), group)[:, None], np.arange(1024)
    seen = (key <= place) & (key > place - (window or 1024))
    blocks = seen.reshape(len(live), block_q, -1, block_kv).any(axis=(1, 3))
    np.testing.assert_array_equal(live, blocks)
    sizes = attention_tpu.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q, block_kv_dq=block_kv
    )
    kernel = attention_tpu.make_kernel(tuple(range(1024)), group, 1, window or None, sizes, True)
    assert kernel.fwd_mask_info.block_mask.shape[1:] == (len(live), live.sum(axis=1).max())
    assert kernel.dkv_mask_info.block_mask.shape[1:] == (live.sum(axis=0).max(), live.shape[1])


def test_seconds_are_those_of_the_slowest_unit():
    """Two heads of 64 that share keys, four blocks of queries and two of keys, six of eight at work; v5e."""
    problem = Problem(heads=2, head_dim=64, window=0, seq=2048, group=2)
    branches = Branches(always=100, begin=10, work=20_000, end=30)
    seconds = lambda kernel, branches: attention.kernel_seconds(kernel, branches, problem, 1024, 1024, "v5e")
    assert seconds("fwd", branches) == pytest.approx((8 * 100 + 4 * 40 + 6 * 20_000) / 1.5e9)
    assert seconds("dkv", branches) == pytest.approx((8 * 100 + 2 * 40 + 6 * 20_000) / 1.5e9)
    idle = Branches(always=0, begin=0, work=0, end=0)
    # The unit is half empty: a product counts as one of heads of 128.
    assert seconds("fwd", idle) == pytest.approx(6 * 2 * 2 * 1024 * 1024 * 128 / 197e12)
    # Parts of the queries' gradient: 2 blocks of keys x 4096 queries x 128 lanes of 2 bytes, read again, and the sum written.
    extra = seconds("fused", branches) - seconds("dkv", branches)
    assert extra == pytest.approx(3 * 4096 * 256 / 819e9)


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="chips: 'v5x' is none"):
        attention.Config(chips=("v5x",), shapes=(), seqs=(), causal=(), windowed=())
