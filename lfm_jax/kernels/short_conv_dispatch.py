"""One function for the short convolution, whatever computes it."""

import functools

import jax
import jax.numpy as jnp

from lfm_jax.arrays import SegmentIds
from lfm_jax.kernels import short_conv_gpu, short_conv_tpu
from lfm_jax.kernels.short_conv_reference import final_state, reference_backward, short_conv_reference, tap_visibility
from lfm_jax.sharding import CHUNKS, ends_before, map_shards, shard_count, shard_index, sum_shards

IMPLEMENTATIONS = ("auto", "pallas", "reference")

# By platform, "default" for the others. Which platform a program is for is known when it is lowered, not when it is traced: a
# program compiled ahead of time for TPUs is traced on a CPU. There, "pallas" emulates the TPU kernel, which is for tests.
# "auto" takes the kernel on TPUs for every shape: by the compiler's count the whole block is faster with it on each chip at each
# preset's shape (docs/benchmarks/short_conv.md). On GPUs XLA is faster than the kernel (docs/benchmarks/kernels.md).
_FORWARD = {
    "auto": {"tpu": short_conv_tpu.forward, "default": short_conv_reference},
    "pallas": {
        "tpu": short_conv_tpu.forward,
        "cuda": short_conv_gpu.forward,
        "rocm": short_conv_gpu.forward,
        "default": functools.partial(short_conv_tpu.forward, interpret=True),
    },
    "reference": {"default": short_conv_reference},
}
_BACKWARD = {
    "auto": {"tpu": short_conv_tpu.backward, "default": reference_backward},
    "pallas": {
        "tpu": short_conv_tpu.backward,
        "cuda": short_conv_gpu.backward,
        "rocm": short_conv_gpu.backward,
        "default": functools.partial(short_conv_tpu.backward, interpret=True),
    },
    "reference": {"default": reference_backward},
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _short_conv(implementation, bcx, weight, bias, visibility, initial_state):
    y = jax.lax.platform_dependent(bcx, weight, bias, visibility, initial_state, **_FORWARD[implementation])
    return y, final_state(bcx, initial_state, weight.shape[0])


def _short_conv_forward(implementation, *inputs):
    # Nothing but the inputs is kept: the backward pass makes the convolution again from what it reads anyway.
    return _short_conv(implementation, *inputs), inputs


def _short_conv_backward(implementation, inputs, gradients):
    bcx, weight, bias, _, initial_state = inputs
    computed = jax.lax.platform_dependent(*inputs, *gradients, **_BACKWARD[implementation])
    dbcx, dweight, dbias, dinitial = jax.tree.map(
        lambda gradient, value: gradient.astype(value.dtype), computed, (bcx, weight, bias, initial_state)
    )
    return dbcx, dweight, dbias, None, dinitial


_short_conv.defvjp(_short_conv_forward, _short_conv_backward)


def _on_chunks(implementation, bcx, weight, bias, segment_ids):
    """The convolution of a shard's chunks (see `lfm_jax.sharding.context`): rows of their own, each with the state before it."""
    _, batch, seq, channels = bcx.shape
    before = weight.shape[0] - 1
    rows = bcx.reshape(3, batch * CHUNKS, seq // CHUNKS, channels)
    ends = final_state(rows, None, before + 1).reshape(batch, CHUNKS, before, channels)
    initial_state = ends_before(ends).reshape(-1, before, channels)
    visibility = None
    if segment_ids is not None:
        segments = segment_ids.reshape(batch, CHUNKS, -1)
        initial_segment_ids = ends_before(segments[:, :, -before:]).reshape(-1, before)
        visibility = tap_visibility(segments.reshape(batch * CHUNKS, -1), initial_segment_ids, before + 1)
    y, final = _short_conv(implementation, rows, weight, bias, visibility, initial_state)
    last = final.reshape(batch, CHUNKS, before, channels)[:, -1]  # of the first device it is the sequence's
    last = jnp.where(shard_index("seq") == 0, last, jnp.zeros_like(last))
    return y.reshape(batch, seq, channels), sum_shards(last, "seq")


def short_conv(
    bcx: jax.Array,
    weight: jax.Array,
    *,
    bias: jax.Array | None = None,
    segment_ids: SegmentIds | None = None,
    initial_state: jax.Array | None = None,
    initial_segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Gate, causal depthwise convolution over time, gate: y = C * (conv(B * x) + bias).

    A tap at t - j is read only if its segment id equals the one at t. Chunks of a sequence chain through their states: values and
    gradients are those of the whole. Where the mesh splits sequences over devices, they are in the order of
    `lfm_jax.sharding.context`, unless there is an initial state.

    Args:
      bcx: [3, batch, seq, channels], B, C and x, float32 or bfloat16.
      weight: [width, channels], width >= 2; the last row multiplies the current position, as in torch's conv1d.
      bias: [channels].
      segment_ids: [batch, seq]; None: one segment.
      initial_state: [batch, width - 1, channels], the last values of B * x before the first position; None: zeros.
      initial_segment_ids: [batch, width - 1], the segments of the initial state; None: the first position's.
      implementation: "auto" (what is faster on the platform that the program is compiled for), "pallas" (a kernel, emulated on a
        CPU) or "reference" (XLA). Sequences of fewer than 16 positions, such as a step of decoding, are always left to XLA.

    Returns:
      y [batch, seq, channels] and the final state [batch, width - 1, channels], both in the type of `bcx`.

    Raises:
      ValueError: a shape or type that does not fit the others, an implementation that is not one, "pallas" for a width that the
        kernels do not take, or a sequence that the mesh splits and that does not divide.
    """
    _check(bcx, weight, bias, segment_ids, initial_state, initial_segment_ids, implementation)
    width, seq = weight.shape[0], bcx.shape[2]
    shards = shard_count("seq") if initial_state is None else 1
    chunks = CHUNKS * shards if shards > 1 else 1
    if chunks > 1 and (seq % chunks or seq // chunks < width - 1):
        raise ValueError(f"a sequence of {seq} does not divide into {chunks} chunks of at least {width - 1} positions")
    if initial_state is not None:
        initial_state = initial_state.astype(bcx.dtype)
    if seq // chunks < short_conv_tpu.MIN_SEQ or (implementation == "auto" and width > short_conv_tpu.MAX_WIDTH):
        implementation = "reference"
    along = None if chunks == 1 else "seq"
    arguments = {
        "bcx": (bcx, (None, "batch", along, "channels")),
        "weight": (weight, (None, "channels")),
        "bias": (bias, ("channels",)),
        "segment_ids": (segment_ids, ("batch", along)),
        "initial_state": (initial_state, ("batch", None, "channels")),
        "initial_segment_ids": (initial_segment_ids, ("batch", None)),
    }

    def compute(bcx, weight, bias, segment_ids, initial_state, initial_segment_ids):
        if chunks > 1:
            return _on_chunks(implementation, bcx, weight, bias, segment_ids)
        visibility = None if segment_ids is None else tap_visibility(segment_ids, initial_segment_ids, width)
        return _short_conv(implementation, bcx, weight, bias, visibility, initial_state)

    if implementation == "reference" and chunks == 1:
        return compute(*(value for value, _ in arguments.values()))
    given = {name: pair for name, pair in arguments.items() if pair[0] is not None}

    def on_shard(*shards):
        return compute(**dict.fromkeys(arguments) | dict(zip(given, shards, strict=True)))

    values, axes = zip(*given.values(), strict=True)
    out_axes = (("batch", along, "channels"), ("batch", None, "channels"))
    return map_shards(on_shard, values, axes, out_axes)


def _check(bcx, weight, bias, segment_ids, initial_state, initial_segment_ids, implementation) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if bcx.ndim != 4 or bcx.shape[0] != 3 or bcx.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"bcx must be float32 or bfloat16 of [3, batch, seq, channels], got {bcx.dtype} of {list(bcx.shape)}")
    _, batch, seq, channels = bcx.shape
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] != channels:
        raise ValueError(f"weight must be [width, {channels}] with a width of at least 2, got {list(weight.shape)}")
    before = weight.shape[0] - 1
    expected = {
        "bias": (bias, (channels,)),
        "segment_ids": (segment_ids, (batch, seq)),
        "initial_state": (initial_state, (batch, before, channels)),
        "initial_segment_ids": (initial_segment_ids, (batch, before)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for bcx {list(bcx.shape)}, got {list(value.shape)}")
    if initial_segment_ids is not None and segment_ids is None:
        raise ValueError("initial_segment_ids without segment_ids: give the segments of the sequence as well")
