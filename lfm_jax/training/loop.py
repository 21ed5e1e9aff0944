"""The one training loop. What is trained on what, and towards what, an experiment brings along."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from lfm_jax.models import FunctionalModel
from lfm_jax.models.functional import Tree
from lfm_jax.sharding.chips import chip_of
from lfm_jax.training.checkpoint import Checkpoints
from lfm_jax.training.metrics import MetricsWriter
from lfm_jax.training.objective import Objective
from lfm_jax.training.progress import LoopProgress
from lfm_jax.training.state import TrainState, abstract_state, init_state
from lfm_jax.training.step import make_train_step, place_batch

# EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again.
EXIT_INTERRUPTED = 75


class BatchIterator(Protocol):
    """Endless or not, this host's rows of the global batches, and where it stands; grain's DatasetIterator is one."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""

    def set_state(self, state: dict[str, Any]) -> None: ...


Evaluate = Callable[[Tree, Tree], dict[str, float]]


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no finite number."""


class Interrupted(SystemExit):
    """The process was asked to stop, and has saved; the same command resumes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what happens on the way.

    steps: updates of the parameters.
    seed: of the initial parameters and of everything random in a step.
    accumulation: micro-batches that a batch is taken in, one after the other, to save memory; it changes nothing else.
    expert_bias_rate: step of the load balance of a mixture of experts (see `make_train_step`).
    log_every, evaluate_every, checkpoint_every: steps between two records, evaluations, checkpoints; the last step has each.
    keep_checkpoints: that many of the newest stay; keep_every: those of every so many steps stay as well.
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

    def __post_init__(self):
        for name in ("steps", "accumulation", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


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
    batches: BatchIterator,
    mesh: Mesh,
    workdir: epath.PathLike,
    run_config: dict[str, Any],
    evaluate: Evaluate | None = None,
    initial: tuple[Tree, Tree] | None = None,
    flops_per_token: float | None = None,
) -> Trained:
    """Trains to `config.steps`, from where the workdir's newest good checkpoint is.

    Args:
      batches: its state goes into the checkpoints, so that the next batch after a restart is the one that would have come.
      run_config: what a checkpoint says of the run it is from.
      evaluate: (params, buffers) -> figures, logged as eval/NAME.
      initial: (params, buffers) to begin with instead of random ones; the arrays are taken over, and gone afterwards.
      flops_per_token: model FLOPs of a training step, for the MFU; shown where the chip's peak is known.

    Raises:
      TrainingDiverged: the loss or the gradient of a step is not finite. The checkpoints are of steps before.
      Interrupted: SIGTERM or SIGINT came; the step that was running has been finished and saved. A second one ends at once.
      Exception: whatever failed while a checkpoint was written; nothing goes on without one.
    """
    workdir = epath.Path(workdir)
    step_function = make_train_step(
        functions, optimizer, objective, mesh,
        seed=config.seed, accumulation=config.accumulation, expert_bias_rate=config.expert_bias_rate,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, keep_every=config.keep_every)
        )
        state, start = _begin(config, checkpoints, functions, optimizer, mesh, batches, initial)
        stop = stack.enter_context(_stop_requests())
        progress = stack.enter_context(LoopProgress("training", config.steps, start))
        record = stack.enter_context(contextlib.closing(_Record(workdir, start, config, flops_per_token, progress)))
        if start:
            progress.print(f"resumed at step {start} of {config.steps}")
        for step in range(start + 1, config.steps + 1):
            state, metrics = step_function(state, place_batch(next(batches), mesh))
            record.dispatched(step, metrics)
            due = lambda every, step=step: step % every == 0 or step == config.steps
            if evaluate is not None and due(config.evaluate_every):
                record.flush()
                record.evaluated(step, evaluate(state.params, state.buffers))
            stopping = stop.requested
            if due(config.checkpoint_every) or stopping:
                record.flush()  # of a diverged step no checkpoint is made
                checkpoints.save(state, data_state=batches.get_state(), config=run_config)
            if stopping:
                checkpoints.wait()
                progress.print(f"stopped after step {step} of {config.steps} and saved; the same command resumes")
                raise Interrupted(EXIT_INTERRUPTED)
    return Trained(state, start)


def _begin(
    config: TrainConfig,
    checkpoints: Checkpoints,
    functions: FunctionalModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    batches: BatchIterator,
    initial: tuple[Tree, Tree] | None,
) -> tuple[TrainState, int]:
    """(state, steps done): 1. the run's own newest checkpoint that verifies; 2. the parameters that are given; 3. random ones."""
    restored = checkpoints.restore(abstract_state(functions, optimizer, mesh))
    if restored is not None:
        batches.set_state(restored.data_state)
        return restored.state, restored.step
    state = init_state(functions, optimizer, mesh, config.seed)
    if initial is not None:
        place = lambda own, given: jax.device_put(given, own.sharding)
        params, buffers = jax.tree.map(place, (state.params, state.buffers), initial)
        state = state._replace(params=params, buffers=buffers)
    return state, 0


class _Stop:
    requested = False


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """While it lasts, the first SIGTERM or SIGINT is a request; with the second the usual handler is back."""
    stop, before = _Stop(), {}

    def request(number, frame):
        stop.requested = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, request)
    except ValueError:  # not the main thread, which alone may set handlers: whoever runs it there stops it
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Record:
    """Fetches each step's metrics one step late, so that the device is never without work, and writes those that are due."""

    def __init__(
        self, workdir: epath.Path, start: int, config: TrainConfig, flops_per_token: float | None, progress: LoopProgress
    ):
        self._writer = MetricsWriter(workdir, start) if jax.process_index() == 0 else None
        self._config, self._progress = config, progress
        chip = chip_of(jax.devices()[0])
        known = chip is not None and flops_per_token is not None
        self._flops_share = flops_per_token / (jax.device_count() * chip.flops) if known else None
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        # Tokens and seconds since the last record; None until the first step, which compiles, is over.
        self._since: float | None = None
        self._tokens = 0.0

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Step `step` has been handed to the device."""
        self.flush()
        self._waiting = step, metrics

    def flush(self) -> None:
        """Waits for the step that was handed over last, and writes it if it is due."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise TrainingDiverged(
                    f"{name} is {values[name]} at step {step}. The checkpoints are of earlier steps; a lower learning rate, a "
                    "longer warm-up or another seed of the data may carry the run past it."
                )
        now = time.monotonic()
        if self._since is None:
            self._since = now
        else:
            self._tokens += values["tokens"]
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._write(step, values, now)
        else:
            self._progress.update(step)

    def _write(self, step: int, values: dict[str, float], now: float) -> None:
        text = f"loss {values['loss']:.4f}"
        if self._tokens and now > self._since:
            rate = values["tokens_per_second"] = self._tokens / (now - self._since)
            text += f"  {rate:,.0f} tokens/s"
            if self._flops_share is not None:
                values["model_flops_utilization"] = rate * self._flops_share
                text += f"  MFU {values['model_flops_utilization']:.1%}"
        self._since, self._tokens = now, 0.0
        if self._writer is not None:
            self._writer.write(step, {f"train/{name}": value for name, value in values.items()})
        self._progress.update(step, text)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Writes what an evaluation after `step` found; its time is no training time."""
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in figures.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._progress.print(f"step {step}: held-out {shown}")
        self._since, self._tokens = time.monotonic(), 0.0

    def close(self) -> None:
        """Writes what is due still, unless an error is on its way."""
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.close()
