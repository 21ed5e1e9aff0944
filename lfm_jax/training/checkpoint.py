"""Checkpoints that are verified: Orbax writes and reads the arrays, a manifest of ours says what they must be.

A step is a folder, named by its number in eight digits:

    00000100/state/          Orbax's own folder: a flat dict of arrays, path to array
    00000100/manifest.json   step; shape, dtype and fingerprint of every leaf; data and loop state, config, score, versions; sizes
                             and digests of Orbax's files; a digest of all that
    00000100/verified        where configs/scrub.py has read it back

The manifest is written last, under another name first, so a folder without it is no checkpoint. It is needed because Orbax gives
back data with a flipped bit without a word, casts a wrong dtype silently, takes any folder with a number for a step, and does not
fall back to an older one when the newest is damaged (measured with version 0.12.8).
"""

import asyncio
import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import platform
import re
import threading
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp

from lfm_jax.configuration import ConfigError
from lfm_jax.provenance import commit
from lfm_jax.training import checkpoint_manifest
from lfm_jax.training.checkpoint_manifest import MANIFEST, STATE, Unreachable, short
from lfm_jax.training.fingerprint import fingerprints, finish_fingerprints, leaf_paths, start_fingerprints

_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "numpy")
# Process 0 writes its small files meanwhile; Orbax waits as long for the large ones.
_MEET_SECONDS = 1200
# Arrays that `verify` reads at a time.
_PART_BYTES = 1 << 30
# Barriers between processes need names that never come twice.
_SAVES = itertools.count()


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those there could be read."""


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged or unfinished and was not used, or an old one could not be removed."""


class Restored(NamedTuple):
    """A verified checkpoint. data_state, loop_state and config are what `save` was given, as JSON has it (tuples as lists)."""

    step: int
    state: Any
    data_state: dict[str, Any]
    loop_state: dict[str, Any]
    config: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder. Only `save` and `discard` change steps there, so others may read while a run writes.

    On several processes, which must all see the folder, each of them makes every call.

    Used as a context manager, it waits at the end of the block for the save in flight, also if an exception leaves the block; a
    process that ends without waiting loses that save.

    Args:
      folder: need not exist; may be gs://.
      keep: that many of the newest steps stay, damaged ones not counted.
      keep_every: the steps that this divides stay as well. keep_best: and that many of those with the lowest score.
    The newest that was read back and found whole, by `restore` or by configs/scrub.py, stays in any case.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 3, keep_every: int | None = None, keep_best: int = 0):
        for name, value in {"keep": keep, "keep_every": keep_every}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if keep_best < 0:
            raise ValueError(f"keep_best must not be negative, got {keep_best}")
        folder = epath.Path(folder)
        self._folder = folder if folder.is_absolute() else folder.resolve()  # Orbax takes no other; gs:// is absolute as it is
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self._damaged: set[int] = set()
        self._verified: set[int] = set()
        self._scores: dict[int, float | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(f"and besides: {failure}")

    def steps(self) -> list[int]:
        """The committed steps, in ascending order; whether they are undamaged only `restore` can tell. Raises CheckpointError."""
        with _looking_through(self._folder):
            return [step for step in self._numbered() if (self._step(step) / MANIFEST).exists()]

    def unfinished(self) -> list[int]:
        """Steps whose save did not come to an end, or has not yet."""
        committed = self.steps()
        return [step for step in self._numbered() if step not in committed]

    def save(
        self,
        state: Any,
        *,
        data_state: dict[str, Any],
        config: dict[str, Any],
        loop_state: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Starts writing a checkpoint and returns once the arrays may be donated or deleted. Safe it is after `wait`.

        It waits first for the save before. Once this one is committed, the steps that are not to be kept are removed.

        Args:
          state: a tree of jax.Arrays (see `start_fingerprints`) with an attribute `step`.
          data_state: JSON; where the data iterator stands. Of several processes, that of the first is stored.
          config: JSON; what whoever finds the checkpoint should know of the run.
          loop_state: JSON; what else the loop needs to go on. score: the lower, the better; None: it has none.

        Raises:
          CheckpointError: this save could not be started (a local disk has too little room for it, for one), or the one before
            has failed. The older steps are untouched.
          ValueError: the step is there already, or an argument is not as described.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps() and step not in self._damaged:
            raise ValueError(f"step {step} is in {self._folder} already; remove it there if it is to be written anew")
        leaves = leaf_paths(state)
        sums = start_fingerprints(state)
        content = {
            "step": step,
            "leaves": {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in leaves.items()},
            "data_state": data_state,
            "loop_state": loop_state or {},
            "config": config,
            "score": score,
            "versions": _versions(),
        }
        try:
            # A copy: it is written later, and the iterator goes on meanwhile.
            content = json.loads(json.dumps(content, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"data_state, loop_state, config and score must be JSON: {error}") from error
        try:
            if jax.process_index() == 0:
                self._prepare(step, sum(leaf.nbytes for leaf in leaves.values()))
            # Orbax refuses arrays without elements; the manifest says all there is to say of them.
            arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}
            with _saving():
                response = ocp.save_async(self._step(step) / STATE, arrays, overwrite=True)
        except Exception as error:
            raise self._not_written(step, error) from error
        # A daemon: when the interpreter ends, Orbax's threads end first, and waiting for them would never end.
        arguments = (response, sums, content, next(_SAVES))
        self._writer = threading.Thread(target=self._finish, args=arguments, name=f"checkpoint of step {step}", daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Returns when the save in flight, if there is one, is committed: from then on it survives whatever happens.

        Raises:
          CheckpointError: it has failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(
        self, abstract_state: Any, *, partial: bool = False, cast: bool = False, at_most: int | None = None
    ) -> Restored | None:
        """The newest checkpoint that verifies, on whatever mesh the arrays are wanted on; None if there is none at all.

        Every array is checked against its fingerprint after it was read. A damaged step is told of in a `CheckpointWarning`,
        and the next older one tried.

        Args:
          abstract_state: a tree with shapes, dtypes and shardings (`jax.ShapeDtypeStruct`, or arrays); what has no sharding
            goes to this process's first device.
          partial: the tree may lack leaves that the checkpoint has, which are not read, e.g. `{"params": ..., "buffers": ...}`.
          cast: leaves of another dtype are converted, once they are verified, to the one that is wanted.
          at_most: later steps are not looked at.

        Raises:
          ConfigError: the checkpoint is of another tree, or a leaf of another shape or dtype: that is no damage, so no older
            step is tried.
          CheckpointError: there are checkpoints, and all are damaged; or one cannot be reached (a bucket that does not answer, a
            permission that was lost), which is no damage, so no older step is tried either.
        """
        self.wait()
        wanted = {path: _placed(leaf) for path, leaf in leaf_paths(abstract_state).items()}
        committed = [step for step in self.steps() if at_most is None or step <= at_most]
        problems: dict[int, str] = {}
        for step in reversed(committed):
            manifest, leaves, problem = self._try(step, wanted, partial, cast)
            if problem is None:
                self._verified.add(step)
                self._tell_unfinished(newer_than=step)
                state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
                return Restored(step, state, manifest["data_state"], manifest.get("loop_state", {}), manifest["config"])
            problems[step] = problem
            self._damaged.add(step)
            warnings.warn(f"{self._step(step)} is damaged and not used: {problem}", CheckpointWarning, stacklevel=2)
        if problems:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be restored ({listed}). Restore the folder from a copy, or take "
                "another workdir to begin anew."
            )
        self._tell_unfinished(newer_than=-1)
        return None

    def verify(self, step: int) -> str | None:
        """What is wrong with a committed step, None if every bit is as it was saved. Reads it in parts, on one device.

        A damaged one loses its mark. Raises CheckpointError, as `restore` does, if it cannot be reached.
        """
        manifest, problem = checkpoint_manifest.read(self._step(step), step)
        problem = _agreed(self._step(step), problem or checkpoint_manifest.damaged_file(self._step(step), manifest["files"]))
        stored = manifest["leaves"] if problem is None else {}
        wanted = {path: _placed(jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])) for path, leaf in stored.items()}
        for part in _parts(wanted):
            problem = problem or _read(self._step(step), part, stored)[1]
        if problem is not None:
            (self._step(step) / checkpoint_manifest.VERIFIED).unlink(missing_ok=True)
        return problem

    def mark_verified(self, step: int) -> None:
        """Notes for whoever removes old steps that this one was found whole."""
        (self._step(step) / checkpoint_manifest.VERIFIED).write_text("every bit was read back and is as it was saved\n")

    def discard(self, newer_than: int) -> None:
        """Removes the steps after `newer_than`, which the run has gone back to, as never made."""
        self.wait()
        if jax.process_index() == 0:
            for step in self._numbered():
                if step > newer_than:
                    checkpoint_manifest.remove(self._step(step))
        _meet(f"lfm_jax_discard_{next(_SAVES)}")

    def _step(self, step: int) -> epath.Path:
        return self._folder / f"{step:08d}"

    def _numbered(self) -> list[int]:
        with _looking_through(self._folder):
            checkpoint_manifest.look_anew(self._folder)
            names = [entry.name for entry in self._folder.iterdir()] if self._folder.exists() else []
        return sorted(int(name) for name in names if re.fullmatch(r"[0-9]{8,}", name) and name == f"{int(name):08d}")

    def _prepare(self, step: int, size: int) -> None:
        """Makes room: removes what an interrupted or damaged save left of this step, and of those before the newest commit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoint_manifest.remove(self._step(step))
        self._remove_unfinished(before=max(self.steps(), default=0))
        free = checkpoint_manifest.free_bytes(self._folder)
        if free is not None and free < size:
            raise OSError(errno.ENOSPC, f"it needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free", str(self._folder))
        self._step(step).mkdir(parents=True, exist_ok=True)

    def _finish(self, response: ocp.AsyncResponse[None], sums: dict[str, jax.Array], content: dict, number: int) -> None:
        """In a thread: waits for Orbax, then commits, then removes what need not be kept."""
        step = content["step"]
        try:
            response.result()
            try:
                if jax.process_index() == 0:
                    for path, fingerprint in finish_fingerprints(sums).items():
                        content["leaves"][path]["fingerprint"] = fingerprint
                    checkpoint_manifest.commit(self._step(step), content)
                    self._damaged.discard(step)
                    self._verified.discard(step)  # an earlier one of that number, which is gone
                    self._scores[step] = content["score"]
                    self._remove_old(step)
            finally:
                _meet(f"lfm_jax_checkpoint_{number}")
            checkpoint_manifest.look_anew(self._folder)
            if not (self._step(step) / MANIFEST).exists():
                raise OSError(f"{self._step(step) / MANIFEST} is not there: process 0 did not commit it")
            self._damaged.discard(step)
        except Exception as error:
            self._failure = self._not_written(step, error)
            self._failure.__cause__ = error

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        """The error to raise; what was written so far goes, or it would keep a full disk full."""
        there = "unknown"
        with contextlib.suppress(Exception):  # most likely what went wrong in the first place; `_prepare` tries again
            committed = self.steps()
            there = ", ".join(map(str, committed)) or "none"
            if jax.process_index() == 0 and step not in committed:
                checkpoint_manifest.remove(self._step(step))
        return CheckpointError(
            f"saving the checkpoint of step {step} in {self._folder} failed: {short(error)}. Steps saved there: {there}. Once "
            "the cause is removed, the same command resumes from the newest."
        )

    def _remove_old(self, newest: int) -> None:
        """Removes, of what is older than the step just committed, all that is damaged, unfinished or not to be kept."""
        try:
            committed = self.steps()
            sound = [step for step in committed if step not in self._damaged]
            kept = {*sound[-self._keep :], *(step for step in sound if self._keep_every and step % self._keep_every == 0)}
            kept |= {*self._best(sound), *self._verified_of(sound)[-1:]}
            for step in committed:
                if step < newest and step not in kept:
                    checkpoint_manifest.remove(self._step(step))
            self._remove_unfinished(before=newest)
        except Exception as error:
            text = f"step {newest} is saved, but older ones in {self._folder} could not be removed: {short(error)}"
            warnings.warn(text, CheckpointWarning, stacklevel=1)

    def _best(self, steps: list[int]) -> list[int]:
        """Of these steps those with the lowest scores, as many as are kept."""
        if not self._keep_best:
            return []
        for step in steps:
            if step not in self._scores:
                manifest, problem = checkpoint_manifest.read(self._step(step), step)
                if isinstance(problem, Unreachable):
                    raise OSError(f"the score of step {step} is not known: {problem}")
                self._scores[step] = manifest and manifest.get("score")
        scored = [step for step in steps if self._scores[step] is not None]
        return sorted(scored, key=lambda step: self._scores[step])[: self._keep_best]

    def _verified_of(self, steps: list[int]) -> list[int]:
        return [step for step in steps if step in self._verified or (self._step(step) / checkpoint_manifest.VERIFIED).exists()]

    def _remove_unfinished(self, before: int) -> None:
        for step in self.unfinished():
            if step < before:
                checkpoint_manifest.remove(self._step(step))

    def _tell_unfinished(self, newer_than: int) -> None:
        for step in self.unfinished():
            if step > newer_than:
                text = f"{self._step(step)} is not used: it has no {MANIFEST}, so its save did not come to an end"
                warnings.warn(text, CheckpointWarning, stacklevel=3)

    def _try(
        self, step: int, wanted: dict[str, jax.ShapeDtypeStruct], partial: bool, cast: bool
    ) -> tuple[dict[str, Any] | None, dict[str, jax.Array] | None, str | None]:
        """(manifest, leaves in the order of `wanted`, what is wrong with the step if anything is)."""
        manifest, problem = checkpoint_manifest.read(self._step(step), step)
        if problem is None and jax.process_index() == 0:
            problem = checkpoint_manifest.damaged_file(self._step(step), manifest["files"])
        problem = _agreed(self._step(step), problem)
        if problem is not None:
            return None, None, problem
        stored = manifest["leaves"]
        _refuse_other_tree(stored, wanted, partial, cast, self._step(step))
        as_stored = {
            path: jax.ShapeDtypeStruct(leaf.shape, stored[path]["dtype"], sharding=leaf.sharding) for path, leaf in wanted.items()
        }
        leaves, problem = _read(self._step(step), as_stored, stored)
        if problem is not None:
            return None, None, problem
        return manifest, {path: leaf.astype(wanted[path].dtype) for path, leaf in leaves.items()}, None


def _versions() -> dict[str, str | None]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "commit": commit()}


def _saving() -> ocp.Context:
    """Weights and moments are noise: compression would take 7 % off in twice the time. Nothing here reads a sharding file.

    Directories are made before `save` returns: a thread of Orbax that waits for those that are not made, because the process is
    about to end, keeps it from ending for five minutes.
    """
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False
    return context


def _loading() -> ocp.Context:
    """Every process reads by itself: if one meets damage, the others do not wait in Orbax for it but in `_agreed`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _read(
    folder: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct], stored: dict[str, dict[str, Any]]
) -> tuple[dict[str, jax.Array] | None, str | None]:
    """(the arrays of a step in the order of `wanted`, None) if they have their fingerprints, or (None, what is wrong)."""
    leaves, problem = _load(folder / STATE, wanted)
    problem = _agreed(folder, problem)
    if problem is not None:
        return None, problem
    found = fingerprints(leaves)
    wrong = [path for path in wanted if found[path] != stored[path]["fingerprint"]]
    if wrong:
        return None, f"{wrong[0]} in {STATE}/ has not the values that were saved ({len(wrong)} of {len(wanted)} arrays)"
    return leaves, None


def _parts(wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """The same, in parts of some size."""
    part: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in wanted.items():
        part[path] = leaf
        if sum(math.prod(each.shape) * each.dtype.itemsize for each in part.values()) > _PART_BYTES:
            yield part
            part = {}
    if part:
        yield part


def _load(folder: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array] | None, str | None]:
    """(the arrays in the order of `wanted`, None), or (None, what went wrong)."""
    try:
        with _loading():
            stored = ocp.load(folder, {path: leaf for path, leaf in wanted.items() if leaf.size})
        empty = lambda leaf: jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index], dtype=leaf.dtype
        )
        return {path: stored[path] if leaf.size else empty(leaf) for path, leaf in wanted.items()}, None
    except Exception as error:  # of what kind depends on the byte that is damaged
        return None, checkpoint_manifest.problem_of(f"{STATE}/", folder, error)


def _meet(name: str) -> None:
    """A barrier of all processes that no device takes part in: they may be in the midst of a step."""
    if jax.process_count() > 1:
        # Not asyncio.run: it looks at the tasks of all threads, and this is one beside others of Orbax.
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            barrier = ocp.multihost.sync_global_processes(name, operation_id=name, timeout=_MEET_SECONDS)
            loop.run_until_complete(barrier)


def _agreed(folder: epath.Path, problem: str | None) -> str | None:
    """What is wrong for any process is wrong for all, and `CheckpointError` for all if one of them cannot reach the step."""
    kind = np.array([problem is not None, isinstance(problem, Unreachable)])
    failed, unreachable = (np.flatnonzero(which) for which in multihost_utils.process_allgather(kind).reshape(-1, 2).T)
    problem = problem or (f"process {failed[0]} cannot read it" if len(failed) else None)
    if len(unreachable):
        text = f"{folder} cannot be reached: {problem}. That is no damage, and no older step is used"
        raise CheckpointError(f"{text}; once it can be read, the same command goes on.")
    return problem


@contextlib.contextmanager
def _looking_through(folder: epath.Path) -> Iterator[None]:
    """Around what lists the steps."""
    try:
        yield
    except (NotADirectoryError, CheckpointError):
        raise
    except Exception as error:  # a bucket's client has errors of its own
        raise CheckpointError(f"{folder} cannot be read: {short(error)}. Once it can, the same command goes on.") from error


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _refuse_other_tree(
    stored: dict[str, dict[str, Any]], wanted: dict[str, jax.ShapeDtypeStruct], partial: bool, cast: bool, folder: epath.Path
) -> None:
    remedy = "It is of another model or optimizer: take the configuration it was made with, or another workdir."
    missing = [path for path in wanted if path not in stored]
    if missing:
        raise ConfigError(f"{folder} has no array {missing[0]}, which is wanted ({len(missing)} such). {remedy}")
    surplus = [path for path in stored if path not in wanted]
    if surplus and not partial:
        raise ConfigError(f"{folder} has an array {surplus[0]}, which is not wanted ({len(surplus)} such). {remedy}")
    for path, leaf in wanted.items():
        there = f"{stored[path]['dtype']} {stored[path]['shape']}"
        here = f"{leaf.dtype.name} {list(leaf.shape)}"
        if there != here and not (cast and stored[path]["shape"] == list(leaf.shape)):
            raise ConfigError(f"{path} is {there} in {folder}, and {here} is wanted. {remedy}")
