"""Merged trees against closed forms and against numpy in float64, whole and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lfm_jax.training import merging
from lfm_jax.training.merging import MergeConfig, linear, merge, slerp, task_arithmetic, ties

SHAPES = {"embed": (24, 8), "layers": {"0": (3, 8, 16), "1": (16,)}, "scale": (1,)}


def _tree(seed):
    draws = np.random.default_rng(seed)
    draw = lambda shape: draws.normal(size=shape).astype(np.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


BASE, TREES = _tree(0), [_tree(1), _tree(2), _tree(3)]


def _arrays(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _check(tree, expected, atol=1e-5):
    """Also that types and shapes are those of the first model."""
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), BASE)
    for found, wanted in zip(_arrays(tree), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


def _ties(base, trees, weights, density, scale):
    """Yadav et al., algorithm 1, over all parameters as one vector, with a sort and loops over entries."""
    vectors = [np.concatenate([(one - start).ravel() for one, start in zip(tree, base, strict=True)]) for tree in trees]
    kept = []
    for vector in vectors:
        smallest = np.sort(np.abs(vector))[-round(density * vector.size)]
        kept.append([value if abs(value) >= smallest else 0.0 for value in vector])
    merged = []
    for values in zip(*kept, strict=True):
        elected = np.sign(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        votes = [(weight, value) for weight, value in zip(weights, values, strict=True) if elected and np.sign(value) == elected]
        total = sum(weight for weight, _ in votes)
        merged.append(sum(weight * value for weight, value in votes) / total if total else 0.0)
    bounds = np.cumsum([0, *(leaf.size for leaf in base)])
    parts = [np.reshape(merged[start:end], leaf.shape) for start, end, leaf in zip(bounds, bounds[1:], base, strict=False)]
    return [leaf + scale * part for leaf, part in zip(base, parts, strict=True)]


def test_the_mean_by_weights():
    _check(linear(TREES, (1, 1, 1)), [np.mean(leaves, axis=0) for leaves in zip(*map(_arrays, TREES), strict=True)])
    expected = [0.25 * one + 0.75 * two for one, two in zip(*map(_arrays, TREES[:2]), strict=True)]
    _check(linear(TREES[:2], (1, 3)), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_slerp_turns_each_tensor_evenly(share):
    """By the definition: the way from one to two lies in their plane, and at `share` of it the angle to one is `share` of all."""
    unit = lambda array: array / np.linalg.norm(array)
    first, second = (jax.tree.map(lambda leaf: leaf / np.linalg.norm(leaf), tree) for tree in (TREES[0], TREES[1]))
    turn = jax.jit(slerp)
    merged = turn(first, second, share)
    for one, two, found in zip(*map(_arrays, (first, second, merged)), strict=True):
        angle = np.arccos(np.clip(np.sum(one * two), -1, 1))
        if one.size > 1:
            across = unit(two - np.sum(one * two) * one)
            np.testing.assert_allclose(found, np.cos(share * angle) * one + np.sin(share * angle) * across, rtol=0, atol=1e-6)
    # Of other lengths: the same two factors.
    longer = jax.tree.map(lambda leaf: 3 * leaf, first)
    wanted = [
        (np.sin((1 - share) * a) * 3 * one + np.sin(share * a) * two) / np.sin(a)
        for one, two in zip(*map(_arrays, (first, second)), strict=True)
        for a in [np.arccos(np.clip(np.sum(one * two), -1, 1))] if one.size > 1
    ]  # fmt: skip
    for found, expected in zip([leaf for leaf in _arrays(turn(longer, second, share)) if leaf.size > 1], wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_slerp_is_linear_where_there_is_no_way_around():
    one = {"zero": jnp.zeros(4), "parallel": jnp.arange(4.0), "opposite": jnp.arange(4.0), "nearly": jnp.ones(4)}
    two = {"zero": jnp.ones(4), "parallel": 3 * jnp.arange(4.0), "opposite": -jnp.arange(4.0), "nearly": jnp.ones(4) + 1e-7}
    for first, second in ((one, two), (two, one)):
        merged = jax.jit(slerp)(first, second, 0.25)
        for name in one:
            np.testing.assert_allclose(merged[name], 0.75 * first[name] + 0.25 * second[name], rtol=0, atol=1e-6)


def test_differences_add_up():
    """(1, ..., 1) of n models gives their sum less n - 1 bases; a negative factor goes the other way."""
    base, *trees = map(_arrays, (BASE, *TREES))
    all_three = [sum(leaves) - 2 * start for start, *leaves in zip(base, *trees, strict=True)]
    _check(task_arithmetic(BASE, TREES, (1, 1, 1)), all_three)
    against = [1.5 * start - 0.5 * one for start, one in zip(base, trees[0], strict=True)]
    _check(task_arithmetic(BASE, TREES[:1], (-0.5,)), against)


@pytest.mark.parametrize(("weights", "density", "scale"), [((1, 1, 1), 0.2, 1.0), ((1, 2, 0), 0.5, 0.7), ((3, 1, 1), 1.0, 1.0)])
def test_ties_are_those_of_the_paper(weights, density, scale):
    base, *trees = map(_arrays, (BASE, *TREES))
    merged = jax.jit(lambda base, trees: ties(base, trees, weights, density, scale))(BASE, TREES)
    _check(merged, _ties(base, trees, weights, density, scale))


def test_ties_by_hand():
    """Kept of each (the half): a (-4, 3), b (5, -6); they agree nowhere but where one alone speaks, or one outweighs."""
    base = {"x": jnp.array([1.0, 1.0, 1.0, 1.0])}
    a, b = {"x": 1 + jnp.array([-4.0, 1.0, 3.0, 0.5])}, {"x": 1 + jnp.array([5.0, 0.1, -0.2, -6.0])}
    join = jax.jit(lambda trees, density: ties(base, trees, (1, 1), density, 1.0), static_argnums=1)
    np.testing.assert_allclose(join([a, b], 0.5)["x"], [1 + 5, 1, 1 + 3, 1 - 6], rtol=1e-6)
    even = [{"x": base["x"] + sign * jnp.array([2.0, 0.0, 0.0, 0.0])} for sign in (1, -1)]
    np.testing.assert_allclose(join(even, 1.0)["x"], base["x"], rtol=1e-6)  # no sign outweighs


def test_what_is_kept_is_counted_over_the_whole_tree():
    differences = _tree(4)
    magnitudes = np.sort(np.abs(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(differences)])))
    for density in (1e-9, 0.2, 1.0):
        keep = max(1, round(density * magnitudes.size))
        assert merging._smallest_kept(differences, density) == magnitudes[-keep]
    assert merging._smallest_kept({"x": jnp.zeros(8)}, 0.5) == 0
    # More entries than an int32 counts.
    billions = jnp.array([2_000_000_000] * 12 + [7], jnp.int32)
    for wanted, enough in ((24_000_000_007, True), (24_000_000_008, False), (65_536, True), (24_000_065_536, False)):
        assert bool(merging._reach(billions, wanted)) == enough


METHODS = {
    "linear": MergeConfig(weights=(1, 3)), "slerp": MergeConfig(method="slerp", weights=(1, 3)),
    "ties": MergeConfig(method="ties", density=0.3, scale=0.5),
    "task_arithmetic": MergeConfig(method="task_arithmetic", weights=(0.5, -0.25), scale=2.0),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_the_same_on_sharded_trees_which_stay_so(method):
    """And is that of the method's own function; buffers are averaged by shares, or evenly."""
    config, buffers = METHODS[method], [{"bias": jnp.arange(8.0)}, {"bias": jnp.full(8, 4.0)}]
    base = BASE if method in ("ties", "task_arithmetic") else None
    expected = {
        "linear": lambda: linear(TREES[:2], (0.25, 0.75)), "slerp": lambda: jax.jit(slerp)(*TREES[:2], 0.75),
        "ties": lambda: jax.jit(lambda trees: ties(BASE, trees, (1, 1), 0.3, 0.5))(TREES[:2]),
        "task_arithmetic": lambda: task_arithmetic(BASE, TREES[:2], (1.0, -0.5)),
    }[method]()  # fmt: skip
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"embed": ("fsdp", "tensor"), "layers": {"0": (None, "tensor", "fsdp"), "1": ("fsdp",)}, "scale": ()}
    of_spec = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
    shardings = jax.tree.map(of_spec, specs, is_leaf=lambda spec: isinstance(spec, tuple))
    place = lambda tree: jax.device_put(tree, shardings)
    params, averaged = jax.jit(lambda *trees: merge(config, *trees), out_shardings=(shardings, None))(
        [place(tree) for tree in TREES[:2]], buffers, base and place(base)
    )
    _check(params, _arrays(expected), atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    shares = (0.25, 0.75) if method in ("linear", "slerp") else (0.5, 0.5)
    np.testing.assert_allclose(averaged["bias"], shares[0] * np.arange(8) + shares[1] * 4, rtol=1e-6)


def test_arithmetic_is_in_float32_and_the_type_stays():
    """In bfloat16 256 + 1 is 256, however often."""
    base = {"x": jnp.zeros(1, jnp.bfloat16)}
    models = [{"x": jnp.full(1, value, jnp.bfloat16)} for value in (256, *[1] * 8)]
    merged = task_arithmetic(base, models, (1.0,) * 9)["x"]
    assert merged.dtype == jnp.bfloat16 and merged[0] == 264
    assert linear([base, models[0]], (1, 1))["x"].dtype == slerp(base, models[0], 0.5)["x"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "count", "base", "message"),
    [
        ({"method": "slerp"}, 3, None, "slerp merges two models, got 3"),
        ({}, 0, None, "linear merges models, got 0"),
        ({"weights": (1, 2, 3)}, 2, None, "there are 2 models and 3 weights; give one for each, or none"),
        ({"method": "ties"}, 2, None, "ties needs a base, which the models were trained from"),
        ({"method": "task_arithmetic"}, 2, None, "task_arithmetic needs a base"),
        ({}, 2, BASE, "linear takes no base; leave it out"),
    ],
)
def test_what_does_not_fit_the_method_is_refused(settings, count, base, message):
    with pytest.raises(ValueError, match=message):
        merge(MergeConfig(**settings), TREES[:count], [{}] * count, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1, -1)}, "weights of linear are shares: none negative and not all 0"),
        ({"method": "ties", "weights": (0, 0)}, "weights of ties are shares"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**settings)
