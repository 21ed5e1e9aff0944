"""Checkpoints on gs://, by the clients of real runs, gcsfs and TensorStore, on a server of our own that can fail."""

import asyncio
import io
import json
import os
import re
import threading
import types
import urllib.parse
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from orbax.checkpoint._src.serialization import tensorstore_utils

from lfm_jax.training import MetricsWriter, checkpoint, checkpoint_manifest, metrics, read_metrics
from lfm_jax.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning

gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is of the extra tpu")

BUCKET = "bucket"
_URL = re.compile(rf"(?:/(upload|download))?/storage/v1/b/{BUCKET}(/o(?:/([^/]+))?)?")
# Faults besides the statuses of HTTP: the connection ends before the request is carried out, and after that, without an answer.
CUT, LOST = "cut", "lost"


class Stored(NamedTuple):
    """An object: what TensorStore compares before it replaces one, and the bytes."""

    generation: int
    data: bytes


class BucketServer(ThreadingHTTPServer):
    """Objects by name.

    fault: from (method, object's name, "" for a listing) what goes wrong with a request: None, a status, `CUT` or `LOST`. It may
    wait, and so keep the client waiting. requests: all so far, as the fault sees them.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Stored] = {}
        self.fault: Callable[[str, str], Any] = lambda method, name: None
        self.requests: list[tuple[str, str]] = []
        self.lock, self.generation = threading.RLock(), 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that break off are what is tested."""

    def put(self, name: str, data: bytes) -> Stored:
        with self.lock:
            self.generation += 1
            self.objects[name] = Stored(self.generation, data)
            return self.objects[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        asked = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        found = _URL.fullmatch(url.path)
        kind, objects, name = found.groups() if found else ("", None, None)
        name = urllib.parse.unquote(name or "")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "upload":
            name, body = self._upload(asked, body)
        self.server.requests.append((self.command, name))
        fault = self.server.fault(self.command, name)
        if fault in (CUT, LOST):
            self.close_connection = True
            self.wfile = io.BytesIO()
        if fault not in (None, CUT, LOST):
            self._answer(fault, {"error": {"code": fault, "message": "the bucket's own words"}})
        elif not found:
            self._answer(501, {"error": {"code": 501, "message": f"not known here: {self.command} {self.path}"}})
        elif fault != CUT:
            with self.server.lock:
                self._act(kind, bool(objects), name, asked, body)

    do_GET = do_POST = do_DELETE = _serve

    def _upload(self, asked: dict[str, str], body: bytes) -> tuple[str, bytes]:
        """(name, data) of a simple or a multipart upload."""
        if asked["uploadType"] != "multipart":  # all at once, the begin of a resumable one, or the only part of that
            return asked["name"], body
        boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
        about, data = (part.partition(b"\n\n")[2] for part in body.split(b"--" + boundary)[1:3])
        return json.loads(about)["name"], data[:-1]

    def _act(self, kind: str | None, in_objects: bool, name: str, asked: dict[str, str], body: bytes) -> None:
        objects = self.server.objects
        stored = objects.get(name)
        expected = asked.get("ifGenerationMatch")
        if expected is not None and int(expected) != (stored.generation if stored else 0):
            self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        elif asked.get("uploadType") == "resumable" and "Content-Range" not in self.headers:
            self._answer(200, {}, {"Location": self.server.url + self.path})
        elif kind == "upload":
            self._answer(200, _about(name, self.server.put(name, body)))
        elif not name:
            self._answer(200, self._listing(asked) if in_objects else {"name": BUCKET, "kind": "storage#bucket"})
        elif stored is None:
            self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        elif self.command == "DELETE":
            del objects[name]
            self._answer(204, b"")
        elif kind == "download" or asked.get("alt") == "media":
            self._answer_data(stored, asked)
        else:
            self._answer(200, _about(name, stored))

    def _answer_data(self, stored: Stored, asked: dict[str, str]) -> None:
        headers = {"x-goog-generation": str(stored.generation)}
        if asked.get("ifGenerationNotMatch") == str(stored.generation):
            self._answer(304, b"", headers)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=(-\d+)", self.headers.get("Range") or "")
        if not wanted:
            self._answer(200, stored.data, headers)
            return
        size = len(stored.data)
        begin = max(size + int(wanted[3]), 0) if wanted[3] else int(wanted[1])
        end = min(int(wanted[2]) + 1, size) if wanted[2] else size
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._answer(206 if begin < size else 416, stored.data[begin:end], headers)

    def _listing(self, asked: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.server.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or not asked.get("startOffset", "") <= name < asked.get("endOffset", "\U0010ffff"):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(_about(name, self.server.objects[name]))
        most = int(asked.get("maxResults", 1000))
        assert len(items) + len(prefixes) <= most or most == 1, "pages are not served here"
        return {"kind": "storage#objects", "items": items[:most], "prefixes": sorted(prefixes)[: most - len(items[:most])]}

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


def _about(name: str, stored: Stored) -> dict[str, Any]:
    time = "2026-01-01T00:00:00.000000Z"
    return {
        "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(stored.data)),
        "generation": str(stored.generation), "metageneration": "1", "timeCreated": time, "updated": time,
    }  # fmt: skip


RUN = f"gs://{BUCKET}/run"
SHAPE = (600, 500)  # large enough that the manifest has no digest of the file it is in, so that TensorStore reads it first


class State(NamedTuple):
    step: jax.Array
    kernel: jax.Array


def values(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SHAPE, np.float32)


def state(step: int) -> State:
    return State(jnp.int32(step), jnp.array(values(step)))


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state(step), data_state={"at": step}, config={}, score=float(step))
        checkpoints.wait()


def restore() -> tuple[int, list[str]]:
    """(the step that a new process would restore, which is exact, and what it is told of others)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = Checkpoints(f"{RUN}/checkpoints").restore(jax.eval_shape(lambda: state(0)))
    told = [warning.message for warning in caught if issubclass(warning.category, CheckpointWarning)]
    assert restored.data_state == {"at": restored.step} and int(restored.state.step) == restored.step
    assert np.array_equal(restored.state.kernel, values(restored.step))
    return restored.step, list(map(str, told))


@pytest.fixture(scope="module")
def server():
    """The only bucket there is, and clients that give up soon: they try three times, without waiting."""
    with pytest.MonkeyPatch.context() as patch, BucketServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # Plain gcsfs: the other asks Google what kind of bucket it is.
        filesystem = gcsfs.core.GCSFileSystem(token="anon", skip_instance_cache=True)
        patch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: filesystem)
        patch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
        retries = {"max_retries": 3, "initial_delay": "1ms", "max_delay": "1ms"}
        patch.setitem(tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT, "gcs_request_retries", retries)
        yield server
        server.fault = lambda method, name: None
        filesystem.close_session(filesystem.loop, filesystem._session)
        server.shutdown()


@pytest.fixture(scope="module")
def two_steps(server) -> dict:
    save(Checkpoints(f"{RUN}/checkpoints"), 1, 2)
    return dict(server.objects)


@pytest.fixture
def bucket(server, two_steps):
    """With steps 1 and 2, and no fault."""
    server.fault = lambda method, name: None
    server.objects = dict(two_steps)
    server.requests.clear()
    return server


def steps_in(bucket: BucketServer) -> list[str]:
    return sorted({name.split("/")[2] for name in bucket.objects})


def test_a_round_trip_and_what_is_kept(bucket):
    checkpoints = Checkpoints(f"{RUN}/checkpoints", keep=1)
    assert checkpoints.restore(jax.eval_shape(lambda: state(0))).step == 2
    save(checkpoints, 3, 4)
    assert steps_in(bucket) == ["00000002", "00000004"]  # the newest that was verified, and the newest
    assert restore() == (4, []) and checkpoints.steps() == [2, 4]
    checkpoints.mark_verified(4)
    save(checkpoints, 5)
    assert steps_in(bucket) == ["00000004", "00000005"]
    checkpoints.discard(newer_than=4)
    assert steps_in(bucket) == ["00000004"] and restore() == (4, [])
    assert checkpoints.verify(4) is None


def test_all_old_steps_go_at_once(bucket):
    """A folder in a bucket is gone with its last file, which must not be taken for a failure to remove it."""
    save(Checkpoints(f"{RUN}/checkpoints"), 3)
    bucket.put("run/checkpoints/00000001/state/state/d/left", b"over")
    save(Checkpoints(f"{RUN}/checkpoints", keep=1), 4)  # a warning would be an error
    assert steps_in(bucket) == ["00000004"]


def test_the_manifest_is_written_last_and_lists_every_file(bucket):
    save(Checkpoints(f"{RUN}/checkpoints"), 3)
    prefix = "run/checkpoints/00000003/"
    written = [name for method, name in bucket.requests if method in ("POST", "PUT") and name.startswith(prefix)]
    assert written[-1] == f"{prefix}manifest.json" and written.count(written[-1]) <= 2  # the begin and the only part
    manifest = json.loads(bucket.objects[f"{prefix}manifest.json"].data)
    sizes = {name: len(stored.data) for name, stored in bucket.objects.items() if name.startswith(f"{prefix}state/")}
    assert {f"{prefix}state/{name}": entry["bytes"] for name, entry in manifest["files"].items()} == sizes


def test_what_others_write_and_remove_is_seen(bucket):
    checkpoints = Checkpoints(f"{RUN}/checkpoints")
    assert checkpoints.steps() == [1, 2] and checkpoints.verify(2) is None
    for name, stored in list(bucket.objects.items()):
        if "/00000001/" in name:
            bucket.put(name.replace("/00000001/", "/00000003/"), stored.data)
    assert checkpoints.steps() == [1, 2, 3]
    assert "manifest.json is not as it was written for this step" in checkpoints.verify(3)
    (metadata,) = (name for name in bucket.objects if name.endswith("00000002/state/state/_METADATA"))
    del bucket.objects[metadata]
    assert checkpoints.verify(2) == "state/state/_METADATA is missing"


def test_damage_is_told_and_the_older_step_used(bucket):
    """Of a flipped bit that the bucket's own checksum is right about, since it was written so."""
    piece = values(2)[0, 5:13].tobytes()
    (name,) = (name for name, stored in bucket.objects.items() if piece in stored.data)
    data = bytearray(bucket.objects[name].data)
    data[data.index(piece) + 5] ^= 16
    bucket.put(name, bytes(data))
    step, (text,) = restore()
    assert step == 1 and text.startswith(f"{RUN}/checkpoints/00000002 is damaged and not used: kernel in state/ has not the")
    del bucket.objects["run/checkpoints/00000002/manifest.json"]
    step, (text,) = restore()
    assert step == 1 and "00000002 is not used: it has no manifest.json" in text


def test_an_interrupted_save_is_no_step_and_the_next_one_takes_its_place(bucket):
    for name in [name for name in bucket.objects if "/00000002/" in name]:
        data = bucket.objects.pop(name).data
        if not name.endswith("manifest.json"):
            bucket.put(name, data)
    assert restore()[0] == 1 and Checkpoints(f"{RUN}/checkpoints").unfinished() == [2]
    save(Checkpoints(f"{RUN}/checkpoints"), 2)
    assert restore() == (2, [])


def test_the_metrics_are_on_the_bucket(bucket, monkeypatch):
    tracker = types.SimpleNamespace(write=lambda *_: None, close=lambda: None)
    monkeypatch.setattr(metrics, "TensorBoard", lambda workdir, step: tracker)
    for first in (0, 2):
        writer = MetricsWriter(epath.Path(RUN), first)
        for step in (first + 1, first + 2, first + 3):
            writer.write(step, {"train/loss": 1.0 / step})
        writer.close()
    assert [record["step"] for record in read_metrics(RUN)] == [1, 2, 3, 4, 5]
    bucket.fault = lambda method, name: 403
    with pytest.raises(OSError, match="Forbidden"):
        MetricsWriter(epath.Path(RUN), 5)


def once(kind: Any, concerned):
    """A fault that strikes the first request of each kind to each object that is concerned."""
    seen = set()

    def fault(method: str, name: str):
        if (method, name) in seen or not concerned(method, name):
            return None
        seen.add((method, name))
        return kind

    return fault


def writing(method: str, name: str) -> bool:
    return method in ("POST", "PUT") and name != ""


def values_of(method: str, name: str) -> bool:
    return "/d/" in name


@pytest.mark.parametrize("kind", [503, CUT])
def test_a_fault_that_passes_is_not_seen(bucket, kind):
    bucket.fault = once(kind, lambda method, name: True)
    save(Checkpoints(f"{RUN}/checkpoints", keep=1), 3)
    assert steps_in(bucket) == ["00000003"]
    bucket.fault = once(kind, lambda method, name: True)
    assert restore() == (3, [])


def test_an_answer_that_is_lost_commits_the_step(bucket):
    """The manifest is there, and the client does not know and writes it again."""
    bucket.fault = once(LOST, lambda method, name: writing(method, name) and name.endswith("manifest.json"))
    save(Checkpoints(f"{RUN}/checkpoints"), 3)
    assert restore() == (3, [])


@pytest.mark.parametrize(
    ("kind", "concerned", "text"),
    [
        (503, writing, "the bucket's own words"),
        (403, writing, "Forbidden"),
        (503, values_of, "ABORTED: All 3 retry attempts failed"),
        (403, values_of, "PERMISSION_DENIED"),
        (CUT, values_of, "ABORTED: All 3 retry attempts failed"),
        (LOST, lambda method, name: writing(method, name) and values_of(method, name), "ABORTED: All 3 retry attempts failed"),
        (503, lambda method, name: writing(method, name) and name.endswith("manifest.json"), "503"),
    ],
)
def test_a_save_that_fails_says_so_and_costs_no_step(bucket, kind, concerned, text):
    checkpoints = Checkpoints(f"{RUN}/checkpoints", keep=1)
    bucket.fault = lambda method, name: kind if concerned(method, name) else None
    with pytest.raises(CheckpointError, match=rf"(?s)step 3 in {RUN}/checkpoints failed: .*({text}).*saved there: 1, 2\. Once"):
        save(checkpoints, 3)
    bucket.fault = lambda method, name: None
    assert checkpoints.steps() == [1, 2] and restore()[0] == 2
    save(checkpoints, 3)
    assert restore() == (3, []) and steps_in(bucket) == ["00000003"]


@pytest.mark.parametrize("kind", [503, 403, CUT])
def test_a_bucket_that_is_away_is_told_at_every_turn(bucket, kind):
    checkpoints = Checkpoints(f"{RUN}/checkpoints")
    bucket.fault = lambda method, name: kind
    text = f"{RUN}/checkpoints cannot be read: .*Once it can, the same command goes on"
    for call in (checkpoints.steps, checkpoints.unfinished, restore, lambda: save(checkpoints, 3)):
        with pytest.raises(CheckpointError, match=text):
            call()
    bucket.fault = lambda method, name: None
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("kind", [503, 403, CUT])
@pytest.mark.parametrize("part", ["manifest.json", "_METADATA", "/ocdbt.process_0/d/"])
def test_what_cannot_be_reached_is_no_damage(bucket, kind, part):
    """An older step would be used for the newest, which is whole, and later be overwritten."""
    checkpoints = Checkpoints(f"{RUN}/checkpoints", keep=1)
    bucket.fault = lambda method, name: kind if part in name and "/00000002/" in name and method == "GET" else None
    texts = f"{RUN}/checkpoints/00000002 cannot be reached: .* no older step is used|{RUN}/checkpoints cannot be read"
    with pytest.raises(CheckpointError, match=texts):
        checkpoints.restore(jax.eval_shape(lambda: state(0)))
    with pytest.raises(CheckpointError, match=texts):
        checkpoints.verify(2)
    bucket.fault = lambda method, name: None
    assert restore() == (2, [])


def test_a_bucket_that_goes_away_during_a_save_is_told(bucket):
    """In the thread that waits for it, where an error of the clean-up would be lost, and the save pass for done."""
    checkpoints, away = Checkpoints(f"{RUN}/checkpoints"), threading.Event()

    def fault(method: str, name: str):
        if values_of(method, name):
            away.set()
        return 503 if away.is_set() else None

    bucket.fault = fault
    with pytest.raises(CheckpointError, match="step 3 in .* failed: .*saved there: unknown"):
        save(checkpoints, 3)
    bucket.fault = lambda method, name: None
    assert restore()[0] == 2
    save(checkpoints, 3)
    assert restore() == (3, [])


def test_a_bucket_that_goes_away_after_the_commit_costs_nothing(bucket, monkeypatch):
    """What is not removed then is removed by the next."""
    told = []
    monkeypatch.setattr(checkpoint.warnings, "warn", lambda text, category, **_: told.append((text, category)))
    checkpoints = Checkpoints(f"{RUN}/checkpoints", keep=1)
    bucket.fault = lambda method, name: 503 if method == "DELETE" and "/00000001/" in name else None
    save(checkpoints, 3)
    ((text, category),) = told
    assert category is CheckpointWarning and text.startswith("step 3 is saved, but older ones in")
    bucket.fault = lambda method, name: None
    assert restore()[0] == 3
    save(checkpoints, 4)
    assert steps_in(bucket) == ["00000004"]


def test_a_score_is_read_from_the_bucket(bucket):
    save(Checkpoints(f"{RUN}/checkpoints", keep=1, keep_best=1), 3)
    assert steps_in(bucket) == ["00000001", "00000003"]


def test_a_bucket_has_no_disk_to_flush_and_no_part_of_a_manifest(bucket, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("fsync"))
    checkpoint_manifest.commit(epath.Path(RUN) / "checkpoints" / "00000002", {"step": 2})
    assert [name for method, name in bucket.requests if writing(method, name)][-1].endswith("00000002/manifest.json")
    assert not [name for name in bucket.objects if name.endswith(".part")]
