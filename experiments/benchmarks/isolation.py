"""The walls of `lfm_jax.isolation`: the escape suite behind each, as root and as an ordinary user, and what a start costs."""

import dataclasses
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from experiments.benchmarks.isolation_attacks import WALLS, run_suite, run_suite_as
from experiments.results import write_json, write_results
from lfm_jax.isolation import interpreter, run_python
from lfm_jax.isolation.wall import defect


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """repetitions: runs of `print(1)` that are timed. user: the id of the ordinary user, where this is run by root."""

    repetitions: int = 100
    user: int = 1000

    def __post_init__(self):
        if self.repetitions < 1 or self.user < 1:
            raise ValueError(f"repetitions and user must be at least 1, got {self.repetitions} and {self.user}")


def _suites(config: Config, walls: list[str]) -> Iterator[dict[str, Any]]:
    for wall in walls:
        is_root = os.geteuid() == 0
        for row in run_suite(wall):
            yield {"wall": wall, "user": "root" if is_root else "ordinary", **row}
        for row in run_suite_as(config.user, wall) if is_root else ():
            yield {"wall": wall, "user": "ordinary", **row}


def _starts(config: Config, walls: list[str]) -> dict[str, float]:
    """Milliseconds for `print(1)`: from the call to the result, in turns; processor time, too."""
    python = interpreter.executable_in(interpreter.home())

    def bare(*options: str) -> Callable[[], str]:
        return lambda: subprocess.run([python, *options, "-c", "print(1)"], capture_output=True, text=True, check=True).stdout

    runs = {"python_isolated": bare("-I"), "python_without_site": bare("-I", "-S")}
    runs |= {wall: lambda wall=wall: run_python("print(1)", wall=WALLS[wall]).stdout for wall in walls}
    times: dict[str, list[float]] = {name: [] for name in runs}
    processor = dict.fromkeys(runs, 0.0)
    for _ in range(config.repetitions):
        for name, run in runs.items():
            begin, used = time.perf_counter(), _processor_seconds()
            said = run()
            times[name].append(1e3 * (time.perf_counter() - begin))
            processor[name] += _processor_seconds() - used
            if said != "1\n":
                raise RuntimeError(f"{name}: print(1) printed {said!r}")
    figures = {}
    for name, values in times.items():
        figures |= {f"{name}_start_ms": np.median(values), f"{name}_start_p95_ms": np.quantile(values, 0.95)}
        figures |= {f"{name}_start_processor_ms": 1e3 * processor[name] / config.repetitions}
        figures |= {f"{name}_start_of_isolated": np.median(values) / np.median(times["python_isolated"])}
    return figures


def _processor_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def main(config: Config, workdir: epath.Path) -> None:
    """Writes attacks.json, a row for each attack, wall and user, and results.json: how many were not held, and the starts."""
    from rich.progress import track

    defects = {name: defect(wall) for name, wall in WALLS.items()}
    walls = [name for name in WALLS if not defects[name]]
    for name in set(WALLS) - set(walls):
        print(f"{name} is left out: {defects[name]}", file=sys.stderr)
    rows = list(track(_suites(config, walls), description="attacks"))
    write_json(workdir / "attacks.json", rows)
    figures = {"attacks": len(rows), "not_held": sum(bool(row["breaches"]) for row in rows), "walls": walls, "rows": rows}
    write_results(workdir, {**figures, **_starts(config, walls)}, config)
