"""The campaign: the run that nothing happens to, the one that everything happens to, and whether they end alike."""

import collections
import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

from etils import epath

from experiments.benchmarks.faults import processes, victim
from experiments.results import write_results
from lfm_jax.sharding.peers import EXIT_PEER
from lfm_jax.training.goodput import read_seconds, table
from lfm_jax.training.metrics import is_of_the_machine, read_metrics
from lfm_jax.training.progress import LoopProgress
from lfm_jax.training.stopping import EXIT_INTERRUPTED

# What the codes of (the process at fault, the other) may be, and a word that the log of the other, or the next run's, has.
_KILLED, _FAILED, _AGAIN, _PEER = -9, 1, EXIT_INTERRUPTED, EXIT_PEER
_EXPECTED: dict[str, tuple[set[int], set[int], str]] = {
    "kill": ({_KILLED}, {_PEER}, "process"),
    "freeze": ({_KILLED, _PEER}, {_PEER}, "process"),
    "sigterm": ({_AGAIN}, {_AGAIN}, "stopped after step"),
    "sigint": ({_AGAIN}, {_AGAIN}, "stopped after step"),
    "stuck": ({_PEER}, {_PEER}, "process"),
    "raise": ({_FAILED}, {_FAILED}, "the server of the data went away"),
    "slow data": ({_AGAIN}, {_AGAIN}, "is slow: its data takes"),
    "disk full": ({_FAILED}, {_FAILED}, "No space left on device"),
    "permission lost": ({_FAILED}, {_FAILED}, "Permission denied"),
    "kill before commit": ({_KILLED}, {_PEER}, "process"),
    "stuck in commit": ({_PEER}, {_PEER}, "process"),
    "torn write": ({_KILLED}, {_PEER}, "is damaged and not used"),
    "lost write": ({_KILLED}, {_PEER}, "is damaged and not used"),
    "flipped bit on disk": ({_KILLED}, {_PEER}, "is damaged and not used"),
    "truncated file": ({_KILLED}, {_PEER}, "is damaged and not used"),
    "flipped bit in memory": ({_FAILED}, {_FAILED}, "devices that should hold the same do not"),
    "torn metrics": ({_KILLED}, {_PEER}, "process"),
    "file too large": ({_FAILED}, {_FAILED}, "File too large"),
    "corrupted shard": ({_FAILED, 2}, {_FAILED, 2}, ".array_record"),
}
# Of what only process 0 does.
_OF_THE_FIRST = ("file too large", "torn metrics")
# There before the run is.
_FROM_THE_START = ("corrupted shard",)
# Found by the run that comes after.
_LATER = tuple(victim.AFTER_COMMIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """faults: how many; kinds: of `victim.KINDS`, none is all. seed: of what strikes whom, when and how.

    silent, stay: seconds that a process may not be heard of, and stay in one phase. checkpoint_every: steps.
    patience: seconds after which a run counts as hung.
    """

    faults: int = 200
    kinds: tuple[str, ...] = ()
    seed: int = 0
    silent: float = 5.0
    stay: float = 8.0
    checkpoint_every: int = 5
    patience: float = 240.0

    def __post_init__(self):
        unknown = [kind for kind in self.kinds if kind not in victim.KINDS]
        if unknown:
            raise ValueError(f"kinds has {unknown[0]!r}; known are {', '.join(victim.KINDS)}")
        if self.faults < 1:
            raise ValueError(f"faults must be at least 1, got {self.faults}")

    @property
    def steps(self) -> int:
        """Of the run: more than the faults can carry it to."""
        return 2 * self.checkpoint_every * self.faults + 20

    def plan(self) -> list[str]:
        """The kinds in the order in which they strike, each as often as the others."""
        kinds = self.kinds or victim.KINDS
        order = [kinds[index % len(kinds)] for index in range(self.faults)]
        random.Random(self.seed).shuffle(order)
        return order


def main(config: Config, workdir: epath.Path) -> None:
    """Runs it, and goes on where it was interrupted: each fault is a line of faults.jsonl."""
    folder = Path(workdir)
    _write_text(folder / "text", config.seed)
    calm = _run(config, folder, "calm", _fault("none", 0, -1, 0, config))
    if any(calm.codes):
        log = next(log for code, log in zip(calm.codes, calm.logs, strict=True) if code)
        raise RuntimeError(f"the run without a fault ended with {calm.codes}: {log[-3000:]}")
    rows = _strike(config, folder)
    last = _run(config, folder, "hurt", _fault("none", 0, -1, 0, config))
    _look_back(rows, last)
    differences = [] if not any(last.codes) else [f"the last run ended with {last.codes}"]
    differences += differences_between(folder / "calm", folder / "hurt")
    # On busy cores a step may take longer than `stay`: then the watch ends a run before its fault has struck.
    struck = [row for row in rows if row["seconds"] is not None or row["kind"] in _FROM_THE_START]
    write_results(
        workdir,
        {
            "faults": len(struck), "ended_before_the_fault": len(rows) - len(struck),
            "kinds": len({row["kind"] for row in struck}), "identical": not differences,
            "differences": differences, "steps": config.steps, "hung": sum(row["overdue"] for row in rows),
            "unexpected_exit_codes": sum(not row["expected_codes"] for row in struck),
            "untold": sum(not row["told"] for row in struck), "by_kind": _by_kind(struck),
            "goodput": table(read_seconds(folder / "hurt")),
        },
        config,
    )  # fmt: skip


def _strike(config: Config, folder: Path) -> list[dict[str, Any]]:
    """One fault after the other, and what became of each."""
    record = folder / "faults.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    with LoopProgress("faults", config.faults, len(rows)) as progress:
        for index, kind in enumerate(config.plan()[len(rows) :], start=len(rows)):
            chosen = random.Random(f"{config.seed} {index}")
            at_commit = kind in victim.IN_COMMIT or kind in victim.AFTER_COMMIT
            process = 0 if at_commit or kind in _OF_THE_FIRST else chosen.randrange(processes.COUNT)
            newest = max(_steps(folder / "hurt"), default=0)
            step = newest + 1 + chosen.randrange(2 * config.checkpoint_every - 1)
            with _corrupted(folder / "hurt", kind, chosen):
                ended = _run(config, folder, "hurt", _fault(kind, process, step, chosen.randrange(1 << 30), config))
            after = max(_steps(folder / "hurt"), default=0)
            _look_back(rows, ended)
            guilty, others, word = _EXPECTED[kind]
            rows.append({
                "kind": kind, "process": process, "step": step, "codes": ended.codes, "seconds": ended.seconds,
                "seconds_to_word": ended.seconds_to_word, "overdue": ended.overdue,
                "newest_before": newest, "newest_after": after,
                "expected_codes": ended.codes[process] in guilty and ended.codes[1 - process] in others,
                "told": kind not in _LATER and _names(ended.logs, kind, process, word),
            })  # fmt: skip
            record.write_text("".join(json.dumps(row) + "\n" for row in rows))
            progress.update(index + 1, f"{kind} on {process} at {step}: {ended.codes}, {ended.seconds or 0:.1f} s")
    return rows


def _look_back(rows: list[dict[str, Any]], ended: processes.Ended) -> None:
    """What was done to a checkpoint, the next run that restores one tells."""
    for row in rows:
        if row["kind"] in _LATER and not row["told"]:
            word = f"{row['newest_after']:08d} {_EXPECTED[row['kind']][2]}"
            row["told"] = any(word in log for log in ended.logs)


def _names(logs: list[str], kind: str, process: int, word: str) -> bool:
    """Whether a person who reads the logs of the run learns what happened, and of a process at fault, which."""
    if word == "process":
        lines = [line for log in logs for line in log.splitlines() if line.startswith("run.py:")]
        return any(f"process {process} {where}" in line for line in lines for where in ("on", "at"))
    return any(word in log for log in logs)


def _fault(kind: str, process: int, step: int, seed: int, config: Config) -> dict[str, Any]:
    nan_steps = [7, 23, *range(101, config.steps, 100)]
    return {"kind": kind, "process": process, "step": step, "seed": seed, "nan_steps": nan_steps}


def _run(config: Config, folder: Path, name: str, fault: dict[str, Any]) -> processes.Ended:
    """The same command each time. A width that two does not divide leaves norms whole: there are copies to compare."""
    settings = {
        "data.source": folder / "text", "data.held_out_share": 0.25, "tokenizer.vocab_size": 320, "model.vocab_size": 320,
        "model.embed_dim": 33, "model.mlp_dim": 64, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16,
        "model.layer_types": "conv,full_attention", "loader.seq_len": 32, "loader.batch_size": 4, "export": None,
        "mesh.data": 2, "mesh.fsdp": 1, "evaluation_batches": 1,
        "optimizer.schedule.warmup_steps": 4, "train.steps": config.steps, "train.log_every": 1,
        "train.checkpoint_every": config.checkpoint_every, "train.evaluate_every": config.steps,
        "train.compare_replicas_every": 2, "train.trouble.non_finite": "skip", "train.watch.silent": config.silent,
        "train.watch.data": config.stay, "train.watch.step": config.stay, "train.watch.save": config.stay,
    }  # fmt: skip
    arguments = [f"--config.{field}={value}" for field, value in settings.items()]
    command = ["--config=configs/pretrain.py:nano", f"--workdir={folder / name}", *arguments]
    # A run without faults may take as long as it does.
    patience = config.patience if fault["kind"] != "none" else config.patience + config.steps
    return processes.run_together(command, fault, folder, patience)


def _corrupted(run: Path, kind: str, chosen: random.Random):
    """While it lasts, a file of tokens has some wrong bytes, if that is the fault."""
    return _Corrupted(sorted(run.glob("tokens/train/*.array_record")) if kind in _FROM_THE_START else [], chosen)


class _Corrupted:
    def __init__(self, files: list[Path], chosen: random.Random):
        self._file = chosen.choice(files) if files else None
        self._chosen = chosen

    def __enter__(self):
        if self._file is not None:
            self._content = self._file.read_bytes()
            damaged = bytearray(self._content)
            for _ in range(8):
                damaged[self._chosen.randrange(len(damaged))] ^= 0xFF
            self._file.write_bytes(damaged)

    def __exit__(self, *error):
        if self._file is not None:
            self._file.write_bytes(self._content)


def _steps(run: Path) -> list[int]:
    return [int(path.parent.name) for path in run.glob("checkpoints/*/manifest.json")]


def differences_between(one: Path, other: Path) -> list[str]:
    """In what two runs that have ended differ: the last checkpoint, to the bit, and every figure that was logged."""
    last = lambda run: run / "checkpoints" / f"{max(_steps(run)):08d}" / "manifest.json"
    calm, hurt = (json.loads(last(run).read_text()) for run in (one, other))
    parts = ("step", "leaves", "data_state", "loop_state")
    found = [f"{part} of the last checkpoint" for part in parts if calm[part] != hurt[part]]
    comparable = lambda record: {name: value for name, value in record.items() if not is_of_the_machine(name)}
    records = [[comparable(record) for record in read_metrics(run)] for run in (one, other)]
    if len(records[0]) != len(records[1]):
        found.append(f"{len(records[0])} records of metrics in place of {len(records[1])}")
    found += [f"metrics of step {a['step']}" for a, b in zip(*records, strict=False) if a != b][:5]
    return found


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    grouped = collections.defaultdict(list)
    for row in rows:
        grouped[row["kind"]].append(row)
    table = []
    for kind, of_kind in sorted(grouped.items()):
        seconds, words = ([row[name] for row in of_kind if row[name] is not None] for name in ("seconds", "seconds_to_word"))
        table.append({
            "kind": kind, "times": len(of_kind),
            "seconds_median": statistics.median(seconds) if seconds else None, "seconds_most": max(seconds, default=None),
            "seconds_to_word_most": max(words, default=None),
            "told": sum(row["told"] for row in of_kind), "expected_codes": sum(row["expected_codes"] for row in of_kind),
            "hung": sum(row["overdue"] for row in of_kind),
        })  # fmt: skip
    return table


def _write_text(folder: Path, seed: int) -> None:
    """Some files of made-up sentences."""
    if folder.exists():
        return
    words = ["".join(random.Random(f"{seed} {index}").choices("abcdefghijklmnop", k=2 + index % 6)) for index in range(400)]
    chosen = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(16):
        sentences = (" ".join(chosen.choices(words, k=chosen.randrange(4, 12))) + "." for _ in range(400))
        (folder / f"{number:02d}.txt").write_text("\n".join(sentences) + "\n")
