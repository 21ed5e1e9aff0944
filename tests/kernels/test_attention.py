"""Splash attention, emulated, against attention with its scores written out: values and gradients. cuDNN's call, lowered."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lfm_jax.kernels import attention, attention_dispatch, attention_gpu, attention_tpu
from lfm_jax.sharding import MeshConfig, dealt_order, make_mesh

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 512, 4, 2, 64
LONG = 2048  # has several blocks of queries and of keys, of every choice


def _inputs(dtype=jnp.float32, seq=SEQ):
    """query, key, value, the gradient of the output, segment ids; documents end within blocks and at their borders."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, heads: jax.random.normal(key, (BATCH, seq, heads, HEAD_DIM)).astype(dtype)
    arrays = [draw(key, heads) for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)]
    segment_ids = jnp.asarray([[1] * 70 + [2] * 186 + [3] * (seq - 312) + [0] * 56, [1] * seq], jnp.int32)
    return *arrays, segment_ids


def _mask(segment_ids, window):
    place = np.arange(segment_ids.shape[1])
    mask = place[:, None] >= place
    if window is not None:
        mask &= place[:, None] < place + window
    return jnp.asarray(mask)[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _run(implementation, window, mesh=None, dtype=jnp.float32, seq=SEQ, packed=True):
    """The output and the gradients of query, key and value, in the order of the sequence."""
    query, key, value, dout, segment_ids = _inputs(dtype, seq)
    segment_ids = segment_ids if packed else jnp.ones_like(segment_ids)
    mask = _mask(segment_ids, window)
    order = dealt_order(seq, 1 if mesh is None else mesh.shape["context"])
    deal = lambda array, axis=1: jnp.take(array, order, axis)
    mask, segment_ids, dout = deal(deal(mask), 2), deal(segment_ids), deal(dout)

    def step(query, key, value):
        documents = segment_ids if packed else None
        function = lambda *inputs: attention(*inputs, mask, documents, window=window, implementation=implementation)
        out, transpose = jax.vjp(function, query, key, value)
        return out, *transpose(dout)

    inputs = [deal(array) for array in (query, key, value)]
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(step)(*inputs))
    return [array[:, np.argsort(order)] for array in found]


def _assert_close(found, expected, tolerance):
    """Sums of 512 products in another order: float32 rounds each by 2^-24, bfloat16 each result by 2^-9."""
    for name, ours, theirs in zip(("out", "query", "key", "value"), found, expected, strict=True):
        ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("partial_sums", [attention_tpu.PARTIAL_SUMS, 0])
@pytest.mark.parametrize("window", [None, 100])
def test_splash_attention_equals_the_reference(window, partial_sums, monkeypatch):
    """The backward pass in one kernel, and where its partial sums may have no memory in two."""
    monkeypatch.setattr(attention_tpu, "PARTIAL_SUMS", partial_sums)
    _assert_close(_run("splash", window, seq=LONG), _run("reference", window, seq=LONG), 1e-5)


def test_splash_attention_of_rows_that_are_one_document():
    _assert_close(_run("splash", None, packed=False), _run("reference", None, packed=False), 1e-5)


@pytest.mark.parametrize("implementation", ["splash", "rows"])
def test_attention_in_bfloat16(implementation):
    found, expected = (_run(each, None, dtype=jnp.bfloat16, seq=LONG) for each in (implementation, "reference"))
    _assert_close(found, expected, 2**-6)


@pytest.mark.parametrize("window", [None, 100])
def test_the_layouts_of_cpus_change_nothing(window):
    """Padding, which sees nobody, included."""
    _assert_close(_run("rows", window), _run("reference", window), 1e-6)


def test_a_cpu_takes_its_layouts():
    for ours, theirs in zip(_run("auto", None), _run("rows", None), strict=True):
        np.testing.assert_array_equal(ours, theirs)


OVER_DEVICES = [
    (MeshConfig(fsdp=1, context=2, tensor=4), None),  # of four devices two share a head of keys
    (MeshConfig(fsdp=2, context=2, tensor=2), 100),
    (MeshConfig(fsdp=2, context=4), None),
]


@pytest.mark.parametrize("implementation", ["splash", "rows", "reference"])
@pytest.mark.parametrize("config, window", OVER_DEVICES)
def test_heads_and_sequences_over_devices(implementation, config, window):
    _assert_close(_run(implementation, window, make_mesh(config)), _run("reference", window), 1e-5)


@pytest.mark.parametrize("config, window", OVER_DEVICES[1:])
def test_sequences_over_devices_where_the_backward_pass_is_two_kernels(config, window, monkeypatch):
    monkeypatch.setattr(attention_tpu, "PARTIAL_SUMS", 0)
    _assert_close(_run("splash", window, make_mesh(config)), _run("reference", window), 1e-5)


@pytest.mark.parametrize(
    "seq, window, calls, fused",
    [(4096, None, 8, True), (32_768, None, 8, True), (32_768, None, 9, False), (4096, 256, 8, False)],
)
def test_partial_sums_that_have_no_room_make_two_kernels(seq, window, calls, fused):
    """At 32,768 each of 8 calls with two heads has 16 blocks of keys x 65,536 queries x 256 bytes: 2^31 in all."""
    sizes = attention_tpu.block_sizes(2 * seq, seq, HEAD_DIM, window, calls)
    assert sizes.use_fused_bwd_kernel == fused and (sizes.block_q_dq is None) == fused


@pytest.mark.parametrize("window", [None, 1, 24, 64])
@pytest.mark.parametrize("places", [np.arange(128), np.repeat(dealt_order(64, 2), 2)], ids=["in order", "dealt, two heads"])
def test_blocks_of_a_mask_are_those_of_the_whole(places, window):
    keys = places.max() + 1
    mask = attention_tpu._Mask(places, keys, window)
    whole = np.asarray(_mask(jnp.ones((1, keys), jnp.int32), window))[0][places]
    pieces = lambda length, size: [slice(start, min(start + size, length)) for start in range(0, length, size)]
    blocks = [block for size in (1, 7, 32) for block in itertools.product(pieces(128, size), pieces(keys, 5))]
    for block in blocks:
        np.testing.assert_array_equal(mask[block], whole[block])


def test_a_shape_that_the_kernel_does_not_take_is_refused():
    short = jnp.zeros((1, 120, 2, 64))
    with pytest.raises(ValueError, match="takes sequences of a multiple of 128 and heads of a multiple of 64, got 120 and 64"):
        attention(short, short, short, jnp.ones((1, 120, 120), bool), None, implementation="splash")
    with pytest.raises(ValueError, match="takes whole sequences of even length in bfloat16 or float16, .* in float32, and 64"):
        attention(short, short, short, jnp.ones((1, 120, 120), bool), None, implementation="cudnn")


@pytest.mark.parametrize("packed, window", [(True, None), (True, 100), (False, None), (False, 100)])
def test_what_cudnn_is_asked_for_is_the_reference(packed, window, monkeypatch):
    """No GPU is here: XLA answers the same call with the same arguments."""
    asked = jax.nn.dot_product_attention
    by_xla = lambda *args, **kwargs: asked(*args, **kwargs | {"implementation": "xla"})
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    run = functools.partial(_run, window=window, packed=packed, dtype=jnp.bfloat16)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside of jax.nn
        found = run("cudnn")
    _assert_close(found, run("reference"), 2**-6)


@pytest.mark.parametrize("packed", [True, False])
def test_auto_is_lowered_to_cudnn_on_nvidia_gpus(packed, monkeypatch):
    """Forward and backward; packed rows bring a bias, others none."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of a machine that has it
    monkeypatch.setattr(attention_dispatch, "target_platform", lambda: "gpu")
    monkeypatch.setattr(attention_gpu, "available", lambda: True)
    query, key, value, dout, segment_ids = _inputs(jnp.bfloat16)

    def step(query, key, value, dout):
        documents = segment_ids if packed else None
        out, transpose = jax.vjp(lambda *inputs: attention(*inputs, _mask(segment_ids, None), documents), query, key, value)
        return out, transpose(dout)

    text = jax.jit(step).trace(query, key, value, dout).lower(lowering_platforms=("cuda",)).as_text()
    bias = "ScaleBias" if packed else ""
    assert f"__cudnn$fmha{bias}Softmax" in text and f"__cudnn$fmha{bias}SoftmaxBackward" in text


def test_gpus_that_are_not_nvidias_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(attention_dispatch, "target_platform", lambda: "gpu")
    assert not attention_gpu.available()
    *inputs, _, segment_ids = _inputs(jnp.bfloat16)
    mask = _mask(segment_ids, None)
    text = jax.jit(lambda *inputs: attention(*inputs, mask, segment_ids)).trace(*inputs).lower().as_text()
    assert "cudnn" not in text
