"""`run.py` with one fault in it.

`python -m experiments.benchmarks.faults.victim FAULT ARGUMENTS...` does what `run.py ARGUMENTS...` does, until at one step of one
process something goes wrong. FAULT is JSON: kind (`KINDS`), process, step, seed (of what is chosen inside the fault), mark (a
file, written when it strikes), and nan_steps: steps whose batches are not numbers, fault or not.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import run
from experiments import pretrain
from lfm_jax.training import checkpoint, checkpoint_manifest, loop

_LONG = 3600.0  # seconds; whoever is stuck is ended by others
_SLOW_STEPS, _SLOW_SECONDS = 16, 1.0


class Fault:
    """One fault, and where it strikes."""

    def __init__(self, description: dict[str, Any]):
        self.kind, self.process, self.step = description["kind"], description["process"], description["step"]
        self.nan_steps = set(description["nan_steps"])
        self.random = random.Random(description["seed"])
        self._mark = Path(description["mark"])

    def strikes(self, step: int) -> bool:
        """Whether it is time, in this process; says so in the mark."""
        if jax.process_index() != self.process or step != self.step or self._mark.exists():
            return False
        self._mark.write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
        return True


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _terminate(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _stuck(fault: Fault) -> None:
    time.sleep(_LONG)


def _raise(fault: Fault) -> None:
    raise ConnectionError("the server of the data went away")


# At the beginning of a step's data.
IN_DATA: dict[str, Callable[[Fault], None]] = {
    "kill": _kill, "freeze": _stop, "sigterm": _terminate, "sigint": _interrupt, "stuck": _stuck, "raise": _raise
}  # fmt: skip


def _disk_full(fault: Fault, folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def _permission_lost(fault: Fault, folder: Path) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(folder))


def _kill_before_commit(fault: Fault, folder: Path) -> None:
    _kill(fault)


def _stuck_in_commit(fault: Fault, folder: Path) -> None:
    time.sleep(_LONG)


# In place of the commit of a checkpoint.
IN_COMMIT: dict[str, Callable[[Fault, Path], None]] = {
    "disk full": _disk_full, "permission lost": _permission_lost, "kill before commit": _kill_before_commit,
    "stuck in commit": _stuck_in_commit,
}  # fmt: skip


def _data_file(fault: Fault, folder: Path) -> Path:
    return fault.random.choice(sorted(path for path in (folder / "state").rglob("*") if path.is_file() and path.stat().st_size))


def _torn(fault: Fault, folder: Path) -> None:
    """The end of a file has not come to the disk."""
    file = _data_file(fault, folder)
    content = file.read_bytes()
    size = fault.random.randrange(len(content.rstrip(b"\0")))
    file.write_bytes(content[:size] + bytes(len(content) - size))


def _lost(fault: Fault, folder: Path) -> None:
    _data_file(fault, folder).unlink()


def _flipped(fault: Fault, folder: Path) -> None:
    file = _data_file(fault, folder)
    content = bytearray(file.read_bytes())
    content[fault.random.randrange(len(content))] ^= 1 << fault.random.randrange(8)
    file.write_bytes(content)


def _truncated(fault: Fault, folder: Path) -> None:
    file = folder / "manifest.json" if fault.random.random() < 0.3 else _data_file(fault, folder)
    content = file.read_bytes()
    file.write_bytes(content[: fault.random.randrange(len(content))])


# To a checkpoint that has been committed; then the process is killed.
AFTER_COMMIT: dict[str, Callable[[Fault, Path], None]] = {
    "torn write": _torn, "lost write": _lost, "flipped bit on disk": _flipped, "truncated file": _truncated,
}  # fmt: skip
# What else there is: for some steps; in the state; in the metrics' file; when the disk takes no more; and in the text, which is
# done by the campaign itself.
OTHERS = ("slow data", "flipped bit in memory", "torn metrics", "file too large", "corrupted shard")
KINDS = (*IN_DATA, *IN_COMMIT, *AFTER_COMMIT, *OTHERS)


class _Batches:
    """The batches of a run, with the fault among them."""

    def __init__(self, batches: Any, fault: Fault):
        self._batches, self._fault, self._slow = batches, fault, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __next__(self) -> dict[str, np.ndarray]:
        fault, step = self._fault, self._batches.get_state()["step"] + 1
        if fault.kind in IN_DATA and fault.strikes(step):
            IN_DATA[fault.kind](fault)
        if fault.kind == "slow data" and (fault.strikes(step) or self._slow):
            self._slow += 1
            time.sleep(_SLOW_SECONDS)
            if self._slow == _SLOW_STEPS:
                os.kill(os.getpid(), signal.SIGTERM)  # or it would go on to the end
        if fault.kind == "torn metrics" and fault.strikes(step):
            _tear_metrics(fault, Path(_workdir()))
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "file too large" and fault.strikes(step):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        batch = next(self._batches)
        if step in fault.nan_steps:
            batch = {**batch, "loss_mask": batch["loss_mask"] * np.float32(np.nan)}
        return batch


def _tear_metrics(fault: Fault, workdir: Path) -> None:
    """As when the power goes: what was written since the newest checkpoint may be gone, and of a line there may be a half."""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    newest = max((int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json")), default=0)
    safe = b"".join(line for line in lines if json.loads(line)["step"] <= newest)
    rest = metrics.read_bytes()[len(safe) :] or lines[-1]
    metrics.write_bytes(safe + rest[: fault.random.randrange(len(rest))])


def _workdir() -> str:
    return next(argument.partition("=")[2] for argument in sys.argv if argument.startswith("--workdir="))


def _with_a_flipped_bit(state: Any, seed: int) -> Any:
    """One bit of one device's copy of a leaf of which there are several."""
    choice = random.Random(seed)
    flat, tree = jax.tree.flatten(state.params)
    copied = [index for index, leaf in enumerate(flat) if leaf.sharding.is_fully_replicated]
    index = choice.choice(copied)
    leaf = flat[index]
    parts = [np.array(shard.data) for shard in leaf.addressable_shards]
    part = choice.choice(parts).view(np.uint32).reshape(-1)
    part[choice.randrange(part.size)] ^= np.uint32(1 << choice.randrange(32))
    devices = [shard.device for shard in leaf.addressable_shards]
    arrays = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    flat[index] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
    return state._replace(params=jax.tree.unflatten(tree, flat))


def _hurt(fault: Fault) -> None:
    """Puts the fault where it belongs, from outside: the code of the run knows nothing of it."""
    batches, commit, advance = pretrain.training_batches, checkpoint_manifest.commit, loop._Run.advance
    pretrain.training_batches = lambda *arguments, **named: _Batches(batches(*arguments, **named), fault)

    def committed(folder, content):
        if fault.kind in IN_COMMIT and content["step"] >= fault.step and fault.strikes(fault.step):
            IN_COMMIT[fault.kind](fault, Path(folder))
        commit(folder, content)
        # Of one checkpoint alone nothing is left to go back to: then a person is asked, and that is no fault to go on from.
        others = len(list(Path(folder).parent.glob(f"*/{checkpoint_manifest.MANIFEST}"))) > 1
        if fault.kind in AFTER_COMMIT and others and content["step"] >= fault.step and fault.strikes(fault.step):
            AFTER_COMMIT[fault.kind](fault, Path(folder))
            os.kill(os.getpid(), signal.SIGKILL)

    def advanced(running, *arguments):
        if fault.kind == "flipped bit in memory" and fault.strikes(running.step):
            running.state = _with_a_flipped_bit(running.state, fault.random.randrange(1 << 30))
        return advance(running, *arguments)

    checkpoint.checkpoint_manifest.commit = committed
    loop._Run.advance = advanced


if __name__ == "__main__":
    description = json.loads(sys.argv.pop(1))
    _hurt(Fault(description))
    run._process()
