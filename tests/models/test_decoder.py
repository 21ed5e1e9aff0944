"""Packing, padding and cached decoding of the hybrid decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, RopeConfig, functional, init_cache

DENSE = ModelConfig(
    vocab_size=61, embed_dim=32, layer_types=("conv", "full_attention", "conv"), num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, conv_bias=True,
)  # fmt: skip
LFM3 = dataclasses.replace(
    DENSE, layer_types=("conv", "sliding_attention", "full_attention"), conv_width=7, sliding_window=4, sandwich_norms=True,
    attention_gate=True, full_rope=RopeConfig(fraction=0.5), tie_embeddings=False,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=16, num_dense_layers=1))
CONFIGS = {"dense": DENSE, "lfm3": LFM3, "moe": MOE}
CAPACITY = 24


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """(config, forward, step): random weights and biases, a full forward pass and a cached step, both jitted."""
    return _model(CONFIGS[request.param])


def _model(config, compute=ComputeConfig()):
    functions = functional(lambda rngs: Decoder(config, compute, rngs=rngs))
    params, buffers = functions.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Norms and biases away from their ones and zeros, and logits of unit scale.
    leaves = [leaf + 0.15 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)

    @jax.jit
    def forward(tokens, segment_ids=None, positions=None):
        bound = functions.bind(params, buffers)
        return bound.logits(bound(tokens, segment_ids, positions).hidden)

    @jax.jit
    def step(tokens, segment_ids, cache):
        bound = functions.bind(params, buffers)
        output = bound(tokens, segment_ids, cache=cache)
        return bound.logits(output.hidden), output.cache

    return config, forward, step


def _tokens(batch, seq, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, seq), 0, 61)


def _cache(config, batch):
    return init_cache(config, batch, CAPACITY, jnp.float32)


def _decode(config, step, tokens, prompt, chunks=()):
    """Logits of every position: a prefill of `prompt` tokens, then chunks, then single steps."""
    cache, parts, start = _cache(config, tokens.shape[0]), [], 0
    for size in (prompt, *chunks):
        logits, cache = step(tokens[:, start : start + size], None, cache)
        parts.append(logits)
        start += size
    for index in range(start, tokens.shape[1]):
        logits, cache = step(tokens[:, index : index + 1], None, cache)
        parts.append(logits)
    return jnp.concatenate(parts, axis=1)


# Logits are of unit scale, and both sides are float32 sums in another order: 1e-4 is 1,000 roundings.
CLOSE = {"atol": 1e-4}


@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_prefill_then_single_steps_equals_the_full_forward(model, prompt):
    config, forward, step = model
    tokens = _tokens(2, 16)
    np.testing.assert_allclose(_decode(config, step, tokens, prompt), forward(tokens), **CLOSE)


def test_prompt_shorter_than_kernel(model):
    config, forward, step = model
    tokens = _tokens(1, config.conv_width + 3)
    np.testing.assert_allclose(_decode(config, step, tokens, 1), forward(tokens), **CLOSE)


@pytest.mark.parametrize("chunks", [(3, 5, 4), (1, 1, 9), (6, 2)])
def test_chunked_prefill_equals_full(model, chunks):
    config, forward, step = model
    tokens = _tokens(2, 16)
    np.testing.assert_allclose(_decode(config, step, tokens, 3, chunks), forward(tokens), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_left_padding_does_not_enter_conv_state(model, side):
    """Padding on either side, of any content, leaves caches and logits as if it were not there."""
    config, forward, step = model
    tokens = _tokens(1, 12)
    left, right = {"left": (5, 0), "right": (0, 5), "both": (2, 3)}[side]
    padded = jnp.pad(tokens[:, :7], ((0, 0), (left, right)), constant_values=33)
    segment_ids = jnp.pad(jnp.ones((1, 7), jnp.int32), ((0, 0), (left, right)))
    logits, cache = step(padded, segment_ids, _cache(config, 1))
    bare, expected = step(tokens[:, :7], None, _cache(config, 1))
    np.testing.assert_allclose(logits[:, left : left + 7], bare, **CLOSE)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **CLOSE), cache, expected)
    after, _ = step(tokens[:, 7:], None, cache)
    np.testing.assert_allclose(after, forward(tokens)[:, 7:], **CLOSE)


def test_batched_decode_equals_alone(model):
    """Rows of different lengths in one left-padded batch, each against its own run."""
    config, forward, step = model
    lengths, total = (3, 9, 6), 14
    tokens = _tokens(3, total)
    padded, segment_ids = np.zeros((3, 9), np.int32), np.zeros((3, 9), np.int32)
    for row, length in enumerate(lengths):
        padded[row, 9 - length :], segment_ids[row, 9 - length :] = tokens[row, :length], 1
    logits, cache = step(jnp.asarray(padded), jnp.asarray(segment_ids), _cache(config, 3))
    parts = [logits[:, -1:]]
    for offset in range(4):
        at = jnp.asarray(lengths)[:, None] + offset
        logits, cache = step(jnp.take_along_axis(tokens, at, axis=1), None, cache)
        parts.append(logits)
    together = jnp.concatenate(parts, axis=1)
    for row, length in enumerate(lengths):
        alone = forward(tokens[row : row + 1])[0, length - 1 : length + 4]
        np.testing.assert_allclose(together[row], alone, **CLOSE)


def _packed(config, forward, changed=False):
    """Three documents in a row of 20 with padding behind; `changed` alters the middle one."""
    first, middle, last = _tokens(1, 5, 3), _tokens(1, 6, 5 if changed else 4), _tokens(1, 6, 6)
    tokens = jnp.concatenate([first, middle, last, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segment_ids = jnp.asarray([[1] * 5 + [2] * 6 + [3] * 6 + [0] * 3])
    positions = jnp.asarray([[*range(5), *range(6), *range(6), *range(3)]])
    return forward(tokens, segment_ids, positions), (first, middle, last)


def test_packed_documents_equal_the_documents_alone(model):
    config, forward, _ = model
    logits, documents = _packed(config, forward)
    for document, start in zip(documents, (0, 5, 11), strict=True):
        np.testing.assert_allclose(logits[:, start : start + document.shape[1]], forward(document), **CLOSE)


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_packed_conv_no_leak_fast_and_slow_path(implementation):
    """Changing one document leaves the logits of the others as they were, bit for bit."""
    config, forward, _ = _model(dataclasses.replace(LFM3, moe=MOE.moe), ComputeConfig(short_conv=implementation))
    before, _ = _packed(config, forward)
    after, _ = _packed(config, forward, changed=True)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    np.testing.assert_array_equal(before[:, 11:17], after[:, 11:17])
    assert not np.allclose(before[:, 5:11], after[:, 5:11])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_phase_float32_at_long_positions_in_the_model(dtype):
    """Scores depend on distances alone, so a shift of all positions changes only roundings, whatever the model computes in: a
    float32 phase is off by 0.008 at position 131,071, a bfloat16 phase by hundreds."""
    config = dataclasses.replace(LFM3, layer_types=("full_attention", "sliding_attention"), full_rope=RopeConfig())
    _, forward, _ = _model(config, ComputeConfig(dtype=dtype))
    tokens, positions = _tokens(2, 16), jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    segment_ids = jnp.ones_like(positions)
    near, far = forward(tokens, segment_ids, positions), forward(tokens, segment_ids, positions + 131_056)
    assert float(jnp.std(near)) > 0.5
    np.testing.assert_allclose(far, near, atol=0.02 if dtype == "float32" else 0.15)


def test_padding_chooses_no_expert():
    """The router's load of a packed row, and of a left-padded prompt, is that of its tokens alone."""
    functions = functional(lambda rngs: Decoder(MOE, rngs=rngs))
    bound = functions.bind(*functions.init(jax.random.key(0)))
    tokens, positions = _tokens(1, 6), jnp.arange(6)[None]
    alone = bound(tokens).router_counts
    assert alone.shape == (2, 4) and float(alone.sum()) == 2 * 6 * 2
    segment_ids = jnp.asarray([[1] * 6 + [0] * 3])
    packed = bound(jnp.pad(tokens, ((0, 0), (0, 3))), segment_ids, jnp.pad(positions, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(packed.router_counts, alone)
    prompt = bound(jnp.pad(tokens, ((0, 0), (3, 0))), segment_ids[:, ::-1], cache=_cache(MOE, 1))
    np.testing.assert_array_equal(prompt.router_counts, alone)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_gradient(remat):
    def gradient(policy):
        functions = functional(lambda rngs: Decoder(MOE, ComputeConfig(remat=policy), rngs=rngs))
        params, buffers = functions.init(jax.random.key(0))

        def loss(params):
            bound = functions.bind(params, buffers)
            return jnp.mean(jnp.square(bound.logits(bound(_tokens(2, 8)).hidden)))

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, atol=1e-6), gradient(remat), gradient("none"))


def test_rematerialization_of_dots_computes_no_projection_again():
    """`dots` may add attention's products to the backward pass (scores, weighted values, two rotations), and nothing else."""

    def matmuls(policy):
        functions = functional(lambda rngs: Decoder(DENSE, ComputeConfig(remat=policy), rngs=rngs))
        loss = lambda params, buffers: jnp.sum(functions.bind(params, buffers)(_tokens(2, 8)).hidden)
        return jax.jit(jax.grad(loss)).lower(*jax.eval_shape(functions.init, jax.random.key(0))).as_text().count("dot_general")

    assert matmuls("dots") - matmuls("none") == 4 * DENSE.layer_types.count("full_attention")
    assert matmuls("full") > matmuls("dots")


def test_positions_with_a_cache_are_refused(model):
    config, _, _ = model
    bound = Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions are known from the cache"):
        bound(_tokens(1, 2), None, jnp.zeros((1, 2), jnp.int32), _cache(config, 1))


def test_packed_segments_without_positions_are_refused():
    with pytest.raises(ValueError, match="segment_ids without positions"):
        Decoder(DENSE, rngs=nnx.Rngs(0))(_tokens(1, 2), jnp.ones((1, 2), jnp.int32))
