"""What a person sees of a long loop: a bar on a terminal, a line now and then in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class LoopProgress:
    """Progress of a loop of `total` steps, of which `start` were done before; a context manager.

    On a terminal a bar with steps, text, elapsed time and the time that remains; elsewhere a line every ten seconds, and a last.
    """

    def __init__(self, description: str, total: int, start: int = 0, console: Console | None = None):
        self._description, self._total, self._start = description, total, start
        self._console = console or Console()
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "LoopProgress":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._description, total=self._total, completed=self._start, text="")
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, text: str = "") -> None:
        """Says that `step` steps are done; an empty text leaves the bar's as it is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, **({"text": text} if text else {}))
            return
        now = time.monotonic()
        if text and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = now
            left = (self._total - step) * (now - self._began) / max(1, step - self._start)
            self.print(f"{self._description} {step}/{self._total}  {text}  {_clock(left)} left")

    def print(self, line: str) -> None:
        """A line above the bar, or in the log."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """3725 seconds as 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
