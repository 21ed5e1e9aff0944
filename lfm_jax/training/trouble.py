"""Steps whose loss or gradient is no finite number, or far above those before: what they are, and what is done about them."""

import collections
import dataclasses
import json
import math
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath

FILE = "trouble.jsonl"
FOLDER = "trouble"
_WATCHED = ("loss", "gradient_norm")


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no finite number, or too many steps were troubled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TroubleConfig:
    """What is done about a step whose loss or gradient norm is no finite number, or a spike.

    non_finite, spike: "stop" ends the run; "report" tells it; "skip" leaves the update of that step out; "roll_back" goes back to
      a checkpoint and on from there without the batches that led to it (PaLM, Chowdhery et al. 2022, section 5.1).
    sigma: a spike is more than so many standard deviations above the mean of the last `window` steps, once there are as many (6
      of 128: OLMo-core, optim/skip_step_optimizer.py, which counts too low as a spike, too, begins with half a window, and lets a
      NaN into it).
    back: the checkpoint must be of at least so many steps before. ahead: so many batches after the troubled one are left out too.
    limit: the run ends when more steps than that are skipped within a window, or at one roll-back more than that in all.
    replay: the gradient of a step that was left out is computed twice more and compared: a broken device may give two answers.
      On GPUs only with --xla_gpu_deterministic_ops in XLA_FLAGS: sound ones may do so without.
    """

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    spike: Literal["report", "skip", "roll_back"] = "report"
    sigma: float = 6.0
    window: int = 128
    back: int = 0
    ahead: int = 0
    limit: int = 8
    replay: bool = True

    def __post_init__(self):
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 steps, got {self.window}")
        for name in ("back", "ahead", "limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def skips(self) -> bool:
        """Whether the step itself must be able to leave an update out."""
        return self.non_finite != "stop" or self.spike != "report"


class Trouble(NamedTuple):
    """A troubled step, and what is to be done: "report", "skip" or "roll_back". text: in words."""

    step: int
    action: str
    text: str


class Watchman:
    """Looks at the figures of every step, in order, and says which are trouble. Every process comes to the same answers.

    What it judges a step by are the steps up to two before: the metrics of the one before are not there when it begins.
    """

    def __init__(self, config: TroubleConfig, workdir: epath.Path):
        self._config, self._folder = config, workdir / FOLDER
        self._file = workdir / FILE
        self._history: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=config.window + 2)
        self._skipped: list[int] = []
        self._batches: collections.deque[tuple[int, dict[str, np.ndarray]]] = collections.deque(maxlen=3)
        self._roll_backs = 0
        self.left_out = 0

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint; JSON. left_out: batches that roll-backs have left out, so that step n had batch n + left_out."""
        history = [list(entry) for entry in self._history]
        return {"history": history, "skipped": self._skipped, "roll_backs": self._roll_backs, "left_out": self.left_out}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to where `get_state` was called, but for the number of roll-backs; an empty one is the beginning."""
        self._history = collections.deque(map(tuple, state.get("history", ())), maxlen=self._config.window + 2)
        self._skipped = list(state.get("skipped", ()))
        self._roll_backs = max(self._roll_backs, state.get("roll_backs", 0))
        self.left_out = state.get("left_out", 0)
        self._batches.clear()

    def keep(self, step: int, batch: dict[str, np.ndarray]) -> None:
        """Remembers the rows of a step, which `look` may want to write down."""
        self._batches.append((step, batch))

    def batch(self, step: int) -> dict[str, np.ndarray] | None:
        """This host's rows of a step, if it is one of the last."""
        return dict(self._batches).get(step)

    def bounds(self, step: int) -> tuple[float, float]:
        """The largest loss and gradient norm of a step that is no spike; infinite while too few steps have been seen."""
        before = [entry[1:] for entry in self._history if entry[0] <= step - 2][-self._config.window :]
        if len(before) < self._config.window:
            return math.inf, math.inf
        mean, deviation = np.mean(before, axis=0), np.std(before, axis=0)
        return tuple((mean + self._config.sigma * deviation).tolist())

    def step_bounds(self, step: int) -> np.ndarray:
        """What the step is given, [2] float32: infinite where a spike is only told of."""
        bounds = self.bounds(step) if self._config.spike != "report" else (math.inf, math.inf)
        return np.array(bounds, np.float32)

    def look(self, step: int, values: dict[str, float]) -> Trouble | None:
        """What is wrong with a step, if anything is. It is written down, with its batch.

        Raises:
          TrainingDiverged: it ends the run, or there have been too many.
        """
        seen = tuple(values[name] for name in _WATCHED)
        bounds = self.bounds(step)
        finite = all(map(math.isfinite, seen))
        if finite:
            self._history.append((step, *seen))
            if all(value <= np.float32(bound) for value, bound in zip(seen, bounds, strict=True)):
                return None
        action = self._config.spike if finite else self._config.non_finite
        text = "; ".join(
            f"{name} is {value:.6g} at step {step}" + (f", where {bound:.6g} is usual at most" if math.isfinite(bound) else "")
            for name, value, bound in zip(_WATCHED, seen, bounds, strict=True)
            if not (math.isfinite(value) and value <= np.float32(bound))
        )
        self._write(step, seen, bounds, action)
        self._end_if_too_many(step, action, text)
        return Trouble(step, action, text)

    def _end_if_too_many(self, step: int, action: str, text: str) -> None:
        config = self._config
        more_of_them = f"train.trouble.limit={2 * config.limit + 1}"
        if action == "stop":
            raise TrainingDiverged(f"{text}. {self._diagnosis(step, 'train.trouble.non_finite=skip (or roll_back)')}")
        if action == "roll_back":
            self._roll_backs += 1
            if self._roll_backs > config.limit:
                raise TrainingDiverged(f"{text}, after {config.limit} roll-backs. {self._diagnosis(step, more_of_them)}")
        if action == "skip":
            self._skipped = [each for each in (*self._skipped, step) if each > step - config.window]
            if len(self._skipped) > config.limit:
                skipped = f"of the last {config.window} steps these were skipped: {', '.join(map(str, self._skipped))}"
                raise TrainingDiverged(f"{text}; {skipped}. {self._diagnosis(step, more_of_them)}")

    def _diagnosis(self, step: int, past_it: str) -> str:
        """past_it: the setting with which the run goes on."""
        recent = [entry[1:] for entry in self._history if entry[0] < step][-16:]
        course = ", ".join(f"{loss:.4g} ({norm:.3g})" for loss, norm in recent) or "none"
        return (
            f"Loss (and gradient norm) of the steps before: {course}. The batches are in {self._folder} "
            "(configs/inspect_trouble.py decodes them), the checkpoints are of earlier steps. If the gradient grew step by step, "
            "a lower learning rate, a longer warm-up or clipping helps; if it came out of nothing, look at the batch: "
            f"--config.{past_it} and --allow_config_change carry the run past it."
        )

    def _write(self, step: int, seen: tuple[float, ...], bounds: tuple[float, ...], action: str) -> None:
        """A line about the step, and its batch: each process writes the rows that it has."""
        batch = self.batch(step)
        if batch is not None:
            folder = self._folder / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"process-{jax.process_index()}.npz").open("wb") as file:
                np.savez_compressed(file, **batch)
        if jax.process_index() == 0:
            number = lambda value: value if math.isfinite(value) else str(value)
            record = {"step": step, "batch": step + self.left_out, "time": round(time.time(), 3), "action": action}
            record |= {name: number(value) for name, value in zip(_WATCHED, seen, strict=True)}
            record |= {f"usual_{name}": number(bound) for name, bound in zip(_WATCHED, bounds, strict=True)}
            # Whole, and under another name first: gcsfs takes appending for writing anew.
            told, part = self._file.read_text() if self._file.exists() else "", self._file.parent / f".{FILE}"
            part.write_text(told + json.dumps(record) + "\n")
            part.replace(self._file)
