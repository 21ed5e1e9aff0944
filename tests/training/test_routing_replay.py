"""Experts that were chosen when answers were drawn, told by the engine and replayed in training: they line up token by token."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lfm_jax.generation import Engine, EngineConfig, LoopConfig, Request, SamplingConfig
from lfm_jax.generation.prefixes import Prefixes
from lfm_jax.generation.requests import Answer, joined
from lfm_jax.generation.slots import Chosen
from lfm_jax.models import ComputeConfig, Decoder, ModelConfig, MoEConfig, functional, init_cache
from lfm_jax.sharding import MeshConfig, make_mesh
from lfm_jax.training import (
    make_eval_step,
    make_policy_log_probs_step,
    place_batch,
    policy_gradient_member,
    policy_objective,
)

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=16, layer_types=("full_attention", "conv", "conv"), num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=24, moe=MoEConfig(num_experts=6, experts_per_token=2, mlp_dim=12, num_dense_layers=1), context_length=64,
)  # fmt: skip
LAYERS, TOP_K = 2, 2
ROWS, SEQ, NEW = 8, 24, 9
LENGTHS = (3, 1, 11, 13, 2, 6, 5, 6)  # two are read together
ENVIRONMENTS = ("a", "b", "nobody")
TELLING = EngineConfig(slots=2, prefill_chunk=4, prefill_rows=2, steps=3, prefix_bytes=1 << 20, tell_routing=True)
DRAWN = SamplingConfig(max_new_tokens=NEW, temperature=1.0, top_p=1.0, seed=3)


@functools.cache
def functions(**compute):
    return functional(lambda rngs: Decoder(CONFIG, ComputeConfig(dtype="float32", **compute), rngs=rngs))


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(float(leaf.ndim == 1), 0.3, leaf.shape).astype(np.float32)
    buffers = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), functions().abstract_buffers)
    return jax.tree.map(draw, functions().abstract_params), buffers


def requests():
    rng = np.random.default_rng(1)
    prompts = [tuple(map(int, rng.integers(0, 40, length))) for length in LENGTHS]
    sampling = [dataclasses.replace(DRAWN, seed=row) for row in range(ROWS)]
    return [Request(prompt=prompt, sampling=each, drawn=True) for prompt, each in zip(prompts, sampling, strict=True)]


def turn(request, answer, said):
    """What is asked next: all that was, and more."""
    return dataclasses.replace(request, prompt=(*request.prompt, *answer.tokens, *said))


@functools.cache
def rollouts():
    """(request, completion) of each row; the first two are of second turns, which the engine goes on from what it has kept."""
    engine = Engine(functions(), CONFIG, *weights(), TELLING)
    asked = requests()
    first = engine.run(asked)
    read = engine.prompt_tokens_read
    again = [turn(asked[row], first[row], said) for row, said in ((0, (7, 7)), (1, (8,)))]
    found = list(zip([*again, *asked[2:]], [*engine.run(again), *first[2:]], strict=True))
    assert engine.prompt_tokens_read - read == 3 + 2  # what was said, and the last token of each answer before
    return found


def numbered(answer, request):
    return [*request.prompt, *answer.tokens]


@functools.cache
def batch():
    rng = np.random.default_rng(2)
    made = {name: np.zeros((ROWS, SEQ), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    made |= {name: np.zeros((ROWS, SEQ), np.float32) for name in ("loss_mask", "sampler_log_probs")}
    made["advantages"] = rng.normal(size=(ROWS, 1)).astype(np.float32).repeat(SEQ, axis=1)
    made["temperature"] = np.ones(ROWS, np.float32)
    made["routing"] = np.full((ROWS, SEQ, LAYERS, TOP_K), -1, np.int16)
    made["environment"] = np.array([0, 1, 1, 0, 1, 0, 1, 1], np.int32)
    for row, (request, answer) in enumerate(rollouts()):
        ids = numbered(answer, request)
        length, drawn = len(ids) - 1, slice(len(request.prompt) - 1, len(ids) - 1)
        made["tokens"][row, :length], made["targets"][row, :length] = ids[:-1], ids[1:]
        made["segment_ids"][row, :length], made["positions"][row, :length] = 1, range(length)
        made["loss_mask"][row, drawn], made["sampler_log_probs"][row, drawn] = 1, answer.drawn_log_probs
        made["routing"][row, :length] = answer.routing
    return made


@functools.cache
def forward(**compute):
    """(params, tokens, segment_ids, positions, routing) -> hidden, routing."""

    @jax.jit
    def run(params, tokens, segment_ids, positions, routing=None):
        output = functions(**compute).bind(params, weights()[1])(tokens, segment_ids, positions, routing=routing)
        return output.hidden, output.routing

    return run


def inputs():
    return [batch()[name] for name in ("tokens", "segment_ids", "positions")]


def objective(replay=True):
    dapo = policy_gradient_member("dapo")
    return policy_objective(dapo, block=32, known=None, replay_routing=replay, environments=ENVIRONMENTS)


@functools.cache
def figures_of(replay):
    def mean(params, batch):
        sums = objective(replay)(functions().bind(params, weights()[1]), batch, jax.random.key(0))
        return sums.loss / sums.weight, sums.figures()

    return jax.jit(jax.grad(mean, has_aux=True) if replay else lambda *given: ({}, mean(*given)[1]))


def passed(replay, params=None, **changes):
    """The figures of a step, and with replay its gradient."""
    gradient, figures = figures_of(replay)(weights()[0] if params is None else params, batch() | changes)
    return {name: float(value) for name, value in figures.items()}, gradient


def moved(scale):
    """The parameters after the routers have moved a little."""
    rng = np.random.default_rng(4)

    def move(path, leaf):
        return leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) if path[-1].key == "router" else leaf

    return jax.tree_util.tree_map_with_path(move, weights()[0])


def test_an_engine_tells_the_experts_of_every_token_that_it_read():
    """As a whole forward pass chooses them: prompts in chunks, of several lengths, and gone on from."""
    _, expected = forward()(weights()[0], *inputs())
    seen = set()
    for row, (request, answer) in enumerate(rollouts()):
        length = len(request.prompt) + NEW - 1
        assert answer.routing.shape == (length, LAYERS, TOP_K) and answer.routing.dtype == np.int16
        np.testing.assert_array_equal(np.sort(answer.routing), np.sort(expected[row, :length]))
        seen |= {tuple(sorted(pair)) for pair in answer.routing.reshape(-1, TOP_K).tolist()}
    assert len(seen) > 9  # of 15 pairs


def test_a_cached_call_tells_the_experts_where_the_tokens_stand():
    """Padding on the left, which is moved behind the tokens on the way."""
    tokens, segment_ids = np.zeros((2, 2, 8), np.int32)
    for row, length in enumerate((8, 3)):
        tokens[row, -length:], segment_ids[row, -length:] = batch()["tokens"][row, :length], 1
    read = jax.jit(lambda cache: functions().bind(*weights())(tokens, segment_ids, cache=cache).routing)
    found = read(init_cache(CONFIG, 2, 8, np.float32))
    _, expected = forward()(weights()[0], *inputs())
    for row, length in enumerate((8, 3)):
        np.testing.assert_array_equal(np.sort(found[row, -length:]), np.sort(expected[row, :length]))


def test_an_answer_that_is_cut_has_no_experts_of_what_was_behind():
    """Two of a call's five tokens are behind the loop: they are not told, but the cache has them."""
    prompt, steps = np.arange(3 * 4).reshape(3, 2, 2), 100 + np.arange(5 * 4).reshape(5, 2, 2)
    request = Request(prompt=(1, 2, 3), sampling=DRAWN, loop=LoopConfig(period=2, repeats=2, tokens=4))
    answer = Answer(1, request, None, prompt)
    empty, zeros = np.zeros((5, 0)), np.zeros(5)
    updates = [
        answer.take(Chosen(np.array([4]), zeros[:1], empty[:1], empty[:1])),
        answer.take(Chosen(np.array([5, 4, 5, 8, 9, -1]), zeros, empty, empty, routing=steps)),
    ]
    cut = joined(updates)
    assert (cut.tokens, cut.finish_reason) == ([4, 5, 4, 5], "loop")
    np.testing.assert_array_equal(cut.routing, np.concatenate([prompt, steps[:3]]))
    np.testing.assert_array_equal(np.concatenate(answer.routing), np.concatenate([prompt, steps]))


def test_what_the_engine_keeps_of_an_answer_has_the_experts_of_all_of_it():
    request, answer = rollouts()[2]
    engine = Engine(functions(), CONFIG, *weights(), TELLING)
    engine.run(requests()[2:4])
    known = engine.prefixes.longest([*request.prompt, *answer.tokens])
    assert known.length == len(known.routing) == LENGTHS[2] + NEW - 1
    np.testing.assert_array_equal(known.routing, answer.routing)
    tight = Prefixes(CONFIG, engine.prefixes.bytes)
    tight.keep([1, 2], known.cache, known.routing)
    assert tight.bytes == known.routing.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(known.cache))


def test_an_engine_of_a_dense_model_has_nothing_to_tell():
    dense = dataclasses.replace(CONFIG, moe=None)
    with pytest.raises(ValueError, match="tell_routing is for mixtures of experts, and no block of this model is one"):
        Engine(functional(lambda rngs: Decoder(dense, rngs=rngs)), dense, {}, {}, TELLING)


@pytest.mark.parametrize(
    "config, shape, cached, message",
    [
        (dataclasses.replace(CONFIG, moe=None), (1, 4, 2, 2), False, "no block of this model is a mixture of experts"),
        (CONFIG, (1, 4, 3, 2), False, r"must be \[batch, seq, moe layers, top_k\], here \(1, 4, 2, 2\), got \(1, 4, 3, 2\)"),
        (CONFIG, (1, 4, 2, 2), True, "a routing is replayed in whole sequences"),
    ],
)
def test_a_routing_that_is_not_of_the_model_is_refused(config, shape, cached, message):
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    cache = init_cache(config, 1, 8, np.float32) if cached else None
    with pytest.raises(ValueError, match=message):
        model(np.zeros((1, 4), np.int32), cache=cache, routing=np.zeros(shape, np.int32))


@pytest.mark.parametrize("compute", [{}, {"scan_layers": True, "remat": "full"}])
def test_tokens_go_to_the_experts_that_are_replayed_whatever_the_router_says(compute):
    """As where the bias leaves the routers no choice, in each block another; elsewhere, by -1, as the routers say."""
    params, buffers = weights()
    pairs = np.array([[0, 5], [2, 1]], np.int16)
    routing = np.broadcast_to(pairs, (ROWS, SEQ, LAYERS, TOP_K))
    bias = iter(pairs)

    def forced(path, leaf):
        return np.where(np.isin(np.arange(6), next(bias)), 9.0, 0.0).astype(np.float32)

    biased = jax.tree_util.tree_map_with_path(forced, buffers)
    expected = jax.jit(lambda *given: functions().bind(params, biased)(*given).hidden)(*inputs())
    found, chosen = forward(**compute)(params, *inputs(), routing)
    real = batch()["segment_ids"] == 1
    np.testing.assert_allclose(found[real], expected[real], atol=2e-5)
    plain, plain_choice = forward()(params, *inputs())
    assert np.abs(found - plain)[real].max() > 0.1 and (np.sort(chosen) != np.sort(routing))[real].any()
    as_it_says, _ = forward(**compute)(params, *inputs(), np.full_like(routing, -1))
    np.testing.assert_allclose(as_it_says, plain, atol=2e-5)
    # A part of the tokens: what is before them in their rows is as it was.
    late = np.where(np.arange(SEQ)[None, :, None, None] < 5, np.int16(-1), routing)
    partly, partly_chosen = forward(**compute)(params, *inputs(), late)
    np.testing.assert_allclose(partly[:, :5], plain[:, :5], atol=2e-5)
    assert np.abs(partly - plain)[:, 5:][real[:, 5:]].max() > 0.1
    np.testing.assert_array_equal(np.sort(partly_chosen[:, :, 0]), np.sort(plain_choice[:, :, 0]))  # before any of it


def test_of_the_same_parameters_all_routing_is_equal_and_replaying_it_changes_nothing():
    (found, _), (replayed, _) = passed(False), passed(True)
    assert found["routing_equal"] == replayed["routing_equal"] == pytest.approx(1, abs=1e-6)
    for figures in (found, replayed):
        assert max(figures["ratio_max"] - 1, 1 - figures["ratio_min"]) < 1e-4
        assert figures["loss"] == pytest.approx(found["loss"], abs=1e-6)


def test_where_routers_have_moved_less_is_equal_and_replay_keeps_ratios_nearer_to_1():
    shares, gaps = [], []
    for scale in (0.02, 0.1, 0.5):
        params = moved(scale)
        (found, _), (replayed, gradient) = passed(False, params), passed(True, params)
        shares.append(found["routing_equal"])
        gaps.append((found["sampler_gap"], replayed["sampler_gap"]))
        assert replayed["routing_equal"] < 1  # the router's own choice is told, and not what is replayed
        routers = [leaf for path, leaf in jax.tree.leaves_with_path(gradient) if path[-1].key == "router"]
        assert len(routers) == LAYERS and all(np.abs(leaf).max() > 1e-4 for leaf in routers)
    assert 1 > shares[0] > shares[1] > shares[2] > 0.2
    assert all(replayed < 0.7 * found for found, replayed in gaps)


def test_the_share_is_that_of_a_count_by_hand():
    """Over the places where tokens were drawn, and the layers; the order of experts does not matter, where padding is neither."""
    params = moved(0.2)
    _, chosen = forward()(params, *inputs())
    places = [
        (row, position)
        for row, (request, answer) in enumerate(rollouts())
        for position in range(len(request.prompt) - 1, len(request.prompt) + len(answer.tokens) - 1)
    ]
    same = [
        set(np.asarray(chosen)[place][layer].tolist()) == set(batch()["routing"][place][layer].tolist())
        for place in places
        for layer in range(LAYERS)
    ]
    turned = np.where(np.arange(SEQ)[None, :, None, None] % 2, batch()["routing"], batch()["routing"][..., ::-1])
    found, _ = passed(False, params, routing=turned)
    assert found["routing_equal"] == pytest.approx(np.mean(same), rel=1e-5) and 0.3 < np.mean(same) < 0.99


def test_figures_of_an_environment_are_those_of_its_rows_alone():
    params = moved(0.2)
    found, _ = passed(True, params)
    for index, name in enumerate(ENVIRONMENTS[:2]):
        own = batch()["loss_mask"] * (batch()["environment"] == index)[:, None]
        alone, _ = passed(True, params, loss_mask=own.astype(np.float32))
        for figure in ("entropy", "sampler_gap", "ratio", "clipped_low", "clipped_high", "sampler_kl", "routing_equal"):
            assert found[f"{figure}_of_{name}"] == pytest.approx(alone[figure], rel=1e-5, abs=1e-7), figure
    assert found["entropy_of_a"] != pytest.approx(found["entropy_of_b"], rel=1e-3)
    assert math.isnan(found["entropy_of_nobody"])  # no answer is of it: the record leaves out what is no number


def test_log_probs_of_a_policy_replay_what_the_batch_has():
    params, mesh = moved(0.2), mesh_of(MeshConfig(data=1, fsdp=1))
    found = make_policy_log_probs_step(functions(), mesh, block=32, known=None)(params, weights()[1], place_batch(batch(), mesh))
    gap = np.abs(np.asarray(found) - batch()["sampler_log_probs"])[batch()["loss_mask"] == 1].mean()
    assert gap == pytest.approx(passed(True, params)[0]["sampler_gap"], rel=1e-4)


def mesh_of(config):
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))])


def test_routing_is_dealt_with_the_tokens_over_replicas_experts_and_parts_of_sequences():
    mesh = mesh_of(MeshConfig(data=2, fsdp=1, expert=2, context=2))
    sums = make_eval_step(functions(), objective(), mesh)(moved(0.2), weights()[1], place_batch(batch(), mesh))
    figures = {name: float(value) for name, value in sums.figures().items()}
    expected, _ = passed(True, moved(0.2))
    assert figures == pytest.approx(expected, rel=2e-5, abs=1e-6, nan_ok=True) and figures["routing_equal"] < 1
