"""Damage to every file of the newest of two checkpoints: whether `restore` notices, says so, and uses the older one."""

import collections
import contextlib
import dataclasses
import io
import json
import os
import select
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments import scrub
from experiments.results import write_results

ROOT = Path(__file__).resolve().parents[2]
OLDER, NEWEST = 100, 200
DEVICES = 8
KINDS = ("flip in each file", "flip anywhere", "truncation", "zeroed block", "deletion")
# Noticed: the older step, exactly, and a warning that names the newest. Unused: nothing is read from those bytes, so the newest
# is exact and right. None of the others may happen.
GOOD = ("noticed", "unused")
BAD = ("wrong values", "unnamed", "error", "crash", "hang")
_BLOCK_BYTES = 512
_MOST_WAIT_SECONDS = 300.0  # by the clock, on a busy machine too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """flips: single bits, each file's turn after the other's; flips_anywhere: single bits, every byte of all files alike.

    truncations, zeroed_blocks: each file's turn as well. scrub_every: of so many damages one is also shown to `configs/scrub.py`.
    embed_rows: of 400 float32, the largest array. seed: of the damage.
    """

    flips: int = 1000
    flips_anywhere: int = 300
    truncations: int = 200
    zeroed_blocks: int = 100
    scrub_every: int = 10
    embed_rows: int = 800
    seed: int = 0

    def __post_init__(self):
        if self.scrub_every < 1 or self.embed_rows < 1:
            raise ValueError(f"scrub_every and embed_rows must be at least 1, got {self.scrub_every} and {self.embed_rows}")


class Damage(NamedTuple):
    """One, by kind, with the file it is in, the words for it, and what the file becomes; None: it is gone."""

    kind: str
    file: Path
    what: str
    content: bytes | None


class _State(NamedTuple):
    step: Any
    params: Any


def _values(step: int, rows: int) -> _State:
    """Random bits of several dtypes and shapes; on the host."""
    import jax.numpy as jnp

    rng = np.random.default_rng(step)
    of = lambda dtype, *shape: np.frombuffer(rng.bytes(int(np.prod(shape)) * jnp.dtype(dtype).itemsize), dtype).reshape(shape)
    params = {
        "embed": of("float32", rows, 400),
        "kernel": of(jnp.bfloat16, 64, 48),
        "norm": of("float32", 7),
        "scale": of("float32"),
        "counts": of("int32", 16, 3),
        "quantized": of("int8", 128, 40),
        "bytes": of("uint8", 24),
        "none": of("float32", 0, 4),
    }
    return _State(np.int32(step), params)


def _placed(state: _State) -> _State:
    """Sharded over all devices where their number divides the first axis."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    divides = lambda shape: bool(shape and shape[0] and shape[0] % mesh.size == 0)
    spec = lambda leaf: PartitionSpec(*["fsdp"] * divides(leaf.shape))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), state)


def _judge(run: Path, rows: int, wanted: _State) -> str:
    """What `restore` makes of the run's checkpoints."""
    import jax

    from lfm_jax.training import Checkpoints, CheckpointWarning

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        restored = Checkpoints(run / "checkpoints").restore(wanted)
    told = [str(warning.message) for warning in told if issubclass(warning.category, CheckpointWarning)]
    expected = _values(restored.step, rows)
    same = jax.tree.map(lambda leaf, value: np.asarray(leaf).tobytes() == np.asarray(value).tobytes(), restored.state, expected)
    if restored.step not in (OLDER, NEWEST) or not all(jax.tree.leaves(same)) or restored.data_state != {"at": restored.step}:
        return "wrong values"
    if restored.step == NEWEST:
        return "unused"
    return "noticed" if any(f"{NEWEST:08d}" in text and "not used" in text for text in told) else "unnamed"


def _scrubbed(run: Path, workdir: Path) -> bool:
    """Whether configs/scrub.py has nothing to say against the newest step."""
    sys.stdout, terminal = io.StringIO(), sys.stdout
    try:
        scrub.main(scrub.Config(runs=(str(run),)), epath.Path(workdir))
    except scrub.Damaged:
        pass
    finally:
        sys.stdout = terminal
    parts = json.loads((workdir / "results.json").read_text())["parts"]
    for mark in (run / "checkpoints").glob("*/verified"):
        mark.unlink()
    return {"run": str(run), "what": f"checkpoint of step {NEWEST}", "state": "whole"} in parts


def serve(run: str, rows: str) -> None:
    """The process that reads: first it writes the two steps, then it answers each line of its input with a line of JSON."""
    import jax

    from lfm_jax.training import Checkpoints

    run, rows = Path(run), int(rows)
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (OLDER, NEWEST) * (not (run / "checkpoints").exists()):
            checkpoints.save(_placed(_values(step, rows)), data_state={"at": step}, config={})
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), _placed(_values(0, rows))
    )
    (run / "scrub").mkdir(exist_ok=True)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer = {"whole": None}
        try:
            answer["outcome"] = _judge(run, rows, wanted)
            if json.loads(line):
                answer["whole"] = _scrubbed(run, run / "scrub")
        except Exception as error:
            answer |= {"outcome": "error", "text": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class _Reader:
    """The process of `serve`; a new one where the last has died."""

    def __init__(self, run: Path, rows: int):
        self._run, self._rows, self._process = run, rows, None

    def ask(self, scrub: bool) -> dict[str, Any]:
        """Its answer; {"outcome": "crash" or "hang", ...} if it gave none."""
        if self._process is None:
            self.start()
        return self._exchange(json.dumps(scrub))

    def start(self) -> None:
        code = f"from experiments.benchmarks.checkpoint_damage import serve; serve({str(self._run)!r}, {str(self._rows)!r})"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
        with open(self._run / "reader.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        answer = self._exchange(None)
        if answer != "ready":
            raise RuntimeError(f"the process that reads did not start ({answer}): {self._run / 'reader.log'} says why")

    def close(self) -> None:
        """Ends it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _exchange(self, line: str | None) -> Any:
        if line is not None:
            with contextlib.suppress(BrokenPipeError):  # it has died since its last answer, and gives none
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _MOST_WAIT_SECONDS)[0]:
            self.close()
            return {"outcome": "hang", "whole": None}
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.close()
            return {"outcome": "crash", "whole": None, "text": f"exit code {code}"}
        return json.loads(answer)


def damages(step: Path, config: Config) -> Iterator[Damage]:
    """The damage to the files of a step, kind after kind; an empty file can only be deleted."""
    rng = np.random.default_rng(config.seed)
    originals = {file: file.read_bytes() for file in sorted(step.rglob("*")) if file.is_file()}
    filled = [file for file, data in originals.items() if data]
    turns = lambda count: [filled[number % len(filled)] for number in range(count)]

    def flip(kind: str, file: Path, place: int) -> Damage:
        bit = int(rng.integers(8))
        data = bytearray(originals[file])
        data[place] ^= 1 << bit
        return Damage(kind, file, f"bit {bit} of byte {place}", bytes(data))

    for file in turns(config.flips):
        yield flip(KINDS[0], file, int(rng.integers(len(originals[file]))))
    ends = np.cumsum([len(originals[file]) for file in filled])
    for place in rng.integers(ends[-1], size=config.flips_anywhere):
        index = int(np.searchsorted(ends, place, side="right"))
        yield flip(KINDS[1], filled[index], int(place - ends[index] + len(originals[filled[index]])))
    for file in turns(config.truncations):
        size = int(rng.integers(len(originals[file])))
        yield Damage(KINDS[2], file, f"cut to {size} bytes", originals[file][:size])
    for file in turns(config.zeroed_blocks):
        data = originals[file]
        begin = int(rng.integers(len(data))) // _BLOCK_BYTES * _BLOCK_BYTES
        size = min(_BLOCK_BYTES, len(data) - begin)
        yield Damage(KINDS[3], file, f"{size} bytes from {begin} zeroed", data[:begin] + bytes(size) + data[begin + size :])
    for file in originals:
        yield Damage(KINDS[4], file, "deleted", None)


def _inflict(damage: Damage) -> None:
    if damage.content is None:
        damage.file.unlink()
    else:
        damage.file.write_bytes(damage.content)


def _counts(answers: list[tuple[Damage, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each kind of damage: how many of each outcome, and how many files were hit."""
    rows = []
    for kind in KINDS:
        of_kind = [(damage, answer) for damage, answer in answers if damage.kind == kind]
        outcomes = collections.Counter(answer["outcome"] for _, answer in of_kind)
        row = {"damage": kind, "number": len(of_kind), "files": len({damage.file for damage, _ in of_kind})}
        rows.append(row | {outcome.replace(" ", "_"): outcomes[outcome] for outcome in (*GOOD, *BAD)})
    return rows


def main(config: Config, workdir: epath.Path) -> None:
    """Writes results.json: a row for each kind of damage, every damage that was not noticed, and what scrub has overlooked."""
    from rich.progress import track

    run = Path(workdir) / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    reader, answers = _Reader(run, config.embed_rows), []
    try:
        reader.start()
        step = run / "checkpoints" / f"{NEWEST:08d}"
        for number, damage in enumerate(track(list(damages(step, config)), description="damaging")):
            original = damage.file.read_bytes()
            _inflict(damage)
            answers.append((damage, reader.ask(scrub=number % config.scrub_every == 0)))
            damage.file.write_bytes(original)
        intact = reader.ask(scrub=True)
    finally:
        reader.close()
    rows = _counts(answers)
    about = lambda damage: {"kind": damage.kind, "file": damage.file.relative_to(step).as_posix(), "what": damage.what}
    scrubbed = [(damage, answer) for damage, answer in answers if answer["whole"] is not None]
    figures = {"damages": len(answers)}
    figures |= {outcome.replace(" ", "_"): sum(row[outcome.replace(" ", "_")] for row in rows) for outcome in (*GOOD, *BAD)}
    figures |= {
        "scrubbed": len(scrubbed),
        # It must say what `restore` does: whole where the newest step is exact, and damaged where it is not.
        "scrub_differs": sum(answer["whole"] != (answer["outcome"] == "unused") for _, answer in scrubbed),
        "whole_again": intact == {"whole": True, "outcome": "unused"},
        "files": {file.relative_to(step).as_posix(): file.stat().st_size for file in sorted(step.rglob("*")) if file.is_file()},
        "rows": rows,
        "not_noticed": [{**about(damage), **answer} for damage, answer in answers if answer["outcome"] != "noticed"],
    }
    write_results(workdir, figures, config)
