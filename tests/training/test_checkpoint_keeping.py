import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from manifests import as_before

from lfm_jax.training import checkpoint, checkpoint_manifest
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning

KERNEL = (600, 500)  # large enough that the manifest has no digest of the file it is in


class State(NamedTuple):
    step: jax.Array
    params: Any


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(KERNEL, np.float32)


def state(step: int) -> State:
    return State(jnp.int32(step), {"kernel": jnp.array(values(step)), "count": jnp.arange(step)})


def wanted(step: int) -> State:
    return jax.eval_shape(lambda: state(step))


def save(checkpoints: Checkpoints, scores: dict[int, float | None]) -> None:
    for step, score in scores.items():
        checkpoints.save(state(step), data_state={}, config={}, score=score)
        checkpoints.wait()


def flip(step: Path) -> None:
    """Changes a stored value of the kernel."""
    piece = values(int(step.name))[0, 5:13].tobytes()
    (file,) = (file for file in (step / "state").rglob("*") if file.is_file() and piece in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(piece) + 5] ^= 16
    file.write_bytes(data)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
    save(Checkpoints(folder), {1: None, 2: None})
    return folder


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    """A copy of its own, with steps 1 and 2."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_the_best_stay_and_one_without_a_score_is_none_of_them(tmp_path):
    save(Checkpoints(tmp_path, keep=1, keep_best=2), {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: 5.0})
    assert Checkpoints(tmp_path).steps() == [2, 4, 5]
    # Another process knows the scores from the manifests.
    save(Checkpoints(tmp_path, keep=1, keep_best=2), {6: -0.5, 7: None})
    assert Checkpoints(tmp_path).steps() == [2, 6, 7]
    save(Checkpoints(tmp_path, keep=2), {8: 9.0})
    assert Checkpoints(tmp_path).steps() == [7, 8]


def test_a_score_that_cannot_be_read_now_costs_no_step(folder, monkeypatch):
    checkpoints, read = Checkpoints(folder, keep=1, keep_best=1), checkpoint_manifest.read
    unreachable = None, checkpoint_manifest.Unreachable("manifest.json cannot be read: OSError: 503")
    monkeypatch.setattr(checkpoint_manifest, "read", lambda path, step: unreachable if step == 1 else read(path, step))
    told = []
    monkeypatch.setattr(checkpoint.warnings, "warn", lambda text, category, **_: told.append(text))
    save(checkpoints, {3: 1.0})
    assert checkpoints.steps() == [1, 2, 3]
    assert len(told) == 1 and "the score of step 1 is not known: manifest.json cannot be read: OSError: 503" in told[0]


def test_keep_best_must_not_be_negative(tmp_path):
    with pytest.raises(ValueError, match="keep_best must not be negative, got -1"):
        Checkpoints(tmp_path, keep_best=-1)


def test_a_score_is_a_number(tmp_path):
    with pytest.raises(ValueError, match="data_state, loop_state, config and score must be JSON"):
        save(Checkpoints(tmp_path), {1: float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_loop_state_is_that_of_the_call(tmp_path):
    checkpoints, loop_state = Checkpoints(tmp_path), {"skipped": [3], "best": None}
    checkpoints.save(state(1), data_state={}, config={}, loop_state=loop_state)
    loop_state["skipped"].append(4)
    save(checkpoints, {2: None})
    assert checkpoints.restore(wanted(1), at_most=1).loop_state == {"skipped": [3], "best": None}
    assert checkpoints.restore(wanted(2)).loop_state == {}


def test_leaves_are_cast_after_they_were_verified(folder):
    other = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf
    restored = Checkpoints(folder).restore(jax.tree.map(other, wanted(2)), cast=True)
    kernel = restored.state.params["kernel"]
    assert kernel.dtype == jnp.bfloat16 and restored.state.step.dtype == jnp.int32
    assert np.array_equal(np.asarray(kernel), values(2).astype(jnp.bfloat16))
    flip(folder / "00000002")  # by less than what the cast leaves
    as_before(folder / "00000002")
    with pytest.raises(CheckpointError, match="params.kernel in state/ has not the values"), pytest.warns(CheckpointWarning):
        shutil.rmtree(folder / "00000001")
        Checkpoints(folder).restore(jax.tree.map(other, wanted(2)), cast=True)


def test_a_cast_is_of_the_dtype_alone(folder):
    shape = State(jnp.int32(0), {"kernel": jax.ShapeDtypeStruct((500, 600), jnp.bfloat16), "count": jnp.arange(2)})
    with pytest.raises(ValueError, match=r"params.kernel is float32 \[600, 500\] in .*, and bfloat16 \[500, 600\] is wanted"):
        Checkpoints(folder).restore(shape, cast=True)


def test_later_steps_are_not_looked_at(folder):
    (folder / "00000002" / "manifest.json").write_text("damaged")
    restored = Checkpoints(folder).restore(wanted(1), at_most=1)  # a warning would be an error
    assert restored.step == 1 and np.array_equal(restored.state.params["kernel"], values(1))
    assert Checkpoints(folder).restore(wanted(1), at_most=0) is None


def test_verify_says_what_restore_does(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    assert checkpoints.verify(1) is None and checkpoints.verify(2) is None
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 1)
    assert checkpoints.verify(2) is None
    flip(folder / "00000002")
    assert checkpoints.verify(2).endswith("is not as it was written: its crc32 does not fit")
    as_before(folder / "00000002")
    assert checkpoints.verify(2) == "params.kernel in state/ has not the values that were saved (1 of 1 arrays)"
    (folder / "00000002" / "state" / "_CHECKPOINT_METADATA").write_text("{}")
    assert "state/_CHECKPOINT_METADATA has 2 bytes" in checkpoints.verify(2)
    (folder / "00000002" / "manifest.json").write_text("{}")
    assert "manifest.json cannot be read: KeyError" in checkpoints.verify(2)
    assert checkpoints.verify(1) is None and checkpoints.steps() == [1, 2]


def test_large_states_are_verified_in_parts(two_steps, monkeypatch):
    of = lambda count: jax.ShapeDtypeStruct((count,), jnp.float32)
    monkeypatch.setattr(checkpoint, "_PART_BYTES", 40)
    parts = [list(part) for part in checkpoint._parts({"a": of(4), "b": of(8), "c": of(100), "d": of(0), "e": of(1)})]
    assert parts == [["a", "b"], ["c"], ["d", "e"]]


def test_the_newest_verified_step_stays_until_a_newer_one_is_verified(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, {1: None})
    assert Checkpoints(tmp_path).verify(1) is None
    Checkpoints(tmp_path).mark_verified(1)  # by another process
    save(checkpoints, {2: None, 3: None})
    assert checkpoints.steps() == [1, 3]
    Checkpoints(tmp_path).mark_verified(3)
    save(checkpoints, {4: None, 5: None})
    assert checkpoints.steps() == [3, 5]
    assert checkpoints.restore(wanted(5)).step == 5
    save(checkpoints, {6: None, 7: None})
    assert checkpoints.steps() == [5, 7]


def test_a_mark_goes_with_the_first_damage(folder):
    """Or the damaged step would be kept for the good one."""
    for step in (1, 2):
        Checkpoints(folder).mark_verified(step)
    flip(folder / "00000002")
    assert Checkpoints(folder).verify(2) is not None
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, {3: None})
    assert checkpoints.steps() == [1, 3]


def test_what_is_discarded_was_never_made(folder):
    checkpoints = Checkpoints(folder, keep=1, keep_best=1)
    (folder / "00000003").mkdir()
    save(checkpoints, {4: 0.5, 5: 7.0})
    assert checkpoints.restore(wanted(5)).step == 5
    (folder / "00000006" / "state.tmp").mkdir(parents=True)
    (folder / "notes").write_text("mine")
    assert checkpoints.steps() == [4, 5] and checkpoints.unfinished() == [6]
    checkpoints.discard(newer_than=4)
    assert sorted(path.name for path in folder.iterdir()) == ["00000004", "notes"]
    checkpoints.discard(newer_than=0)
    assert checkpoints.steps() == checkpoints.unfinished() == []
    # The new steps have neither the scores nor the good name of those before.
    save(checkpoints, {4: 9.0, 5: 8.0, 6: 10.0})
    assert checkpoints.steps() == [5, 6]
    save(checkpoints, {7: 1.0, 8: 2.0})
    assert checkpoints.steps() == [7, 8]


def test_unfinished_steps_are_those_without_a_manifest(folder):
    assert Checkpoints(folder).unfinished() == [] == Checkpoints(folder / "none").unfinished()
    (folder / "00000002" / "manifest.json").unlink()
    (folder / "00000009").mkdir()
    (folder / "10").mkdir()
    assert Checkpoints(folder).unfinished() == [2, 9] and Checkpoints(folder).steps() == [1]


def test_too_little_room_is_told_before_anything_is_written(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    size = 4 + 4 * 600 * 500 + 4 * 3
    monkeypatch.setattr(checkpoint_manifest, "free_bytes", lambda path: size - 1)
    with pytest.raises(
        CheckpointError, match=r"step 3 in .* failed: OSError: .*it needs 0.0012 GB, and 0.0012 GB are free.* saved there: 1, 2\."
    ):
        save(checkpoints, {3: None})
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]
    monkeypatch.setattr(checkpoint_manifest, "free_bytes", lambda path: size)
    save(checkpoints, {3: None})
    assert checkpoints.steps() == [1, 2, 3]


def test_the_room_is_that_of_the_disk(tmp_path):
    disk = os.statvfs("/proc")  # which has none
    assert disk.f_bavail == 0 and checkpoint_manifest.free_bytes(epath.Path("/proc")) == 0
    assert 0 < checkpoint_manifest.free_bytes(epath.Path(tmp_path)) <= shutil.disk_usage(tmp_path).total
    assert checkpoint_manifest.free_bytes(epath.Path("gs://bucket/run")) is None


def restored(folder: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Checkpoints(folder).restore(wanted(2), at_most=2)
    assert np.array_equal(found.state.params["kernel"], values(found.step))
    return found.step


@pytest.fixture
def small_disk(tmp_path):
    """8 MB, of which two checkpoints take 2.5."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "checkpoints", disk]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_no_step(small_disk, monkeypatch):
    """Whether it is known before, or fills up meanwhile; and once there is room again, saving goes on."""
    folder = small_disk / "checkpoints"
    checkpoints = Checkpoints(folder)
    save(checkpoints, {1: None, 2: None})
    filler = small_disk / "filler"
    filler.write_bytes(bytes(checkpoint_manifest.free_bytes(epath.Path(small_disk)) - 600_000))
    with pytest.raises(CheckpointError, match=r"it needs 0.0012 GB, and 0.000\d* GB are free.* saved there: 1, 2\. Once"):
        save(checkpoints, {3: None})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manifest, "free_bytes", lambda path: None)
        with pytest.raises(CheckpointError, match=r"step 3 in .* failed: .*No space left.* saved there: 1, 2\."):
            save(checkpoints, {3: None})
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"] and restored(folder) == 2
    filler.unlink()
    save(checkpoints, {3: None})
    assert checkpoints.steps() == [1, 2, 3]


PERMISSIONS = """
import json, os, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from typing import Any, NamedTuple
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints

class State(NamedTuple):
    step: Any
    kernel: Any

folder = pathlib.Path(sys.argv[1]) / "checkpoints"
state = lambda step: State(jnp.int32(step), jnp.full((600, 500), step, jnp.float32))

def save(step):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(step), data_state={}, config={})

def restore():
    found = Checkpoints(folder).restore(jax.eval_shape(lambda: state(0)))
    assert np.array_equal(found.state.kernel, np.full((600, 500), found.step)), found
    return found.step

def error_of(call, *arguments):
    try:
        return f"no error but {call(*arguments)}"
    except CheckpointError as error:
        return str(error)

save(1)
save(2)
found, step = {}, folder / "00000002"
data = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
paths = {"manifest": step / "manifest.json", "state": step / "state", "metadata": step / "state" / "_CHECKPOINT_METADATA"}
for name, path in {"folder": folder, **paths, "data": data}.items():
    mode = path.stat().st_mode
    path.chmod(0)
    found[name] = error_of(restore)
    path.chmod(mode)
folder.chmod(0o500)
found["save"] = error_of(save, 3)
found["read_only"] = restore()
folder.chmod(0o700)
save(3)
found["again"] = restore()
print(json.dumps(found))
"""


def test_a_lost_permission_is_no_damage(tmp_path):
    """An older step would be used for the newest, and the newest be overwritten: instead the run stops, and all is there."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", PERMISSIONS, tmp_path]
    if os.geteuid() == 0:  # who may read all, but for this
        if shutil.which("setpriv") is None:
            pytest.skip("root has no setpriv to give its permissions up with")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found, checkpoints = json.loads(ended.stdout.splitlines()[-1]), f"{tmp_path}/checkpoints"
    assert found["folder"].startswith(f"{checkpoints} cannot be read: PermissionError: ")
    for name, text in {"manifest": "manifest.json", "metadata": "state/", "data": "state/", "state": "state/"}.items():
        assert found[name].startswith(f"{checkpoints}/00000002 cannot be reached: {text} cannot be read: "), found[name]
        assert found[name].endswith("no older step is used; once it can be read, the same command goes on."), found[name]
    assert "step 3 in" in found["save"] and "PermissionError" in found["save"] and "saved there: 1, 2." in found["save"]
    assert found["read_only"] == 2 and found["again"] == 3
