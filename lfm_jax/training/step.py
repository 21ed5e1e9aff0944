"""The training step: one jitted function from state and batch to state and metrics."""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from lfm_jax.models import FunctionalModel
from lfm_jax.models.accounting import parameter_group
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import activation_sharding, constrain, dealt_order, shard_count
from lfm_jax.training.objective import Batch, Objective, Sums
from lfm_jax.training.state import Purpose, TrainState, parameter_shardings, random_key, replicated, state_shardings

Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]  # of state and batch, and with `skip` of bounds


def make_train_step(
    functions: FunctionalModel,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int,
    accumulation: int = 1,
    expert_bias_rate: float = 1e-3,
    skip: bool = False,
    compiler_options: dict[str, str] | None = None,
) -> TrainStep:
    """The jitted step (state, batch) -> (state, metrics). It takes the state over: the arrays passed in are gone afterwards.

    The gradient is that of the sum of losses over the sum of weights of the whole batch, however the rows are dealt to
    micro-batches, devices and hosts. The metrics are float32 scalars on the device: those of `Sums.figures`, which has `loss` and
    the objective's own; `gradient_norm` before clipping, and `gradient_norm_GROUP` and `update_norm_GROUP` of each group of
    parameters; `learning_rate`, where the optimizer's state has one; and for a mixture of experts those of `router_metrics`. A
    batch without any weight leaves the parameters as they are, with a loss of 0.

    Args:
      seed: of the random numbers that an objective draws; they depend on it, on the step, and on how the rows are dealt to
        micro-batches and replicas.
      accumulation: micro-batches that the batch is taken in, one after the other, to save memory. The replicas of `data` sum
        their gradients once a step; over `fsdp`, `expert` and `context`, where a device holds but its part of a gradient, each
        micro-batch's is summed.
      expert_bias_rate: the expert bias of a mixture of experts moves by so much a step, towards an even load.
      skip: the step has a third argument, [2] float32: the largest loss and the largest gradient norm. A step in which either is
        larger, or no finite number, leaves all of the state as it was but its number, and its metric `skipped` is 1.
      compiler_options: for this program alone, beside the flags of the process.

    Raises:
      ValueError: accumulation is less than 1; or, when first called, the rows do not divide over micro-batches and devices.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1 micro-batch, got {accumulation}")
    shardings = state_shardings(functions, optimizer, mesh)
    summed_gradient = _summed_gradient(functions, objective, mesh, shardings.params, seed, accumulation)

    def step(state: TrainState, batch: Batch, *bounds: jax.Array) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            gradient, sums = summed_gradient(state.params, state.buffers, state.step, batch)
            return _updated(optimizer, state, gradient, sums, expert_bias_rate, *bounds)

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, None, *(None,) * skip),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options,
    )


def make_replay(
    functions: FunctionalModel, objective: Objective, mesh: Mesh, shardings: Tree, *, seed: int, accumulation: int = 1
) -> Callable[[Tree, Tree, jax.Array, Batch], tuple[Tree, jax.Array]]:
    """The jitted first half of a step, (params, buffers, step, batch) -> (gradient, loss), sums over the batch. Nothing changes.

    Run twice with the same arguments it gives the same bits (on GPUs: see `repeats_exactly`), or a device does not compute what
    it should.

    Args:
      shardings: of the parameters in the state.
    """
    summed_gradient = _summed_gradient(functions, objective, mesh, shardings, seed, accumulation)

    def replay(params: Tree, buffers: Tree, step: jax.Array, batch: Batch) -> tuple[Tree, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            gradient, sums = summed_gradient(params, buffers, step, batch)
            return gradient, sums.loss

    return jax.jit(replay, out_shardings=(shardings, replicated(mesh)))


def _summed_gradient(
    functions: FunctionalModel, objective: Objective, mesh: Mesh, shardings: Tree, seed: int, accumulation: int
) -> Callable[[Tree, Tree, jax.Array, Batch], tuple[Tree, Sums]]:
    """(params, buffers, step, batch) -> gradient of the summed loss, and the sums, over the whole batch and mesh."""
    whole = parameter_shardings(functions, mesh)

    def summed_loss(params: Tree, buffers: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        sums = objective(functions.bind(params, buffers), batch, key)
        return sums.loss, sums

    def micro_gradient(params: Tree, buffers: Tree, batch: Batch, key: jax.Array) -> tuple[Tree, Sums]:
        gradient, sums = jax.grad(summed_loss, has_aux=True)(params, buffers, batch, key)
        gradient = jax.lax.with_sharding_constraint(gradient, jax.tree.map(lambda each: each.spec, whole))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient), sums

    def summed_gradient(params: Tree, buffers: Tree, step: jax.Array, batch: Batch) -> tuple[Tree, Sums]:
        key = jax.random.fold_in(random_key(seed, Purpose.STEP), step)
        check_rows(batch["tokens"].shape[0], accumulation, mesh)
        accumulated = functools.partial(_accumulated, micro_gradient, accumulation)
        if mesh.shape["data"] > 1:
            accumulated = _on_replicas(accumulated, whole, shardings)
        return accumulated(functions.cast(params), buffers, batch, key)

    return summed_gradient


def make_eval_step(functions: FunctionalModel, objective: Objective, mesh: Mesh) -> Callable[[Tree, Tree, Batch], Sums]:
    """The jitted evaluation (params, buffers, batch) -> sums. It changes nothing, and its random key is always the same."""
    whole = parameter_shardings(functions, mesh)

    def step(params: Tree, buffers: Tree, batch: Batch) -> Sums:
        params = jax.lax.with_sharding_constraint(functions.cast(params), whole)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return objective(functions.bind(params, buffers), batch, random_key(0, Purpose.EVALUATION))

    return jax.jit(step, out_shardings=replicated(mesh))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This host's rows as part of the global batch, whose rows and sequences are split over the devices.

    The arrays are [rows, ...] or [rows, seq, ...]; the sequences are dealt as `lfm_jax.sharding.context` says. A host's rows need
    not lie beside each other in the global batch: what is computed of them is brought back into their order by `as_fed`.

    Raises:
      ValueError: the rows do not divide over the devices, the sequences not over those of `context`, or see `host_part`.
    """
    shards, parts = shard_count("seq", mesh), host_part(mesh)[1]

    def place(rows: np.ndarray) -> jax.Array:
        along = rows.ndim > 1
        if along and shards > 1:
            rows = rows[:, dealt_order(rows.shape[1], shards)]
        sharding = activation_sharding(mesh, ("batch", "seq") if along else ("batch",))
        return jax.make_array_from_process_local_data(sharding, rows, (rows.shape[0] * parts, *rows.shape[1:]))

    return {name: place(rows) for name, rows in batch.items()}


def host_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of a batch's rows this host feeds, of how many. Hosts that share sequences feed the same part.

    Raises:
      ValueError: the parts of two hosts overlap without being the same.
    """
    index, parts = _parts(mesh)
    return index, len(parts)


def as_fed(rows: np.ndarray, mesh: Mesh) -> np.ndarray:
    """What was computed of a global batch, [rows, ...], in the order in which its rows were fed: part after part of `host_part`.

    In the batch itself a part's rows lie where its devices are in the mesh: on TPU slices those of a host may be, of 16, the
    shards 0, 1, 6 and 15.
    """
    shards = [shard for part in _parts(mesh)[1] for shard in part]
    return rows.reshape(len(shards), rows.shape[0] // len(shards), *rows.shape[1:])[shards].reshape(rows.shape)


@functools.lru_cache
def _parts(mesh: Mesh) -> tuple[int, list[tuple[int, ...]]]:
    """(index of this host's, all): the parts of a batch's rows, each the row shards that a host's devices hold, ascending."""
    shards = shard_count("batch", mesh)
    held: dict[int, set[int]] = collections.defaultdict(set)
    for device, (rows,) in activation_sharding(mesh, ("batch",)).devices_indices_map((shards,)).items():
        held[device.process_index].add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != shards:
        raise ValueError(
            f"some of {len(held)} hosts share a part of their rows, of data x fsdp x expert = {shards} parts; let context x "
            "tensor be a multiple or a divisor of a host's devices"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), parts


def check_rows(rows: int, accumulation: int, mesh: Mesh) -> None:
    """Raises ValueError if a batch of so many rows, over all hosts, does not divide over micro-batches and devices."""
    devices = shard_count("batch", mesh)
    if rows % (accumulation * devices):
        fewer = max((some for some in range(1, accumulation) if rows % (some * devices) == 0), default=None)
        raise ValueError(
            f"a batch of {rows} rows does not divide into {accumulation} micro-batches over {devices} devices (data x fsdp x "
            f"expert); make it a multiple of {accumulation * devices}" + (f", or take accumulation={fewer}" if fewer else "")
        )


def _on_replicas(accumulated: Callable, whole: Tree, shardings: Tree) -> Callable:
    """Has each replica (mesh axis `data`) get the parameters, add up its own micro-batches, and keep its part of the sum.

    So the replicas meet twice a step, whatever the accumulation. Left to itself, XLA would make each micro-batch's gradient that
    of all replicas. What replicas share parameters over is left to it, and so are the two meetings, outside of what each does
    alone: inside, XLA would first bring together all parts of an array in each replica. The gradient is summed in float32.

    Args:
      whole: shardings of the parameters in each replica; shardings: those of the state, split over the replicas as well.
    """

    def alone(params: Tree, buffers: Tree, batch: Batch, key: jax.Array) -> tuple[Tree, Sums]:
        gradient, sums = accumulated(params, buffers, batch, jax.random.fold_in(key, jax.lax.axis_index("data")))
        over_data = [functools.partial(reduce, axis_name="data") for reduce in (jax.lax.psum, jax.lax.pmin, jax.lax.pmax)]
        return jax.tree.map(lambda leaf: leaf[None], gradient), sums.joined(*over_data)

    same, stacked = PartitionSpec(), PartitionSpec("data")
    replicas = jax.shard_map(
        alone, in_specs=(same, same, stacked, same), out_specs=(stacked, same), axis_names={"data"}, check_vma=False
    )  # fmt: skip

    def together(params: Tree, buffers: Tree, batch: Batch, key: jax.Array) -> tuple[Tree, Sums]:
        # Pinned before as well: else they would travel as they are before they are cast.
        params = jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(params, shardings), whole)
        gradients, sums = replicas(params, buffers, batch, key)
        gradient = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), gradients)
        return jax.lax.with_sharding_constraint(gradient, shardings), sums

    return together


def _accumulated(
    micro_gradient: Callable, accumulation: int, params: Tree, buffers: Tree, batch: Batch, key: jax.Array
) -> tuple[Tree, Sums]:
    """Gradient of the summed loss, and the sums, over the whole batch; micro-batch m has every accumulation-th row from m on.

    With that stride the rows of a micro-batch are spread over the devices as those of the batch are, and none moves.
    """
    if accumulation == 1:
        return micro_gradient(params, buffers, batch, key)

    def deal(rows: jax.Array) -> jax.Array:
        micro = jnp.moveaxis(rows.reshape(-1, accumulation, *rows.shape[1:]), 1, 0)
        return constrain(micro, (None, "batch", "seq", *(None,) * (micro.ndim - 3))[: micro.ndim])

    def add(total, numbered):
        number, micro = numbered
        found = micro_gradient(params, buffers, micro, jax.random.fold_in(key, number))
        gradient = jax.tree.map(jnp.add, total[0], found[0])
        return (gradient, total[1].joined(jnp.add, jnp.minimum, jnp.maximum, found[1])), None

    micro_batches = jnp.arange(accumulation), jax.tree.map(deal, batch)
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    gradient, sums = jax.eval_shape(lambda: micro_gradient(params, buffers, first[1], key))
    full = lambda value: lambda leaf: jnp.full(leaf.shape, value, leaf.dtype)
    start = jax.tree.map(full(0), gradient), sums.joined(full(0), full(jnp.inf), full(-jnp.inf))
    return jax.lax.scan(add, start, micro_batches)[0]


def _updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Tree,
    sums: Sums,
    expert_bias_rate: float,
    bounds: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    weighed = sums.weight > 0
    share = jnp.where(weighed, 1 / jnp.where(weighed, sums.weight, 1), 0)
    gradient = jax.tree.map(lambda leaf: leaf * share, gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    # Without any weight the gradient is zero, but momentum and weight decay would still move the parameters.
    updates = jax.tree.map(lambda update: jnp.where(weighed, update, 0), updates)
    params = jax.tree.map(jnp.add, state.params, updates)
    metrics = {
        **sums.figures(),
        "gradient_norm": optax.tree.norm(gradient),
        **_norms_by_group("gradient_norm", gradient),
        **_norms_by_group("update_norm", updates),
    }
    rate = optax.tree.get(opt_state, "learning_rate")
    if rate is not None:
        metrics["learning_rate"] = rate
    buffers = state.buffers
    if sums.router_counts is not None:
        metrics |= router_metrics(sums.router_counts)
        buffers = _balanced(buffers, sums.router_counts, expert_bias_rate)
    updated = TrainState(state.step + 1, params, buffers, opt_state)
    if bounds is not None:
        seen = jnp.stack([metrics["loss"], metrics["gradient_norm"]])
        sound = jnp.all(jnp.isfinite(seen) & (seen <= bounds))
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
        updated = kept._replace(step=updated.step)
        metrics["skipped"] = 1 - sound.astype(jnp.float32)
    return updated, metrics


def _norms_by_group(name: str, tree: Tree) -> Metrics:
    """The Euclidean norm over all parameters of a group (see `parameter_group`), as NAME_GROUP."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        group = parameter_group(path)
        squares[group] = squares.get(group, 0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return {f"{name}_{group}": jnp.sqrt(total) for group, total in squares.items()}


def router_metrics(counts: jax.Array) -> Metrics:
    """How even the load of the experts is, averaged over the layers.

    `router_imbalance`: tokens of the busiest expert over the mean of all, 1 if even (Wang et al. 2024 call this less 1 MaxVio).
    `router_idle_share`: experts that no token chose, of all. `router_effective_experts`: e to the entropy of the load, which is
    the number of experts if even, and 1 if one has all.

    Args:
      counts: [moe layers, experts], tokens that chose each expert; a layer without tokens counts as even.
    """
    experts, total = counts.shape[1], jnp.sum(counts, axis=1, keepdims=True)
    load = jnp.where(total > 0, counts / jnp.where(total > 0, total, 1), 1 / experts)
    entropy = -jnp.sum(load * jnp.log(jnp.where(load > 0, load, 1)), axis=1)
    return {
        "router_imbalance": experts * jnp.mean(jnp.max(load, axis=1)),
        "router_idle_share": jnp.mean(load == 0, dtype=jnp.float32),
        "router_effective_experts": jnp.mean(jnp.exp(entropy)),
    }


def _balanced(buffers: Tree, counts: jax.Array, rate: float) -> Tree:
    """The buffers after the experts' biases moved: up for those with less than the mean load, down for those with more.

    bias += rate * sign(mean(counts) - counts), then centred, since only differences between biases matter (auxiliary-loss-free
    balancing, Wang et al. 2024, algorithm 1; the centring as torchtitan does it).

    Args:
      counts: [moe layers, experts], in the order of the layers, over all tokens of the step.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(buffers)  # layers are numbered, so they come in their order
    rows = iter(counts)

    def moved(bias: jax.Array) -> jax.Array:
        load = next(rows)
        bias = bias + rate * jnp.sign(jnp.mean(load) - load)
        return bias - jnp.mean(bias)

    return jax.tree.unflatten(tree, [moved(leaf) if path[-1].key == "expert_bias" else leaf for path, leaf in leaves])
