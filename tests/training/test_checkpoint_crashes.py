import contextlib
import errno
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from lfm_jax.training import checkpoint, checkpoint_manifest
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning


class State(NamedTuple):
    step: jax.Array
    params: Any


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((64, 24), np.float32)


def state(step: int) -> State:
    return State(jnp.int32(step), {"kernel": jnp.array(values(step))})


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state(step), data_state={}, config={})
    checkpoints.wait()


def restore(folder: Path) -> tuple[int, list[str]]:
    """(the step that a new process would restore, which is exact, and what it is told of others)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = Checkpoints(folder).restore(jax.eval_shape(lambda: state(0)))
    assert all(issubclass(warning.category, CheckpointWarning) for warning in caught), caught
    assert int(restored.state.step) == restored.step
    assert np.array_equal(restored.state.params["kernel"], values(restored.step))
    return restored.step, [str(warning.message) for warning in caught]


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Steps 100 and 200."""
    save(Checkpoints(tmp_path / "checkpoints"), 100, 200)
    return tmp_path / "checkpoints"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_keep_n_never_deletes_last(folder, monkeypatch):
    """Not before the new one is committed, nor if it never is."""
    checkpoints = Checkpoints(folder, keep=1)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_manifest, "commit", full_disk)
        checkpoints.save(state(300), data_state={}, config={})
        with pytest.raises(CheckpointError, match=r"step 300 in .* failed: OSError: .*No space left .* saved there: 100, 200\."):
            checkpoints.wait()
    assert checkpoints.steps() == [100, 200] and not (folder / "00000300").exists()
    save(checkpoints, 300)
    assert checkpoints.steps() == [300]
    assert restore(folder) == (300, [])


def test_async_save_error_is_fatal(folder):
    """A disk that takes no more (here: files may not grow beyond 1 MB) is told by the next call, and costs no older step."""
    checkpoints = Checkpoints(folder)
    big = jax.device_put(np.zeros((1024, 1024), np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        checkpoints.save(State(jnp.int32(300), {"big": big}), data_state={}, config={})
        checkpoints._writer.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with pytest.raises(
        CheckpointError, match=r"step 300 in .* failed: .*File too large.* saved there: 100, 200\. Once the cause"
    ):
        save(checkpoints, 400)
    assert not (folder / "00000300").exists() and restore(folder) == (200, [])
    save(checkpoints, 400)
    assert restore(folder) == (400, [])


def test_a_save_that_cannot_start_says_so(folder):
    (folder / "00000300").write_text("a file where the folder should be")
    checkpoints = Checkpoints(folder)
    with pytest.raises(CheckpointError, match=r"step 300 in .* failed: NotADirectoryError: .* saved there: 100, 200\."):
        save(checkpoints, 300)
    assert restore(folder)[0] == 200
    with pytest.raises(NotADirectoryError, match="00000300"):
        save(Checkpoints(folder / "00000300"), 1)


def test_what_cannot_be_removed_is_told_and_the_run_goes_on(folder, monkeypatch):
    checkpoints = Checkpoints(folder, keep=1)
    told = []
    monkeypatch.setattr(checkpoint.warnings, "warn", lambda text, category, **_: told.append((text, category)))
    remove = checkpoint_manifest.remove

    def read_only(path):
        if path.name == "00000100":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path)

    monkeypatch.setattr(checkpoint_manifest, "remove", read_only)
    save(checkpoints, 300)
    ((text, category),) = told
    assert category is CheckpointWarning
    assert text.startswith("step 300 is saved, but older ones") and "Permission denied" in text
    assert 300 in checkpoints.steps()


def test_a_block_waits_at_its_end(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), data_state={}, config={})
    assert (tmp_path / "00000001" / "manifest.json").exists()

    monkeypatch.setattr(checkpoint_manifest, "commit", full_disk)
    with pytest.raises(CheckpointError, match="step 2 in"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(2), data_state={}, config={})
    with pytest.raises(KeyError, match="the run's own error") as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(2), data_state={}, config={})
        raise KeyError("the run's own error")
    assert "and besides: saving the checkpoint of step 2" in caught.value.__notes__[0]


class FileOperations:
    """Python's audit events of files below a folder; a hook cannot be taken away, so there is one, which mostly does nothing."""

    EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.link", "os.listdir"}

    def __init__(self):
        self.folder, self.then, self.lock, self.busy = None, None, threading.Lock(), threading.local()
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.folder is None or event not in self.EVENTS or getattr(self.busy, "now", False):
            return
        if str(arguments[0]).startswith(str(self.folder)):
            self.busy.now = True
            with self.lock:
                self.then()
            self.busy.now = False

    @contextlib.contextmanager
    def each(self, folder, then):
        self.folder, self.then = folder, then
        yield
        self.folder = None


OPERATIONS = FileOperations()


def copy_as_it_is(folder: Path, target: Path) -> None:
    """Files may come and go meanwhile."""
    target.mkdir()
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                (target / path.relative_to(folder)).mkdir(parents=True, exist_ok=True)
            else:
                (target / path.relative_to(folder)).write_bytes(path.read_bytes())


def test_kill_at_every_file_operation_leaves_complete_checkpoint(tmp_path):
    """What lies on the disk before each file operation of saves and removals is what a kill there would leave."""
    live, moments = tmp_path / "live", []
    checkpoints = Checkpoints(live, keep=1)
    save(checkpoints, 1)
    seen = set()

    def snapshot():
        listing = tuple((str(path), path.stat().st_size) for path in files(live) if path.exists())
        if listing not in seen:
            seen.add(listing)
            moments.append(tmp_path / f"moment{len(moments)}")
            copy_as_it_is(live, moments[-1])

    with OPERATIONS.each(live, snapshot):
        save(checkpoints, 2, 3)
    used = []
    for moment in moments:
        step, told = restore(moment)
        assert not any("damaged" in text for text in told), (told, files(moment))
        used.append(step)
        for whole in map(epath.Path(moment).joinpath, (f"{step:08d}" for step in Checkpoints(moment).steps())):
            manifest, problem = checkpoint_manifest.read(whole, int(whole.name))
            assert problem is None and checkpoint_manifest.damaged_file(whole, manifest["files"]) is None
    assert used == sorted(used) and set(used) == {1, 2, 3} and len(used) > 20
    for moment in moments[:: len(moments) // 5]:
        save(Checkpoints(moment), 4)
        assert restore(moment) == (4, [])


KILLED = """
import os, sys, jax, jax.numpy as jnp, numpy as np
from typing import Any, NamedTuple
from lfm_jax.training import checkpoint, checkpoint_manifest

class State(NamedTuple):
    step: Any
    params: Any

folder, moment = sys.argv[1:]
checkpoints = checkpoint.Checkpoints(folder)
for step in (1, 2):
    kernel = jnp.array(np.random.default_rng(step).standard_normal((64, 24), np.float32))
    if step == 2 and moment == "manifest written":
        part = checkpoint_manifest._PART
        checkpoint_manifest._flush = lambda folder, deep=True: os._exit(9) if (folder / part).exists() else None
    checkpoints.save(State(jnp.int32(step), {"kernel": kernel}), data_state={}, config={})
    if step == 2 and moment == "save returned":
        os._exit(9)
    if step == 2 and moment == "an error":
        raise SystemExit(9)
    checkpoints.wait()
"""


def test_a_killed_process_leaves_the_step_before(tmp_path):
    """Right after `save` returned; when the manifest is written and not yet in its place; and one that ends without waiting."""
    folders = [tmp_path / "save returned", tmp_path / "manifest written", tmp_path / "an error"]
    killed = [subprocess.Popen([sys.executable, "-c", KILLED, folder, folder.name], cwd=ROOT) for folder in folders]
    codes = [process.wait() for process in killed]
    # The library's threads that still write when Python has ended may abort the last one; what counts is on the disk.
    assert codes[:2] == [9, 9] and codes[2] in (9, -signal.SIGABRT)
    for folder in folders:
        step, told = restore(folder)
        assert step == 1
        unfinished = folder / "00000002"
        # A process that ends by itself may live long enough to see its save fail, and to remove all that there is of it.
        assert unfinished.exists() or folder.name == "an error"
        expected = [f"{unfinished} is not used: it has no manifest.json, so its save did not come to an end"]
        assert told == expected * unfinished.exists()
        save(Checkpoints(folder), 2)
        assert restore(folder) == (2, [])


TWO_PROCESSES = """
import os, sys, warnings, jax, numpy as np
from pathlib import Path
from typing import Any, NamedTuple
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from lfm_jax.training import checkpoint, checkpoint_manifest
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints

sys.path.append("tests/training")
from manifests import as_before

process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=30)

def end(kind, error, traceback):
    sys.__excepthook__(kind, error, traceback)
    sys.stderr.flush()
    os._exit(1)  # the usual end waits five minutes for the other process

sys.excepthook = end

class State(NamedTuple):
    step: Any
    params: Any

mesh = jax.make_mesh((16,), ("fsdp",))
kernel = lambda step: np.random.default_rng(step).standard_normal((512, 1024), np.float32)
place = lambda array, *spec: jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: array[index]
)
state = lambda step: State(place(np.array(step, np.int32)), place(kernel(step), "fsdp"))
wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))

def restored():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Checkpoints(folder).restore(wanted)
    for shard in found.state.params.addressable_shards:
        assert np.array_equal(shard.data, kernel(found.step)[shard.index])
    return found.step, [str(warning.message).partition("used: ")[2] for warning in told]

checkpoints = Checkpoints(folder, keep=3)
for step in (1, 2, 3, 4):
    checkpoints.save(state(step), data_state={}, config={})
checkpoints.wait()
assert checkpoints.steps() == [2, 3, 4] and restored() == (4, [])

def full_disk(*_):
    raise OSError("No space left on device")

commit, checkpoint_manifest.commit = checkpoint_manifest.commit, full_disk
checkpoints.save(state(5), data_state={}, config={})
try:
    checkpoints.wait()
except CheckpointError as error:
    assert ("No space left" if process == 0 else "process 0 did not commit it") in str(error), error
else:
    raise AssertionError("the failed save went unseen")
multihost_utils.sync_global_devices("failed")

if process == 0:
    (file,) = (f for f in folder.glob("00000004/state/state/ocdbt.process_1/d/*") if f.stat().st_size > 1 << 20)
    data = bytearray(file.read_bytes())
    data[data.index(kernel(4)[500].tobytes())] ^= 1
    file.write_bytes(data)
multihost_utils.sync_global_devices("damaged")
(told,) = restored()[1]
assert "crc32 does not fit" in told if process == 0 else told == "process 0 cannot read it", told
if process == 0:
    as_before(folder / "00000004")
multihost_utils.sync_global_devices("as before")
assert restored() == (3, ["params in state/ has not the values that were saved (1 of 2 arrays)"])

if process == 1:
    load = checkpoint._load
    checkpoint._load = lambda path, leaves: (None, "lost") if "00000003" in str(path) else load(path, leaves)
step, told = restored()
assert step == 2 and told[1] == ("process 1 cannot read it" if process == 0 else "lost"), (step, told)
print("all held")
"""


def test_two_processes_write_one_checkpoint_and_agree_on_what_is_damaged(tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(process), str(port), tmp_path / "checkpoints"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate()
            assert process.returncode == 0 and "all held" in output, output
    finally:
        for process in processes:
            process.kill()
