"""metrics.jsonl is the record, and TensorBoard's events say the same; what else takes figures may fail."""

import json
import math
import signal
import sqlite3
import struct
import subprocess
import sys
import types

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lfm_jax.training import TroubleConfig, metrics, trackers
from lfm_jax.training.metrics import MetricsError, MetricsWarning, MetricsWriter, TrackerWarning, read_metrics
from lfm_jax.training.trackers import check_trackers, open_tracker
from lfm_jax.training.trouble import Watchman


def write(workdir, start, steps, names=()):
    writer = MetricsWriter(workdir, start, names, {"seed": 3})
    for step in steps:
        writer.write(step, {"train/loss": 10.0 / step, "eval/bits_per_byte": 1.0 + step})
    writer.close()


def event_records(workdir):
    """All events; a record is its length, a checksum, the event and a checksum."""
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack("<Q", content[at : at + 8])
            yield Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16


def events(workdir):
    """(step, name) -> value of every scalar."""
    return {
        (event.step, value.tag): value.simple_value for event in event_records(workdir) for value in event.summary.value
    }  # fmt: skip


def test_a_record_has_its_step_its_time_and_its_values(tmp_path):
    write(tmp_path, 0, [1, 2])
    first, second = read_metrics(tmp_path)
    assert second.pop("time") >= first.pop("time") > 1.7e9
    assert (first, second) == (
        {"step": 1, "train/loss": 10.0, "eval/bits_per_byte": 2.0},
        {"step": 2, "train/loss": 5.0, "eval/bits_per_byte": 3.0},
    )


def test_tensorboard_says_the_same(tmp_path):
    write(tmp_path, 0, [1, 4])
    records = {
        (record["step"], name): value
        for record in read_metrics(tmp_path)
        for name, value in record.items()
        if "/" in name
    }  # fmt: skip
    found = events(tmp_path)
    assert {key: found[key] for key in records} == pytest.approx(records, rel=1e-6)


def test_a_writer_goes_on_after_its_step_and_drops_what_comes_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3, 4, 5])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_told_of_and_costs_no_other(tmp_path):
    """As a file system leaves it that lost some bytes in the middle; what comes after is read, and the run goes on."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "tra{"step": 3}\n[]\n{"step": 4}\n')
    with pytest.warns(MetricsWarning, match=r"metrics.jsonl:[23] is damaged and left out") as told:
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 4]
    assert len(told) == 2


def test_half_a_line_is_no_record_and_nothing_is_glued_to_it(tmp_path):
    write(tmp_path, 0, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, [4])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_is_told_where_a_run_goes_on(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4])
    write(tmp_path, 2, [3, 4])
    starts = [event.step for event in event_records(tmp_path) if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 3]  # it drops what it has from these steps on


_ENDLESS = """
import sys
from lfm_jax.training.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], 0)
for step in range(1, 10**9):
    writer.write(step, {"train/loss": 1 / step})
    print(step, flush=True)
"""


def test_a_killed_process_loses_no_record(tmp_path):
    with subprocess.Popen([sys.executable, "-c", _ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records][: len(told)] == told
    assert all(record["train/loss"] == 1 / record["step"] for record in records)


_FULL = """
import resource, signal, sys
from lfm_jax.training.metrics import MetricsError, MetricsWriter
writer = MetricsWriter(sys.argv[1], 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    for step in range(1, 10**4):
        writer.write(step, {"train/loss": 1 / step})
except MetricsError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(step, {"train/loss": 0.0})
writer.close()
"""


def test_a_full_disk_is_told_and_leaves_no_half_record(tmp_path):
    """The limit on a file's size stands for it: the kernel takes a part of the last record, and then none."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", _FULL, str(tmp_path)], capture_output=True, text=True)
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert ran.stderr == "" and 10 < len(steps) < 30 and steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(steps)
    assert f"metrics.jsonl: the record of step {steps[-1]} cannot be written ([Errno 27] File too large)." in ran.stdout
    assert "the same command resumes the run" in ran.stdout


def test_a_folder_that_takes_no_file_is_told(tmp_path):
    (tmp_path / ".metrics.jsonl").mkdir()
    with pytest.raises(MetricsError, match="metrics.jsonl: the record up to step 4 cannot be written .*Is a directory"):
        MetricsWriter(tmp_path, 4)


class _Bucket(MemoryFileSystem):
    """As gcsfs has it: appending is writing anew, and a file that is not closed is none. It counts what it was sent."""

    protocol, store, pseudo_dirs, cachable, sent, broken = "gs", {}, [""], False, [], False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))

    def open(self, path, mode="rb", **kwargs):
        if self.broken and mode.startswith(("a", "w")):
            raise RuntimeError("503 backend error")
        if mode.startswith(("a", "w")) and path.startswith("gs://"):  # it calls itself with what is left of the path
            self.sent.append(path)
        return super().open(path, mode.replace("a", "w"), **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    """A folder on gs://, without the network and without gcsfs; tensorboardX, which has a client of its own, is left out."""
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: _Bucket())
    monkeypatch.setattr(metrics, "TensorBoard", lambda workdir, step: types.SimpleNamespace(write=lambda *_: 0, close=lambda: 0))
    monkeypatch.setattr(_Bucket, "store", {})
    monkeypatch.setattr(_Bucket, "sent", [])
    return epath.Path("gs://bucket/run")


@pytest.fixture
def clock(monkeypatch):
    """Moves the time: clock(seconds)."""
    now = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_bucket_has_the_records_of_every_process_of_the_run(bucket, clock):
    write(bucket, 0, [1, 2, 3])
    write(bucket, 2, [3, 4])
    assert [record["step"] for record in read_metrics(bucket)] == [1, 2, 3, 4]


def test_a_bucket_is_sent_the_file_now_and_then(bucket, clock):
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 101):
        writer.write(step, {"train/loss": 1.0})
        clock(1.0)
    assert [record["step"] for record in read_metrics(bucket)] == list(range(1, 92))  # sent at 1, 31, 61 and 91
    assert len(_Bucket.sent) == 1 + 4
    writer.sync()
    assert len(read_metrics(bucket)) == 100
    writer.close()
    assert len(read_metrics(bucket)) == 100


def test_what_takes_long_is_done_for_a_hundredth_of_the_time(clock):
    pace = trackers.Pace()
    assert pace.due()
    with pace:
        clock(2.0)
    clock(197.0)
    assert not pace.due()
    clock(1.0)
    assert pace.due()


def test_a_bucket_that_fails_is_told(bucket, clock, monkeypatch):
    writer = MetricsWriter(bucket, 0)
    writer.write(1, {"train/loss": 1.0})
    monkeypatch.setattr(_Bucket, "broken", True)
    writer.write(2, {"train/loss": 1.0})
    clock(31.0)
    with pytest.raises(MetricsError, match="the record of step 3 cannot be written .503 backend error"):
        writer.write(3, {"train/loss": 1.0})
    with pytest.raises(MetricsError, match="metrics.jsonl: its end cannot be written"):
        writer.close()
    assert len(read_metrics(bucket)) == 1
    monkeypatch.setattr(_Bucket, "broken", False)
    writer.close()
    assert len(read_metrics(bucket)) == 3


def test_a_bucket_has_every_line_about_trouble(bucket):
    for start in (0, 2):  # of two processes, one after the other
        watchman = Watchman(TroubleConfig(non_finite="skip"), bucket)
        for step in (start + 1, start + 2):
            watchman.look(step, {"loss": math.nan, "gradient_norm": 1.0})
    lines = map(json.loads, (bucket / "trouble.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


class _Failing:
    """Fails in the call of the name `at`."""

    def __init__(self, at):
        self.at, self.calls = at, []
        self.called("open")

    def called(self, name):
        self.calls.append(name)
        if name == self.at:
            raise ConnectionError(f"no network to {name}")

    def write(self, step, values, now):
        self.called("write")

    def close(self):
        self.called("close")


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_tracker_that_fails_is_told_once_and_left_alone(tmp_path, monkeypatch, at):
    made = []
    opened = lambda workdir, config: made.append(failing := _Failing.__new__(_Failing)) or failing.__init__(at) or failing
    monkeypatch.setitem(trackers._TRACKERS, "wandb", opened)
    with pytest.warns(TrackerWarning, match=rf"wandb has failed \(ConnectionError: no network to {at}\)") as told:
        write(tmp_path, 0, [1, 2, 3], ["wandb"])
    assert len(told) == 1
    assert made[0].calls == {"open": ["open"], "write": ["open", "write"], "close": ["open", *["write"] * 3, "close"]}[at]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3] and len(events(tmp_path)) == 6


def test_tensorboard_may_fail_too(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where its folder would be")
    with pytest.warns(TrackerWarning, match="TensorBoard has failed"):
        write(tmp_path, 0, [1, 2])
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("wand",), "'wand' is no tracker. Did you mean 'wandb'. Valid choices: wandb, trackio"),
        (("wandb", "wandb"), "the tracker 'wandb' is named twice; name it once"),
        (("trackio",), r"the tracker 'trackio' needs the package of that name: pip install -e '.\[trackers\]' installs it"),
    ],
)
def test_a_tracker_that_could_not_be_opened_is_refused(monkeypatch, names, message):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else object())
    check_trackers(["wandb"])
    with pytest.raises(ValueError, match=message):
        check_trackers(names)


def test_wandb_without_the_network_needs_a_disk(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match="gs://bucket/run is none; set WANDB_MODE=online"):
        open_tracker("wandb", "gs://bucket/run", {})


class _Library(types.ModuleType):
    """Takes what a tracker's library is called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.calls.append((name, arguments, named)) or self


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_under_its_name(tmp_path, monkeypatch, name):
    """And no library is asked for the network."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    library = _Library(name)
    monkeypatch.setitem(sys.modules, name, library)
    write(tmp_path, 0, [1, 2], [name])
    write(tmp_path, 1, [2, 3], [name])
    opened = [named for call, _, named in library.calls if call == "init"]
    assert opened[0] == opened[1] and opened[0]["resume"] == "allow" and opened[0]["config"] == {"seed": 3}
    run_id = (tmp_path / "run_id").read_text().strip()
    assert opened[0]["name"].startswith(tmp_path.name) and len(run_id) == 8
    assert (opened[0]["id"] if name == "wandb" else opened[0]["name"].rpartition("-")[2]) == run_id
    assert opened[0].get("mode") == {"wandb": "offline", "trackio": None}[name]
    assert "space_id" not in opened[0] and "server_url" not in opened[0]
    assert [call for call, _, _ in library.calls].count("finish") == 2
    logged = [(arguments[0].get("step", named.get("step")), arguments[0]["train/loss"])
              for call, arguments, named in library.calls if call == "log"]  # fmt: skip
    assert logged == [(1, 10.0), (2, 5.0), (2, 5.0), (3, 10.0 / 3)]


def test_another_id_that_is_damaged_is_made_anew(tmp_path):
    (tmp_path / "run_id").write_text("a/b\n")
    assert trackers._run_id(tmp_path) == (tmp_path / "run_id").read_text().strip() != "a/b"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_library_takes_the_figures(tmp_path, name):
    pytest.importorskip(name)
    code = (
        "import sys; from lfm_jax.training.metrics import MetricsWriter\n"
        "for start in (0, 1):\n"
        "    writer = MetricsWriter(sys.argv[1], start, [sys.argv[2]], {'seed': 3})\n"
        "    for step in (start + 1, start + 2): writer.write(step, {'train/loss': 1.0 / step})\n"
        "    writer.close()"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error:::lfm_jax", "-c", code, str(tmp_path), name]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and "has failed" not in ran.stderr, ran.stderr
    if name == "wandb":
        runs = list((tmp_path / "wandb").glob("offline-run-*"))
        assert runs and all(run.name.endswith((tmp_path / "run_id").read_text().strip()) for run in runs)
        return
    with sqlite3.connect(tmp_path / "trackio" / "lfm_jax.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert [(step, json.loads(values)["train/loss"]) for _, step, values in rows] == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]
    assert len({run for run, _, _ in rows}) == 1
