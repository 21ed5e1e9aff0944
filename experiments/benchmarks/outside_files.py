"""Damaged and hostile files of every format that is read from outside: what becomes of the process that reads them."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import random
import re
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from experiments.benchmarks.outside_formats import FORMATS
from experiments.benchmarks.processes import ROOT, python_path
from experiments.results import write_results
from lfm_jax.configuration import nearest

# What a file may come to. The first three are as it should be; of the others, none may happen.
GOOD = ("clear error", "same result", "other result, no digest")
BAD = ("silently wrong", "unclear error", "crash", "hang", "growth")
# Of processor time of the reader and its children: on a busy machine the clock says nothing.
MOST_SECONDS = 10.0
_MOST_WAIT_SECONDS = 150.0  # by the clock, for one that sleeps; also for imports, and for writing a large file
MOST_GROWTH_BYTES = 2_000_000_000
_ADDRESS_SPACE_BYTES = 8_000_000_000  # more than the base of a process with jax
_NUMBERS = (b"-1", b"4294967296", b"9223372036854775808", b"99999999999999999999", b"1e999", b"NaN", b"9" * 5000, b"0.5", b"true")
_WORDS = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF, 0, 1 << 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """formats: names in `outside_formats.FORMATS`, none: all; mutants: files of each, the crafted ones aside.

    processes: formats that are tried at a time. seed: of the mutants.
    """

    formats: tuple[str, ...] = ()
    mutants: int = 2000
    processes: int = 2
    seed: int = 0

    def __post_init__(self):
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise ValueError(f"formats: {unknown[0]!r} is none. {nearest(unknown[0], FORMATS)}")
        if self.mutants < 0 or self.processes < 1:
            raise ValueError(f"mutants and processes must not be negative or none, got {self.mutants} and {self.processes}")


class Outcome(NamedTuple):
    """What became of a file. kind: one of `GOOD` or `BAD`. detail: the error's text.

    seconds: of processor time. growth: bytes at the peak over those before.
    """

    kind: str
    detail: str
    seconds: float
    growth: int


def mutate(data: bytes, draws: random.Random) -> tuple[str, bytes]:
    """(name of the damage, the data with it)."""
    name = draws.choice(("flip", "32_bytes", "truncate", "zeros", "8_bytes", "integer", "append", "duplicate"))
    at = draws.randrange(len(data) + 1)
    length = draws.choice((1, 8, 64, 512))
    over = lambda patch: data[:at] + patch + data[at + len(patch) :]
    if name == "flip":
        at = draws.randrange(len(data))
        return name, data[:at] + bytes([data[at] ^ 1 << draws.randrange(8)]) + data[at + 1 :]
    if name in ("32_bytes", "8_bytes"):
        return name, over(draws.randbytes(int(name.partition("_")[0])))
    if name == "truncate":
        return name, data[:at]
    if name == "zeros":
        return name, over(bytes(length))
    if name == "append":
        return name, data + draws.randbytes(length)
    if name == "duplicate":
        return name, data[: at + length] + data[at:]
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if numbers and draws.random() < 0.7:
        number = draws.choice(numbers)
        return name, data[: number.start()] + draws.choice(_NUMBERS) + data[number.end() :]
    return name, over(draws.choice(_WORDS).to_bytes(8, draws.choice(("little", "big")))[: draws.choice((4, 8))])


class Trial:
    """One format: a sample in a folder of its own. expected: what our reader makes of it undamaged."""

    def __init__(self, name: str, folder: epath.Path, seed: int):
        """folder: exists and is empty."""
        self._format, self._name, self._seed = FORMATS[name], name, seed
        self._folder = folder / "changed"
        self._folder.mkdir()
        self._format.make(self._folder)
        self._sound = {path.name: path.read_bytes() for path in self._folder.iterdir()}
        self.expected = self.read()

    def read(self) -> str:
        """What our reader makes of the folder as it is."""
        return self._format.read(self._folder)

    def run(self, case: int | str) -> tuple[str, Outcome]:
        """(what was done to which file, what came of it). case: number of a mutant, or name of a crafted one."""
        draws = random.Random(f"{self._seed} {self._name} {case}")
        file = self._format.file or draws.choice(sorted(self._sound))
        if isinstance(case, int):
            what, data = mutate(self._sound[file], draws)
        else:
            what, data = case, self._format.crafted[case](self._sound[file])
        (self._folder / file).write_bytes(data)
        del data
        outcome = self._outcome()
        (self._folder / file).write_bytes(self._sound[file])
        return what, outcome

    def _outcome(self) -> Outcome:
        before, begin = _memory(reset=True), _processor_seconds()
        try:
            same = self.read() == self.expected
            kind, detail = "same result", ""
            if not same:
                kind = "silently wrong" if self._format.digest else "other result, no digest"
        except BaseException as error:
            # What our readers say that they raise. It must say where the fault is.
            clear = isinstance(error, ValueError | FileNotFoundError) and type(error).__module__ != "builtins"
            clear = clear or type(error) in (ValueError, FileNotFoundError)
            kind = "clear error" if clear and self._format.marker in str(error) else "unclear error"
            detail = f"{type(error).__name__}: {error}"[:300]
        seconds, growth = _processor_seconds() - begin, max(0, _memory() - before)
        if seconds > MOST_SECONDS:
            kind = "hang"
        elif growth > MOST_GROWTH_BYTES:
            kind = "growth"
        return Outcome(kind, detail, seconds, growth)


def _processor_seconds() -> float:
    """Of this process and the children that it has waited for."""
    return sum(os.times()[:4])


def _memory(reset: bool = False) -> int:
    """Bytes of this process in memory at the peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _serve() -> None:
    """A worker: reads a job a line, answers a line; files are read in it, and it may not survive that."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    trial = None
    for line in sys.stdin:
        job = json.loads(line)
        if trial is None:
            trial = Trial(job["format"], epath.Path(job["folder"]), job["seed"])
            base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (base + _ADDRESS_SPACE_BYTES, base + _ADDRESS_SPACE_BYTES))
        what, outcome = trial.run(job["case"])
        print(json.dumps([what, *outcome]), file=answers, flush=True)


class _Worker:
    """A process that reads files of one format."""

    def __init__(self, name: str, seed: int):
        self._folder = tempfile.mkdtemp()
        self._job = {"format": name, "seed": seed, "folder": self._folder}
        command = [sys.executable, "-m", __name__]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
        )

    def ask(self, case: int | str) -> tuple[str, Outcome] | None:
        """What `Trial.run` gives; None: the worker is gone, and this is to be told by `close`."""
        self._process.stdin.write(json.dumps({**self._job, "case": case}).encode() + b"\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(_MOST_WAIT_SECONDS) else b""
        if not line:
            return None
        what, *outcome = json.loads(line)
        return what, Outcome(*outcome)

    def close(self) -> int | None:
        """Ends the worker; its exit code if it had ended by itself."""
        self._process.stdin.close()
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code


def try_format(name: str, mutants: int, seed: int) -> Iterator[tuple[int | str, str, Outcome]]:
    """(case, what was done, what came of it) of each mutant and crafted file, read in workers that are replaced when they die."""
    worker = _Worker(name, seed)
    try:
        for case in [*FORMATS[name].crafted, *range(mutants)]:
            answer = worker.ask(case)
            if answer is None:
                code = worker.close()
                kind = "hang" if code is None else "crash"
                answer = str(case), Outcome(kind, f"exit code {code}", 0.0, 0)
                worker = _Worker(name, seed)
            yield case, *answer
    finally:
        worker.close()


def _row(name: str, config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(counts and extremes of a format, the files that came to what may not be)."""
    counts, errors, faults = collections.Counter(), collections.Counter(), []
    seconds = growth = 0.0
    for case, what, outcome in try_format(name, config.mutants, config.seed):
        counts[outcome.kind] += 1
        if outcome.kind == "clear error":
            errors[outcome.detail.partition(":")[0]] += 1
        seconds, growth = max(seconds, outcome.seconds), max(growth, outcome.growth)
        if outcome.kind in BAD:
            faults.append({"format": name, "case": case, "damage": what, "outcome": outcome.kind, "detail": outcome.detail})
    row = {"format": name, "files": counts.total(), **{kind: counts[kind] for kind in GOOD + BAD}}
    return row | {"longest_seconds": seconds, "most_growth_bytes": int(growth), "errors": dict(errors)}, faults


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json, with a row for each format and every fault, and the table as outside_files.md."""
    from rich.progress import track

    names = config.formats or tuple(FORMATS)
    with concurrent.futures.ThreadPoolExecutor(config.processes) as pool:
        found = list(track(pool.map(lambda name: _row(name, config), names), "trying", len(names)))
    rows = [row for row, _ in found]
    figures = {"rows": rows, "faults": [fault for _, faults in found for fault in faults]}
    for kind in GOOD + BAD:
        figures[re.sub("[, ]+", "_", kind)] = sum(row[kind] for row in rows)
    (workdir / "outside_files.md").write_text(_markdown(rows))
    write_results(workdir, figures, config)


def _markdown(rows: list[Mapping[str, Any]]) -> str:
    columns = ["files", *GOOD, *BAD]
    heads = ["format", *columns, "longest, s", "growth, MB"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        counts = " | ".join(f"{row[column]:,}" for column in columns)
        lines.append(f"| {row['format']} | {counts} | {row['longest_seconds']:.1f} | {row['most_growth_bytes'] / 1e6:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    _serve()
