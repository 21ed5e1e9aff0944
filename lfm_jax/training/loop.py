"""The one training loop. What is trained on what, and towards what, an experiment brings along."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from lfm_jax.configuration import ConfigError, mistakes_in, nearest
from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding import peers
from lfm_jax.sharding.flags import checker_for, repeats_exactly
from lfm_jax.training.checkpoint import Checkpoints
from lfm_jax.training.goodput import Ledger, Span
from lfm_jax.training.metrics import MetricsWriter
from lfm_jax.training.objective import Objective
from lfm_jax.training.profiling import ProfileConfig, Profiler
from lfm_jax.training.progress import LoopProgress
from lfm_jax.training.record import Record
from lfm_jax.training.replicas import SilentCorruption, check_replicas, describe_devices, differing_devices, gathered_sums
from lfm_jax.training.state import TrainState, abstract_state, init_state
from lfm_jax.training.step import make_replay, make_train_step, place_batch
from lfm_jax.training.stopping import EXIT_INTERRUPTED, Interrupted, stop_requests
from lfm_jax.training.trackers import check_trackers
from lfm_jax.training.trouble import TrainingDiverged, Trouble, TroubleConfig, Watchman


class BatchIterator(Protocol):
    """Endless or not, this host's rows of the global batches, and where it stands; grain's DatasetIterator is one."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None: ...


class ObservingBatchIterator(BatchIterator, Protocol):
    """One whose batches are made by the model that is trained, as in reinforcement learning."""

    def observe(self, params: Tree, buffers: Tree, step: int) -> None:
        """`train` calls it before each `next`, with the parameters after `step` updates: 0 before the first step of a run, after
        a resume or a roll back those of the checkpoint. Every process calls it for the same step.

        The next step takes the arrays over: use or copy them before `next` returns.
        """

    def figures(self) -> dict[str, float]:
        """Of what the last batch was made from, written beside the figures of its step; it may be left out."""


Evaluate = Callable[[Tree, Tree], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what happens on the way.

    steps: updates of the parameters.
    seed: of the initial parameters and of everything random in a step.
    accumulation: micro-batches that a batch is taken in, one after the other, to save memory; it changes nothing else.
    expert_bias_rate: step of the load balance of a mixture of experts (see `make_train_step`).
    log_every, evaluate_every, checkpoint_every: steps between two records, evaluations, checkpoints; the last step has each.
    keep_checkpoints: that many of the newest stay; keep_every: those of every so many steps stay as well; keep_best: and that
      many of those with the lowest `best_by`, a figure of the evaluation at that step; "-NAME": with the highest NAME.
    convert_dtypes: a checkpoint with leaves of other dtypes, e.g. of the optimizer's moments, is converted instead of refused.
    trouble: what is done about spikes and numbers that are not finite. watch: how long a process may be silent, or take for what.
    compare_replicas_every: steps between two comparisons of what several devices hold copies of; each checkpoint has one, too.
    device_check_every: steps between two that run in a second program, which computes everything three times and ends the run
      where the results differ (the TPU compiler's checker; v5p alone); None: none does.
    trackers: where figures go to besides metrics.jsonl and TensorBoard: "wandb", "trackio". profile: what is traced.
    """

    steps: int
    seed: int = 0
    accumulation: int = 1
    expert_bias_rate: float = 1e-3
    log_every: int = 10
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    keep_every: int | None = None
    keep_best: int = 0
    best_by: str = "nll_per_token"
    convert_dtypes: bool = False
    trouble: TroubleConfig = TroubleConfig()
    watch: peers.WatchConfig = peers.WatchConfig()
    compare_replicas_every: int = 100
    device_check_every: int | None = None
    trackers: tuple[str, ...] = ()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        at_least_1 = (
            "steps", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints",
            "compare_replicas_every",
        )  # fmt: skip
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("keep_every", "device_check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.keep_best < 0:
            raise ValueError(f"keep_best must not be negative, got {self.keep_best}")
        check_trackers(self.trackers)

    def check_best(self, figures: Mapping[str, float]) -> None:
        """Raises ConfigError if the best checkpoints are to go by a figure that an evaluation, which has found these, lacks."""
        name = self.best_by.removeprefix("-")
        if self.keep_best and name not in figures:
            raise ConfigError(f"--config.train.best_by: the evaluation has no figure {name!r}. {nearest(name, figures)}")

    def score(self, figures: Mapping[str, float]) -> float | None:
        """Of a checkpoint at whose step an evaluation has found these: the lower, the better; None without the figure."""
        value = figures.get(self.best_by.removeprefix("-"))
        return -value if value is not None and self.best_by.startswith("-") else value


class Trained(NamedTuple):
    """What a loop ends with. started_at: the step it resumed at, 0 for a new run."""

    state: TrainState
    started_at: int


def train(
    config: TrainConfig,
    *,
    functions: FunctionalModel,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    batches: BatchIterator | ObservingBatchIterator,
    mesh: Mesh,
    workdir: epath.PathLike,
    run_config: dict[str, Any],
    evaluate: Evaluate | None = None,
    initial: tuple[Tree, Tree] | None = None,
    flops_per_token: Callable[[int], float] | None = None,
    ledger: Ledger | None = None,
) -> Trained:
    """Trains to `config.steps`, from where the workdir's newest good checkpoint is.

    Args:
      batches: its state goes into the checkpoints, so that the next batch after a restart is the one that would have come.
      run_config: what a checkpoint says of the run it is from.
      evaluate: (params, buffers) -> figures, logged as eval/NAME.
      initial: (params, buffers) to begin with instead of random ones; the arrays are gone from the first step on, also where
        the run goes on from a checkpoint.
      flops_per_token: model FLOPs of each training step, from 1 on, for the MFU; shown where the chip's peak is known.
      ledger: where the run's time is booked; None: one of the loop's own.

    Raises:
      ConfigError: the data ends too early, or keep_best goes by a figure that no evaluation has.
      TrainingDiverged: the loss or the gradient of a step is not finite, or too often. The checkpoints are of steps before.
      SilentCorruption: devices differ where they should not; the checkpoints are of steps before.
      Interrupted: SIGTERM or SIGINT came; the step that was running has been finished and saved. A second one ends at once.
      Exception: whatever failed while a checkpoint was written; nothing goes on without one.
    """
    workdir = epath.Path(workdir)
    peers.configure(config.watch)
    with contextlib.ExitStack() as stack:
        if ledger is None:
            ledger = stack.enter_context(Ledger(workdir, writes=jax.process_index() == 0))
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                keep=config.keep_checkpoints, keep_every=config.keep_every, keep_best=config.keep_best,
            )
        )  # fmt: skip
        parts = _Parts(functions, optimizer, objective, batches, mesh, initial)
        run = _Run(config, parts, checkpoints, workdir, run_config, ledger)
        start = run.begin()
        stop = stack.enter_context(stop_requests())
        progress = stack.enter_context(LoopProgress("training", config.steps, start))
        profiler = stack.enter_context(Profiler(config.profile, workdir, progress.print))
        open_writer = lambda step: MetricsWriter(workdir, step, config.trackers, run_config)
        run.record = Record(open_writer, start, config.steps, config.log_every, flops_per_token, progress, ledger)
        stack.callback(run.close)
        run.say = progress.print
        if start:
            run.say(f"resumed at step {start} of {config.steps}")
        stopping = False
        stack.enter_context(peers.at("loop"))
        while run.step < config.steps:
            if not run.advance(profiler):
                continue
            stopping = stop.reached() or stopping
            if run.settled(evaluate, stopping) and stopping:
                run.wait()
                run.say(f"stopped after step {run.step} of {config.steps} and saved; the same command resumes")
                raise Interrupted(EXIT_INTERRUPTED)
        run.wait()
    return Trained(run.state, start)


class _Parts(NamedTuple):
    functions: FunctionalModel
    optimizer: optax.GradientTransformation
    objective: Objective
    batches: BatchIterator | ObservingBatchIterator
    mesh: Mesh
    initial: tuple[Tree, Tree] | None


class _Run:
    """Where a run is, and how it comes one step further."""

    record: Record
    say: Callable[[str], None]

    def __init__(
        self,
        config: TrainConfig,
        parts: _Parts,
        checkpoints: Checkpoints,
        workdir: epath.Path,
        run_config: dict[str, Any],
        ledger: Ledger,
    ):
        self._config, self._parts, self._checkpoints, self._run_config = config, parts, checkpoints, run_config
        self._ledger = ledger
        self._watchman = Watchman(config.trouble, workdir)
        self._abstract = abstract_state(parts.functions, parts.optimizer, parts.mesh)
        step = functools.partial(
            make_train_step, parts.functions, parts.optimizer, parts.objective, parts.mesh,
            seed=config.seed, accumulation=config.accumulation, expert_bias_rate=config.expert_bias_rate,
            skip=config.trouble.skips,
        )  # fmt: skip
        self._step_functions = [step()]
        if config.device_check_every is not None:
            with mistakes_in("train.device_check_every"):
                self._step_functions.append(step(compiler_options=checker_for(parts.mesh.devices.flat[0])))
        self._compiled: set[int] = set()
        self.step, self.state = 0, None

    def begin(self) -> int:
        """At 1. the run's own newest checkpoint that verifies; 2. the given parameters; 3. random ones. Returns the step."""
        functions, optimizer, _, _, mesh, initial = self._parts
        restored = self._restored()
        self._ledger.begin(self.step)
        if not restored:
            self.state = init_state(functions, optimizer, mesh, self._config.seed)
            if initial is not None:
                self.state = self.state._replace(params=None, buffers=None)  # there need not be room for two
                params, buffers = _copied(initial, (self._abstract.params, self._abstract.buffers))
                self.state = self.state._replace(params=params, buffers=buffers)
        for leaf in jax.tree.leaves(initial):
            leaf.delete()
        if not restored and "roll_back" in (self._config.trouble.non_finite, self._config.trouble.spike):
            self._save(None)  # or the first steps would have nothing to go back to
        return self.step

    def advance(self, profiler: Profiler) -> bool:
        """Hands the next step to the device, and looks at the one before; False if that made it go back."""
        step, mesh = self.step + 1, self._parts.mesh
        profiler.before(step)
        with self._at("data", step) as wait:
            batch = self._next_batch(step)
            if self.record.device_is_busy():
                wait.kind = "step"  # nobody waited
        self._watchman.keep(step, batch)
        bounds = (self._watchman.step_bounds(step),) if self._config.trouble.skips else ()
        which = 0 if self._config.device_check_every is None else int(step % self._config.device_check_every == 0)
        with self._at("step" if which in self._compiled else "compile", step):
            self.state, metrics = self._step_functions[which](self.state, place_batch(batch, mesh), *bounds)
            self.step = step
            self._compiled.add(which)
            made_from = getattr(self._parts.batches, "figures", dict)()
            found = self.record.dispatched(step, {**metrics, **made_from})
        profiler.after(step, metrics)
        return self._is_sound(found)

    def settled(self, evaluate: Evaluate | None, stopping: bool) -> bool:
        """Does what is due after a step; False if the step turned out to be one to go back from."""
        config = self._config
        due = lambda every: self.step % every == 0 or self.step == config.steps
        evaluating = evaluate is not None and due(config.evaluate_every)
        saving = stopping or due(config.checkpoint_every)
        found = None
        if evaluating or saving:
            with self._at("step", self.step):
                found = self.record.flush()
        self._ledger.step(self.step)
        if not self._is_sound(found):
            return False
        figures: dict[str, float] = {}
        if evaluating:
            with self._at("evaluation", self.step):
                figures = evaluate(self.state.params, self.state.buffers)
            self.record.evaluated(self.step, figures)
        if saving:
            with self._at("save", self.step):
                self.record.sync()
            self._save(config.score(figures))
        elif self.step % config.compare_replicas_every == 0:
            self._compare()
        if evaluating:
            config.check_best(figures)  # once the steps up to here are safe
        return True

    def wait(self) -> None:
        """Until the last checkpoint is safe."""
        with self._at("save", self.step):
            self._checkpoints.wait()

    @contextlib.contextmanager
    def _at(self, phase: str, step: int, kind: str | None = None) -> Iterator[Span]:
        """While it lasts, the others see this process in `phase`, and its time is booked as `kind`, or as what the phase is."""
        with peers.at(phase, step), self._ledger.kind(kind or _KINDS.get(phase, phase)) as span:
            yield span

    def close(self) -> None:
        """Writes the figures of the last step, if an error has kept them from being written."""
        with contextlib.closing(self.record), contextlib.suppress(jax.errors.JaxRuntimeError):  # the error itself is on its way
            found = self.record.flush()
            if found is not None:
                self.record.write(*found)

    def _next_batch(self, step: int) -> dict[str, np.ndarray]:
        if hasattr(self._parts.batches, "observe"):
            self._parts.batches.observe(self.state.params, self.state.buffers, self.step)
        try:
            return next(self._parts.batches)
        except StopIteration:
            raise ConfigError(
                f"the data ends before step {step} of {self._config.steps}, as batches were left out; raise loader.epochs or "
                "lower train.steps"
            ) from None

    def _save(self, score: float | None) -> None:
        self._compare()
        with self._at("save", self.step):
            self._checkpoints.save(
                self.state, data_state=self._parts.batches.get_state(), loop_state=self._watchman.get_state(),
                config=self._run_config, score=score,
            )  # fmt: skip

    def _compare(self) -> None:
        with self._at("step", self.step):
            check_replicas(self.state, self._parts.mesh, self.step)

    def _restored(self, at_most: int | None = None) -> bool:
        """Takes the state, and all that goes with it, from the newest checkpoint there is; False if there is none."""
        with self._at("restore", self.step):
            cast = self._config.convert_dtypes
            restored = self._checkpoints.restore(self._abstract, cast=cast, at_most=at_most)
        if restored is None:
            return False
        self.step, self.state = restored.step, restored.state
        self._parts.batches.set_state(restored.data_state)
        self._watchman.set_state(restored.loop_state)
        return True

    def _is_sound(self, found: tuple[int, dict[str, float]] | None) -> bool:
        """Writes the figures of a step that has been fetched, and does what its trouble asks for, if it is one."""
        if found is None:
            return True
        step, values = found
        if values.get("skipped"):
            self._ledger.skip(step)
        trouble = self._watchman.look(step, values)
        if trouble is not None:
            self.say(f"{trouble.text}: {_ACTIONS[trouble.action]}")
            if values.get("skipped") and self._config.trouble.replay:
                self._replay(step)
            if trouble.action == "roll_back":
                self._roll_back(trouble)
                return False
        self.record.write(step, values)
        return True

    def _replay(self, step: int) -> None:
        """Computes the gradient of a step that was left out twice more: a device that is broken answers otherwise each time.

        The parameters are those of now; they may have moved by the one step that had been handed over meanwhile. Where sound
        devices may answer otherwise, too (see `repeats_exactly`), nothing is computed, and no verdict given.
        """
        mesh = self._parts.mesh
        if not repeats_exactly(mesh.devices.flat[0]):
            flag = "XLA_FLAGS=--xla_gpu_deterministic_ops"
            self.say(f"step {step} is not computed twice more: without {flag} a sound GPU may answer otherwise")
            return
        batch = place_batch(self._watchman.batch(step), mesh)
        with self._at("compile", step, kind="recovery"):
            arguments = self.state.params, self.state.buffers, np.int32(step - 1), batch
            first, second = (gathered_sums(jax.tree.leaves(self._replayed(*arguments)), mesh) for _ in range(2))
        odd = differing_devices(first, second, mesh)
        if odd:
            raise SilentCorruption(
                f"the gradient of step {step}, computed twice, is not the same on {describe_devices(odd)}. Take the host out of "
                "the run, or test it; the same command resumes from the newest checkpoint."
            )
        self.say(f"step {step}, computed twice more, is the same to the bit: no device is caught, so it is most likely the batch")

    @functools.cached_property
    def _replayed(self) -> Callable:
        (functions, _, objective, _, mesh, _), config = self._parts, self._config
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._abstract.params)
        return make_replay(functions, objective, mesh, shardings, seed=config.seed, accumulation=config.accumulation)

    def _roll_back(self, trouble: Trouble) -> None:
        """Goes back to a checkpoint from before the trouble, and past the batches that led to it."""
        config = self._config
        self.wait()
        self.state = None  # there need not be room for two
        latest = max(0, trouble.step - 1 - config.trouble.back)
        # Those that were due come first: what a stop has saved in between is not there in a run that was not stopped.
        due = latest - latest % config.checkpoint_every
        troubled_batch = trouble.step + self._watchman.left_out
        if not (self._restored(at_most=due) or self._restored(at_most=latest)):
            raise TrainingDiverged(f"{trouble.text}, and there is no checkpoint from before it to go back to.")
        self._ledger.roll_back(self.step)
        self._checkpoints.discard(newer_than=self.step)
        left_out = troubled_batch + config.trouble.ahead - (self.step + self._watchman.left_out)
        with self._at("data", self.step, kind="recovery"):
            for _ in range(left_out):
                self._next_batch(self.step + 1)
        self._watchman.left_out += left_out
        self.record.begin(self.step)
        self.say(f"went back to step {self.step}; {left_out} batches are left out")


def _copied(tree: Tree, like: Tree) -> Tree:
    """In arrays of their own, sharded like others: `device_put` may leave a part of the new one where the old one is."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    return jax.jit(copy, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(tree)


_KINDS = {"data": "data_wait", "compile": "step"}  # jax says itself how long it compiles
_ACTIONS = {
    "report": "the run goes on", "skip": "its update is left out", "roll_back": "the run goes back to an earlier checkpoint"
}  # fmt: skip
