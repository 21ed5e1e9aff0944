"""The short convolution: kernels against the plain-JAX reference, and that against transformers, torch and a loop."""

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.kernels import short_conv, short_conv_gpu, short_conv_tpu
from lfm_jax.kernels.short_conv_reference import reference_backward, short_conv_reference, tap_visibility
from lfm_jax.sharding import MeshConfig, dealt_order, make_mesh

# Of the largest value of an array. float32: both sides are float32 sums in another order (the longest, over time in the taps'
# gradient, of 800 terms). bfloat16: both sides round the same values, so that they differ where the float32 sums fall on either
# side of a rounding boundary: by one unit in the last place, at most 2^-7 of the value.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7}


def _close(ours, theirs, dtype):
    """All leaves are within the tolerance of the type that they were computed in."""

    def compare(ours, theirs):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        theirs = np.asarray(theirs, np.float64)
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=TOLERANCE[dtype] * np.abs(theirs).max())

    jax.tree.map(compare, ours, theirs)


def _inputs(dtype, width, batch, seq, channels, *, biased=False, segmented=False, state=False, seed=0):
    """(bcx, weight, bias, visibility, initial_state), dy, dfinal; documents of seven positions on average."""
    keys = jax.random.split(jax.random.key(seed), 8)
    normal = lambda index, *shape: jax.random.normal(keys[index], shape)
    segment_ids = jnp.cumsum(jax.random.bernoulli(keys[4], 1 / 7, (batch, seq)), axis=1).astype(jnp.int32)
    inputs = (
        normal(0, 3, batch, seq, channels).astype(dtype),
        normal(1, width, channels),
        normal(2, channels) if biased else None,
        tap_visibility(segment_ids, None, width) if segmented else None,
        normal(3, batch, width - 1, channels).astype(dtype) if state else None,
    )
    return inputs, normal(5, batch, seq, channels).astype(dtype), normal(6, batch, width - 1, channels).astype(dtype)


def _values_and_gradients(forward, backward, inputs, dy, dfinal):
    # Emulated kernels run once: an optimized program would take longer to compile than it saves. And roundings must happen where
    # they are written, as they do on the real machine.
    options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
    run = jax.jit(lambda inputs, dy, dfinal: (forward(*inputs), backward(*inputs, dy, dfinal)), compiler_options=options)
    return run(inputs, dy, dfinal)


SHAPES = {
    "width": st.sampled_from([2, 3, 4, 7]),
    "batch": st.integers(1, 2),
    "seq": st.integers(16, 420),
    "channels": st.sampled_from([5, 128, 200]),
    "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
    "biased": st.booleans(),
    "segmented": st.booleans(),
    "state": st.booleans(),
}


@hypothesis.settings(max_examples=4)
@hypothesis.given(**SHAPES)
@hypothesis.example(3, 1, 384, 128, jnp.float32, True, True, True)  # whole blocks
@hypothesis.example(7, 2, 257, 640, jnp.bfloat16, True, True, True)  # a tail that one block of 128 would leave too short
@hypothesis.example(15, 1, 150, 130, jnp.float32, False, True, True)  # the widest
def test_tpu_kernels_equal_the_reference(width, batch, seq, channels, dtype, biased, segmented, state):
    inputs, dy, dfinal = _inputs(dtype, width, batch, seq, channels, biased=biased, segmented=segmented, state=state)
    emulate = lambda kernel: functools.partial(kernel, interpret=True, block_time=128)
    ours = _values_and_gradients(emulate(short_conv_tpu.forward), emulate(short_conv_tpu.backward), inputs, dy, dfinal)
    _close(ours, _values_and_gradients(short_conv_reference, reference_backward, inputs, dy, dfinal), dtype)


@hypothesis.settings(max_examples=3)
@hypothesis.given(**SHAPES)
@hypothesis.example(4, 2, 150, 200, jnp.float32, True, True, True)
@hypothesis.example(7, 1, 64, 5, jnp.bfloat16, False, True, False)
def test_gpu_kernels_equal_the_reference(width, batch, seq, channels, dtype, biased, segmented, state):
    inputs, dy, dfinal = _inputs(dtype, width, batch, seq, channels, biased=biased, segmented=segmented, state=state)
    emulate = lambda kernel: functools.partial(kernel, interpret=True)
    ours = _values_and_gradients(emulate(short_conv_gpu.forward), emulate(short_conv_gpu.backward), inputs, dy, dfinal)
    _close(ours, _values_and_gradients(short_conv_reference, reference_backward, inputs, dy, dfinal), dtype)


def test_reference_equals_a_loop():
    """Every option at once, in float64, position by position."""
    (bcx, weight, bias, _, state), _, _ = _inputs(jnp.float32, 3, 2, 20, 4, biased=True, state=True)
    segment_ids = np.array([[1] * 3 + [2] * 5 + [1] * 4 + [0] * 8, [7] + [8] * 19], np.int32)
    before = np.array([[9, 1], [7, 7]], np.int32)
    y, final = short_conv(
        bcx, weight, bias=bias, segment_ids=jnp.asarray(segment_ids), initial_state=state, initial_segment_ids=jnp.asarray(before)
    )
    gate_in, gate_out, x = np.asarray(bcx, np.float64)
    values, ids = np.concatenate([state, gate_in * x], axis=1), np.concatenate([before, segment_ids], axis=1)
    expected = np.zeros_like(x)
    for row, position, tap in np.ndindex(2, 20, 3):
        if ids[row, position + tap] == ids[row, position + 2]:
            expected[row, position] += np.asarray(weight, np.float64)[tap] * values[row, position + tap]
    np.testing.assert_allclose(y, gate_out * (expected + np.asarray(bias)[None, None, :]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(final, values[:, -2:], rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_equals_transformers_lfm2_short_conv(implementation):
    """With torch's conv1d inside: values, input gradients and the gradients of kernel and bias."""
    torch = pytest.importorskip("torch")
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    channels, width, batch, seq = 24, 3, 2, 33
    torch.manual_seed(0)
    config = Lfm2Config(
        hidden_size=channels, conv_L_cache=width, conv_bias=True, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    theirs = Lfm2ShortConv(config, layer_idx=0)
    theirs.out_proj = torch.nn.Identity()
    theirs.in_proj = torch.nn.Identity()
    bcx = torch.randn(batch, seq, 3 * channels, requires_grad=True)
    expected = theirs(bcx)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (bcx, theirs.conv.weight, theirs.conv.bias), dy)

    planes = lambda value: jnp.asarray(np.stack(np.split(value.detach().numpy(), 3, axis=-1)))
    weight = jnp.asarray(theirs.conv.weight.detach().numpy()[:, 0].T)
    bias = jnp.asarray(theirs.conv.bias.detach().numpy())
    function = lambda bcx, weight, bias: short_conv(bcx, weight, bias=bias, implementation=implementation)[0]
    y, transpose = jax.vjp(function, planes(bcx), weight, bias)
    dbcx, dweight, dbias = transpose(jnp.asarray(dy.numpy()))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(y, expected.detach().numpy())
    close(dbcx, planes(gradients[0]))
    close(dweight, gradients[1].numpy()[:, 0].T)
    close(dbias, gradients[2].numpy())


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize("dtype, start, stop", [(jnp.bfloat16, 50, 111), (jnp.float32, 64, 128)])
def test_perturbed_document_leaves_the_others_unchanged(implementation, dtype, start, stop):
    """Bit for bit, values and gradients, even where the perturbation is infinite; documents also end where the kernel's inner
    passes do (at multiples of 64), which then decide whether to mask by what lies outside of them."""
    (bcx, weight, _, _, _), dy, _ = _inputs(dtype, 4, 1, 150, 128)
    segment_ids = jnp.asarray([[1] * start + [2] * (stop - start) + [3] * (150 - stop)], jnp.int32)

    @jax.jit
    def run(bcx):
        function = lambda bcx: short_conv(bcx, weight, segment_ids=segment_ids, implementation=implementation)[0]
        y, transpose = jax.vjp(function, bcx)
        return y, transpose(dy)[0]

    before = run(bcx)
    for middle in (2 * bcx[:, :, start:stop], jnp.full_like(bcx[:, :, start:stop], jnp.inf)):
        after = run(bcx.at[:, :, start:stop].set(middle))
        for ours, theirs in zip(before, after, strict=True):
            np.testing.assert_array_equal(ours[..., :start, :], theirs[..., :start, :])
            np.testing.assert_array_equal(ours[..., stop:, :], theirs[..., stop:, :])
            assert not np.array_equal(ours[..., start:stop, :], theirs[..., start:stop, :])


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_chained_by_states_equal_the_whole(implementation, dtype):
    """Values and gradients, with segments that run across the cuts; one chunk is shorter than the kernel's width. In bfloat16 the
    values are equal bit for bit: what a state holds is what the convolution saw."""
    width, cuts = 4, (0, 2, 90, 150)
    (bcx, weight, bias, _, state), dy, dfinal = _inputs(dtype, width, 2, 150, 128, biased=True, state=True)
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3, 4], [1, 1, 2, 2]], [80, 5, 5, 60], axis=1), jnp.int32)

    def whole(bcx, weight, bias, state):
        return short_conv(
            bcx, weight, bias=bias, segment_ids=segment_ids, initial_state=state, implementation=implementation
        )  # fmt: skip

    def chained(bcx, weight, bias, state):
        parts, ids = [], jnp.repeat(segment_ids[:, :1], width - 1, axis=1)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            here = segment_ids[:, start:stop]
            y, state = short_conv(
                bcx[:, :, start:stop], weight, bias=bias, segment_ids=here, initial_state=state, initial_segment_ids=ids,
                implementation=implementation,
            )  # fmt: skip
            ids = jnp.concatenate([ids, here], axis=1)[:, -(width - 1) :]
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    def run(function):
        value, transpose = jax.vjp(function, bcx, weight, bias, state)
        return value, transpose((dy, dfinal))

    jit = functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})  # as on the real machine
    (ours, final), gradients = jit(functools.partial(run, chained))()
    (theirs, expected_final), expected_gradients = jit(functools.partial(run, whole))()
    np.testing.assert_array_equal(final, expected_final)
    _close(ours, theirs, dtype)
    _close(gradients, expected_gradients, dtype)
    if dtype == jnp.bfloat16:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_a_wide_state_is_rounded_to_the_type_of_the_sequence(implementation):
    (bcx, weight, _, _, _), _, _ = _inputs(jnp.bfloat16, 3, 1, 20, 8)
    state = jax.random.normal(jax.random.key(9), (1, 2, 8))
    run = functools.partial(short_conv, bcx, weight, implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, run(initial_state=state), run(initial_state=state.astype(jnp.bfloat16)))


@pytest.mark.parametrize("implementation", ["auto", "pallas", "reference"])
@pytest.mark.parametrize("batch", [4, 3])
def test_sharded_equals_unsharded(implementation, batch):
    """On 2 x 2 x 2 devices; a batch of 3 is divided by nothing and stays whole."""
    inputs, dy, dfinal = _inputs(jnp.float32, 3, batch, 40, 256, biased=True, segmented=False, state=True)
    bcx, weight, bias, _, state = inputs
    segment_ids = jnp.asarray([[1] * 15 + [2] * 25] * batch, jnp.int32)

    def run(mesh):
        def function(bcx, weight, bias, state):
            return short_conv(
                bcx, weight, bias=bias, segment_ids=segment_ids, initial_state=state, implementation=implementation
            )  # fmt: skip

        def step():
            value, transpose = jax.vjp(function, bcx, weight, bias, state)
            return value, transpose((dy, dfinal))

        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.device_get(jax.jit(step)())

    _close(run(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), run(None), jnp.float32)


@pytest.mark.parametrize("implementation", ["auto", "pallas", "reference"])
@pytest.mark.parametrize("width, segmented", [(3, True), (7, True), (4, False)])
def test_sequences_over_devices_equal_whole_ones(implementation, width, segmented):
    """Dealt over four devices, two rows of channels beside; documents end within chunks and at their borders."""
    (bcx, weight, bias, _, _), dy, dfinal = _inputs(jnp.float32, width, 2, 160, 256, biased=True)
    segment_ids = jnp.asarray([[1] * 20 + [2] * 65 + [3] * 75, [1] * 60 + [2] * 100], jnp.int32) if segmented else None
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, tensor=2))
    order = dealt_order(160, mesh.shape["context"])

    def run(bcx, dy, segment_ids):
        function = lambda *inputs: short_conv(
            inputs[0], inputs[1], bias=inputs[2], segment_ids=segment_ids, implementation=implementation
        )
        value, transpose = jax.vjp(function, bcx, weight, bias)
        return value, transpose((dy, dfinal))

    (y, final), (dbcx, *dtaps) = jax.jit(run)(bcx, dy, segment_ids)
    dealt = bcx[:, :, order], dy[:, order], None if segment_ids is None else segment_ids[:, order]
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(run)(*dealt))
    _close(found, ((y[:, order], final), (dbcx[:, :, order], *dtaps)), jnp.float32)


def test_sequences_that_do_not_divide_over_devices_are_refused():
    (bcx, weight, _, _, _), _, _ = _inputs(jnp.float32, 7, 1, 80, 8)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, context=8))):
        with pytest.raises(ValueError, match="a sequence of 80 does not divide into 16 chunks of at least 6 positions"):
            short_conv(bcx, weight)


def test_long_sequences_do_not_lose_the_final_state():
    """Whatever the length, the last block in time holds the whole final state, and blocks fit in VMEM."""
    for seq in (*range(16, 700), 1537, 4097, 107_521, 131_072):
        bcx = jax.ShapeDtypeStruct((3, 1, seq, 128), jnp.bfloat16)
        for block_time in (128, 512, 1024):
            plan = short_conv_tpu.make_plan(bcx, 15, biased=False, segmented=False, backward=True, block_time=block_time)
            assert plan.tail >= 14 and plan.block_time <= 1152


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [3, 4, 7])
def test_gpu_kernels_lower(kernel, dtype, width):
    """Through Pallas' Triton lowering, which needs no GPU."""
    inputs, dy, dfinal = _inputs(dtype, width, 1, 100, 128, biased=True, segmented=True, state=True)
    arguments = inputs if kernel == "forward" else (*inputs, dy, dfinal)
    lowered = jax.jit(getattr(short_conv_gpu, kernel)).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_the_platform_chooses_the_kernel():
    """What a program is compiled for decides, not where it is traced."""
    inputs, _, _ = _inputs(jnp.bfloat16, 3, 1, 128, 128)

    def lowered(implementation, platform, seq=128):
        function = lambda bcx, weight: short_conv(bcx[:, :, :seq], weight, implementation=implementation)[0]
        return jax.jit(function).trace(*inputs[:2]).lower(lowering_platforms=(platform,)).as_text()

    for implementation in ("auto", "pallas"):
        assert "tpu_custom_call" in lowered(implementation, "tpu")
    assert "triton" in lowered("pallas", "cuda")
    for implementation, platform in (("auto", "cpu"), ("auto", "cuda"), ("reference", "tpu")):
        assert "custom_call" not in lowered(implementation, platform)
    assert "custom_call" not in lowered("pallas", "tpu", seq=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "palas"}, "implementation must be one of auto, pallas, reference, got 'palas'"),
        ({"bcx": jnp.zeros((2, 1, 32, 8))}, r"bcx must be float32 or bfloat16 of \[3, .*\], got float32 of \[2, 1"),
        ({"bcx": jnp.zeros((3, 1, 32, 8), jnp.float16)}, "bcx must be float32 or bfloat16 .* got float16"),
        ({"weight": jnp.zeros((1, 8))}, r"weight must be \[width, 8\] with a width of at least 2, got \[1, 8\]"),
        ({"bias": jnp.zeros(9)}, r"bias must be \[8\]"),
        ({"segment_ids": jnp.zeros((1, 31), jnp.int32)}, r"segment_ids must be \[1, 32\]"),
        ({"initial_state": jnp.zeros((1, 3, 8))}, r"initial_state must be \[1, 2, 8\]"),
        ({"initial_segment_ids": jnp.zeros((1, 2), jnp.int32)}, "initial_segment_ids without segment_ids"),
        ({"weight": jnp.zeros((17, 8)), "implementation": "pallas"}, "takes widths of 2 to 15, got 17"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"bcx": jnp.zeros((3, 1, 32, 8)), "weight": jnp.zeros((3, 8))} | change
    with pytest.raises(ValueError, match=message):
        short_conv(**arguments)


def test_kernels_refuse_sequences_they_do_not_take():
    inputs, _, _ = _inputs(jnp.float32, 3, 1, 2, 8)
    with pytest.raises(ValueError, match="takes at least 16 positions, got 2"):
        short_conv_tpu.forward(*inputs)
    with pytest.raises(ValueError, match="at least as many positions, got width 3 and 2 positions"):
        short_conv_gpu.forward(*inputs)
