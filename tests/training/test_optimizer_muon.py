"""Muon: its matrices against singular values and PyTorch, its groups, its state, and the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from lfm_jax.models import PRESETS, ComputeConfig, Decoder, ModelConfig, MoEConfig, functional, preset
from lfm_jax.sharding import MeshConfig, activation_sharding, aot, make_mesh
from lfm_jax.training import (
    Checkpoints,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
    next_token_objective,
)
from lfm_jax.training.muon import COEFFICIENTS, STEPS, is_matrix, newton_schulz, orthogonalize

FLAT = ScheduleConfig(decay_share=0.0)
CONFIG = OptimizerConfig(learning_rate=0.02, schedule=FLAT, matrices="muon", matrix_rate=0.5, clip_norm=None, eps=1e-2)
# Every kind of matrix: a convolution and a dense feed-forward, attention with gates and experts; and sides longer either way.
TINY = ModelConfig(
    vocab_size=64, embed_dim=16, layer_types=("conv", "full_attention"), num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    moe=MoEConfig(num_experts=4, experts_per_token=2, mlp_dim=8, num_dense_layers=1), attention_gate=True, conv_bias=True,
)  # fmt: skip
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
    "expert": MeshConfig(fsdp=2, expert=2, tensor=2),
    "replicas": MeshConfig(data=4, fsdp=1, context=2),
}


def _polynomial(values):
    """What `STEPS` iterations make of singular values."""
    values = values / np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    return values


def _orthogonal(matrix):
    """The same by a singular value decomposition in float64."""
    u, values, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u * _polynomial(values) @ v


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    ours = newton_schulz(jnp.asarray(matrices))
    np.testing.assert_allclose(ours, [_orthogonal(matrix) for matrix in matrices], atol=2e-5)
    values = np.linalg.svd(ours, compute_uv=False)
    assert 0.3 < values.min() and values.max() < 1.21 and np.median(values) > 0.68


def test_a_matrix_of_zeros_stays_one():
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((1, 4, 6))), np.zeros((1, 4, 6)))


@functools.cache
def _functions(config=TINY):
    return functional(lambda rngs: Decoder(config, ComputeConfig(), rngs=rngs))


def _random(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), _functions().abstract_params)


def _named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _by_hand(name, direction):
    """Each projection's and each expert's matrix by itself."""
    operator, last = name.split(".")[2:4] if name.count(".") > 2 else ("", "")
    shape = direction.shape
    scaled = lambda matrix: 0.2 * max(matrix.shape) ** 0.5 * _orthogonal(matrix)
    if last == "in_proj":
        return np.stack([scaled(direction[:, part]) for part in range(3)], axis=1)
    if operator == "moe":
        return np.stack([scaled(expert) for expert in direction])
    if last in ("q_proj", "k_proj", "v_proj"):
        return scaled(direction.reshape(shape[0], -1)).reshape(shape)
    return scaled(direction.reshape(-1, shape[-1])).reshape(shape)


def test_every_projection_and_every_expert_is_orthogonalised_as_the_matrix_it_is():
    """Three updates with Nesterov's momentum, decay and a rate of their own; brute force in float64."""
    params, gradients = _random(0), [_random(seed, scale) for seed, scale in ((1, 1.0), (2, 5.0), (3, 0.2))]
    optimizer = make_optimizer(CONFIG, 10)
    plain = make_optimizer(dataclasses.replace(CONFIG, matrices="adamw", matrix_rate=1.0), 10)
    ours, adamw = [params], [params]
    for optimized, states in ((optimizer, ours), (plain, adamw)):
        state = optimized.init(params)
        for gradient in gradients:
            updates, state = jax.jit(optimized.update)(gradient, state, states[-1])
            states.append(optax.apply_updates(states[-1], updates))
    matrices = 0
    for name, start in _named(params).items():
        if not any(part in name for part in ("proj", "mlp.", "moe.gate", "moe.up", "moe.down")):
            np.testing.assert_array_equal(_named(ours[-1])[name], _named(adamw[-1])[name])
            continue
        matrices += 1
        expected, momentum = np.asarray(start, np.float64), 0.0
        for gradient, found in zip(gradients, ours[1:], strict=True):
            slope = np.asarray(_named(gradient)[name], np.float64)
            momentum = CONFIG.muon_momentum * momentum + slope
            step = _by_hand(name, slope + CONFIG.muon_momentum * momentum) + CONFIG.weight_decay * expected
            expected = expected - CONFIG.learning_rate * CONFIG.matrix_rate * step
            np.testing.assert_allclose(_named(found)[name], expected, atol=2e-5)
    assert matrices == 2 + 3 + 5 + 3


def test_updates_equal_torch_muon():
    """PyTorch iterates in bfloat16, which leaves 1 % of an update's length."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, matrix_rate=1.0, weight_decay=0.3)
    optimizer, rng = make_optimizer(config, 10), np.random.default_rng(0)
    start = {"layers": {0: {"mlp": {"gate": (24, 40), "down": (40, 24)}}}}
    start = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), start, is_leaf=lambda x: isinstance(x, tuple))
    tensors = [torch.nn.Parameter(torch.tensor(leaf)) for leaf in jax.tree.leaves(start)]
    theirs = torch.optim.Muon(
        tensors, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=config.muon_momentum,
        ns_coefficients=COEFFICIENTS, ns_steps=STEPS, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    params, state = start, optimizer.init(start)
    for _ in range(4):
        gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), start)
        for tensor, leaf in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(leaf)
        before = [tensor.detach().numpy().copy() for tensor in tensors]
        theirs.step()
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for update, tensor, old in zip(jax.tree.leaves(updates), tensors, before, strict=True):
            expected = tensor.detach().numpy() - old
            assert np.linalg.norm(update - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_of_blocks_have_muon_and_everything_else_adamw(name):
    functions = _functions(PRESETS[name])
    optimizer = make_optimizer(CONFIG, 10)
    state = jax.eval_shape(optimizer.init, functions.abstract_params)
    jax.eval_shape(optimizer.update, functions.abstract_params, state, functions.abstract_params)  # every layout is known
    (moments,) = optax.tree.get_all_with_path(state, "trace")
    ours = {path for path in _named(moments[1])}
    blocks = {path: leaf for path, leaf in _named(functions.abstract_params).items() if path.startswith("layers")}
    spared = ("scale", "bias", "router", "operator.kernel")
    assert ours == {path for path in blocks if not path.endswith(spared)} and ours
    (squares,) = optax.tree.get_all_with_path(state, "nu")
    assert set(_named(squares[1])) == set(_named(functions.abstract_params)) - ours
    assert all(leaf.ndim >= 2 for path, leaf in blocks.items() if path in ours)


def test_a_matrix_of_unknown_layout_is_refused():
    tree = {"layers": {0: {"operator": {"state_proj": jnp.zeros((2, 3, 4))}}}}
    with pytest.raises(ValueError, match=r"layers.0.operator.state_proj of shape \(2, 3, 4\): nothing says which matrices it"):
        orthogonalize().update(tree, optax.EmptyState())


@pytest.mark.parametrize(
    "matrices, moment_dtype, adamw_bytes, matrix_bytes",
    [("adamw", "float32", 12, 12), ("adamw", "bfloat16", 8, 8), ("muon", "float32", 12, 8), ("muon", "bfloat16", 8, 6)],
)
def test_bytes_a_parameter_are_as_documented(matrices, moment_dtype, adamw_bytes, matrix_bytes):
    config = OptimizerConfig(matrices=matrices, moment_dtype=moment_dtype)
    state = abstract_state(_functions(), make_optimizer(config, 10), make_mesh(MeshConfig()))
    sizes = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        sizes[is_matrix(path)] += leaf.size
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state)))
    scalars = 4 * sum(leaf.shape == () for leaf in jax.tree.leaves(state.opt_state))
    assert total - scalars == matrix_bytes * sizes[True] + adamw_bytes * sizes[False]


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_bfloat16_moments_lead_nearly_the_same_way(matrices):
    config = OptimizerConfig(learning_rate=0.02, schedule=FLAT, matrices=matrices)
    ends = []
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(config, moment_dtype=dtype), 100)
        params = _random(0)
        state = optimizer.init(params)
        for seed in range(20):
            updates, state = jax.jit(optimizer.update)(_random(seed + 1), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    kept = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape != ()]
    assert set(kept) == {jnp.dtype(jnp.bfloat16)}
    moved = [np.concatenate([np.ravel(a - b) for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(_random(0)), strict=True)])
             for end in ends]  # fmt: skip
    difference = np.linalg.norm(moved[0] - moved[1]) / np.linalg.norm(moved[0])
    assert 0 < difference < 0.01


@pytest.mark.parametrize("decay, stays_off", [(0.9, 0.04), (0.95, 0.08), (0.98, 0.2)])
def test_averages_in_bfloat16_stand_still_no_farther_off_than_documented(decay, stays_off):
    """Squares of gradients that were 9 and are 1 from now on."""
    optimizer = make_optimizer(OptimizerConfig(b1=0.0, b2=decay, moment_dtype="bfloat16", clip_norm=None), 1000)
    state = optimizer.init({"weight": jnp.ones(1)})
    for gradient in (3.0,) * 200 + (1.0,) * 500:
        _, state = optimizer.update({"weight": jnp.full(1, gradient)}, state, {"weight": jnp.ones(1)})
    off = float(optax.tree.get(state, "nu")["weight"][0]) - 1
    assert 0 < off <= stays_off * 1.01


def test_cautious_decay_is_left_out_where_the_update_leads_away_from_zero():
    """With b1 = b2 = 0 an update is the gradient's sign."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule=FLAT, b1=0, b2=0, weight_decay=0.5, cautious_decay=True, clip_norm=None
    )
    params, gradient = jnp.asarray([2.0, 2.0, -2.0, -2.0]), jnp.asarray([1.0, -1.0, 1.0, -1.0])
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update({"kernel": gradient}, optimizer.init({"kernel": params}), {"kernel": params})
    np.testing.assert_allclose(updates["kernel"], -0.1 * np.array([1 + 1, -1, 1, -1 - 1]), rtol=1e-6)
    updates, _ = optimizer.update({"scale": gradient}, optimizer.init({"scale": params}), {"scale": params})
    np.testing.assert_allclose(updates["scale"], -0.1 * gradient, rtol=1e-6)


@functools.cache
def _updated(mesh_name, moment_dtype="float32"):
    """(state after three updates by random gradients, what was announced of it, the compiled update)"""
    mesh = make_mesh(MESHES[mesh_name]) if mesh_name in MESHES else make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(dataclasses.replace(CONFIG, moment_dtype=moment_dtype), 10)
    announced = abstract_state(_functions(), optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, announced)

    def update(state, gradient):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)

    state = init_state(_functions(), optimizer, mesh, 0)
    step = jax.jit(update, in_shardings=(shardings, shardings.params), out_shardings=shardings)
    step = step.lower(state, jax.device_put(_random(1), shardings.params)).compile()
    for seed in (1, 2, 3):
        state = step(state, jax.device_put(_random(seed), shardings.params))
    return state, announced, step


@pytest.mark.parametrize("mesh_name", MESHES)
def test_updates_are_the_same_on_eight_devices(mesh_name, capfd):
    one, eight = _updated("one device")[0], _updated(mesh_name)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, eight)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err  # XLA would gather whole stacks


def test_momentum_is_split_like_its_matrix():
    state = _updated("mixed")[1]
    (trace,) = optax.tree.get_all_with_path(state.opt_state, "trace")
    params = _named(state.params)
    assert len(_named(trace[1])) == 13
    assert all(leaf.sharding == params[path].sharding for path, leaf in _named(trace[1]).items())
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_checkpoints_bring_its_state_back_on_another_mesh(moment_dtype, tmp_path):
    state, _, _ = _updated("mixed", moment_dtype)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data_state={}, config={})
    wanted = abstract_state(
        _functions(), make_optimizer(dataclasses.replace(CONFIG, moment_dtype=moment_dtype), 10), make_mesh(MESHES["fsdp"])
    )
    restored = Checkpoints(tmp_path).restore(wanted).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, wanted)


def test_training_step_with_muon_compiles_on_16_chips():
    """Matrices are dealt to the chips by all-to-all: each travels once there and once back."""
    pytest.importorskip("libtpu")
    model = dataclasses.replace(
        preset("nano"), layer_types=preset("nano").layer_types[:3], embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=64,
        mlp_dim=256, vocab_size=512,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2), aot.tpu_devices("v5e:4x4"))
    compute = ComputeConfig(dtype="bfloat16", short_conv="pallas", remat="dots")
    functions = functional(lambda rngs: Decoder(model, compute, rngs=rngs))
    optimizer = make_optimizer(OptimizerConfig(matrices="muon", moment_dtype="bfloat16", cautious_decay=True), 100)
    step = make_train_step(functions, optimizer, next_token_objective(LossConfig(block=256)), mesh, seed=0)
    rows = activation_sharding(mesh, ("batch", "seq"))
    array = lambda dtype: jax.ShapeDtypeStruct((16, 512), dtype, sharding=rows)
    batch = {name: array(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    batch["loss_mask"] = array(jnp.float32)
    compiled = step.trace(abstract_state(functions, optimizer, mesh), batch).lower(lowering_platforms=("tpu",)).compile()
    assert " all-to-all(" in compiled.as_text()
    memory, outputs = compiled.memory_analysis(), compiled.output_shardings
    # All of the state stays where it was; new are the metrics, each in a tile, and a table of all results.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 512 * len(outputs[1]) + 1024
