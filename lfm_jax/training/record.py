"""What is written of a run while it goes on: figures of the steps that are due, rates, evaluations, and the bar to look at."""

import math
import resource
import sys
import time
from collections.abc import Callable

import jax

from lfm_jax.sharding import peers
from lfm_jax.sharding.chips import chip_of
from lfm_jax.training.goodput import Ledger, table
from lfm_jax.training.metrics import MetricsWriter
from lfm_jax.training.progress import LoopProgress


class Record:
    """Fetches each step's metrics one step late, so that the device is never without work, and writes those that are due.

    Args:
      open_writer: step -> where figures of the steps after it are written.
      start: the step after which it begins.
      flops_per_token: of a step's tokens, for the MFU, shown where the chip's peak is known.
      ledger: whose shares are figures, too.
    """

    def __init__(
        self,
        open_writer: Callable[[int], MetricsWriter],
        start: int,
        steps: int,
        log_every: int,
        flops_per_token: Callable[[int], float] | None,
        progress: LoopProgress,
        ledger: Ledger,
    ):
        self._open_writer, self._steps, self._log_every, self._progress = open_writer, steps, log_every, progress
        self._ledger = ledger
        chip = chip_of(jax.devices()[0])
        self._flops_per_token = flops_per_token if chip is not None else None
        self._peak = jax.device_count() * chip.flops if chip is not None else None
        self._writer: MetricsWriter | None = None
        # When the last record was; None until the first step, which compiles, is over.
        self._since: float | None = None
        self.begin(start)

    def begin(self, step: int) -> None:
        """Goes on after `step`, which may be an earlier one."""
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._tokens, self._flops, self._since = 0.0, 0.0, None
        self.close()
        if jax.process_index() == 0:
            self._writer = self._open_writer(step)

    def device_is_busy(self) -> bool:
        """Whether the step that was handed over last still runs."""
        return self._waiting is not None and not self._waiting[1]["loss"].is_ready()

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> tuple[int, dict[str, float]] | None:
        """Step `step` has been handed to the device. Returns what `flush` does."""
        before, self._waiting = self._waiting, (step, metrics)
        return self._fetch(before)

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the step that was handed over last and returns (step, its figures); None if that has been done."""
        before, self._waiting = self._waiting, None
        return self._fetch(before)

    def _fetch(self, waiting: tuple[int, dict[str, jax.Array]] | None) -> tuple[int, dict[str, float]] | None:
        if waiting is None:
            return None
        step, metrics = waiting
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif math.isfinite(values.get("tokens", math.nan)):
            self._tokens += values["tokens"]
            if self._flops_per_token is not None:
                self._flops += values["tokens"] * self._flops_per_token(step)
        return step, values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the figures of a step if they are due; those that are no finite numbers are left out."""
        if step % self._log_every and step != self._steps:
            self._progress.update(step)
            return
        text, now = f"loss {values['loss']:.4f}", time.monotonic()
        if self._tokens and now > self._since:
            rate = values["tokens_per_second"] = self._tokens / (now - self._since)
            text += f"  {rate:,.0f} tokens/s"
            if self._flops_per_token is not None:
                values["model_flops_utilization"] = self._flops / (now - self._since) / self._peak
                text += f"  MFU {values['model_flops_utilization']:.1%}"
        self._since, self._tokens, self._flops = now, 0.0, 0.0
        if self._writer is not None:
            figures = {f"train/{name}": value for name, value in values.items() if math.isfinite(value)}
            goodput = {f"goodput/{row['kind']}": row["share"] for row in table(self._ledger.seconds()) if row["share"]}
            self._writer.write(step, figures | goodput | _memory() | peers.data_seconds())
        self._progress.update(step, text)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Writes what an evaluation after `step` found; its time is no training time."""
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in figures.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._progress.print(f"step {step}: held-out {shown}")
        self._since, self._tokens, self._flops = time.monotonic(), 0.0, 0.0

    def sync(self) -> None:
        """See `MetricsWriter.sync`."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _memory() -> dict[str, float]:
    """Peak bytes of this process, and of its device with the most, where the device says."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"memory/host_peak_bytes": host} | ({"memory/device_peak_bytes": max(peaks)} if peaks else {})
