"""A run that is asked to stop: by signals, by the notice that its machine goes away, alone and as one of several processes."""

import http.server
import os
import signal
import socket
import sys
import threading

import pytest
from tasks_of_slurm import tasks

from lfm_jax.training import stopping
from lfm_jax.training.stopping import notice, on_google_cloud, stop_requests

QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}
NOTICES = [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]


@pytest.fixture
def metadata(monkeypatch):
    """What a machine's metadata server says, by key; what it does not have is an error 404. It answers only who may ask."""
    said = dict(QUIET)

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google" and name in said
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(said[name].encode() if known else b"not found")

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield said
        server.shutdown()
        thread.join()


def asking():
    return [thread for thread in threading.enumerate() if thread.name == "machine notices"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_then_the_handler_is_what_it_was(number):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with stop_requests() as stop:
            assert not stop.reached()
            os.kill(os.getpid(), number)
            assert stop.reached() and stop.reached()
            assert signal.getsignal(number) is signal.default_int_handler
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_without_a_signal_the_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with stop_requests():
        assert all(signal.getsignal(number) is not handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before


def test_on_other_machines_nobody_is_asked(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_IP", raising=False)
    assert not on_google_cloud()
    with stop_requests():
        assert not asking()


@pytest.mark.parametrize("name, said", NOTICES)
def test_a_notice_is_said_as_it_is(metadata, name, said):
    assert on_google_cloud() and notice() is None
    metadata["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # it stays, elsewhere
    assert notice() is None
    metadata[name] = f"{said}\n"
    assert notice() == f"{name}: {said}"


@pytest.mark.parametrize("usual", [{"maintenance-event": "none", "preempted": "false\n"}, {"maintenance-event": ""}, {}])
def test_what_is_usual_or_unknown_is_no_notice(metadata, usual):
    metadata.clear()
    metadata.update(usual)
    assert notice() is None


def test_one_key_that_the_server_lacks_hides_no_other(metadata):
    del metadata["maintenance-event"]
    metadata["preempted"] = "TRUE"
    assert notice() == "preempted: TRUE"


def test_a_server_that_does_not_answer_is_no_notice(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert notice() is None


@pytest.mark.parametrize("name, said", NOTICES)
def test_a_notice_is_a_request_to_stop(metadata, name, said):
    metadata[name] = said
    with stop_requests() as stop:
        for thread in asking():
            thread.join(timeout=60)
        assert stop.reached()


def test_it_is_asked_again_until_there_is_a_notice(metadata, monkeypatch):
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_LOOKS", 0.001)
    answers = iter([None, None, "preempted: TRUE"])
    monkeypatch.setattr(stopping, "notice", lambda: next(answers))
    with stop_requests() as stop:
        for thread in asking():
            thread.join(timeout=60)
        assert stop.reached() and next(answers, "all were given") == "all were given"


def test_when_the_run_is_over_nobody_is_asked_any_more(metadata):
    with stop_requests():
        threads = asking()
        assert threads
    for thread in threads:
        thread.join(timeout=60)
    assert not asking()


def test_a_run_in_another_thread_stops_at_a_notice_and_leaves_the_signals_alone(metadata):
    metadata["preempted"] = "TRUE"
    before, reached = signal.getsignal(signal.SIGTERM), []

    def run():
        with stop_requests() as stop:
            for thread in asking():
                thread.join(timeout=60)
            reached.append(stop.reached())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    assert reached == [True] and signal.getsignal(signal.SIGTERM) is before


# A run of two processes with a device each, as run.py would have it; one of them is asked at its sixth step.
CODE = """
import os, runpy, signal, sys
import run
from lfm_jax.sharding import MeshConfig, distributed, make_mesh
from lfm_jax.training import TrainConfig
index = distributed.join()
single = runpy.run_path("tests/training/test_loop.py")
number, times, asked, workdir = *map(int, sys.argv[1:4]), sys.argv[4]

def ask():
    for _ in range(times if index == asked else 0):
        os.kill(os.getpid(), number)

def main(arguments):
    config = TrainConfig(steps=100_000, log_every=1000, checkpoint_every=100_000, compare_replicas_every=100_000)
    single["run"](workdir, single["Batches"](6, ask), config=config, mesh=make_mesh(MeshConfig(data=2, fsdp=1)))

run.main = main
run._process()
"""


def run_together(workdir, number, times, asked):
    """The processes, while a block lasts."""
    (workdir / "run").mkdir()
    command = [sys.executable, "-c", CODE, *(str(each) for each in (int(number), times, asked, workdir / "run"))]
    return tasks(command, workdir, "task", 2, 2)


@pytest.mark.parametrize(("number", "asked"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_two_processes_save_at_the_same_step_and_ask_for_the_same_command(tmp_path, number, asked):
    with run_together(tmp_path, number, 1, asked) as processes:
        codes = [process.wait(timeout=240) for process in processes]
    logs = [(tmp_path / f"task-{index}.log").read_text() for index in range(2)]
    assert codes == [75, 75], logs
    (step,) = (int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert 6 <= step < 100_000
    assert f"stopped after step {step} of 100000 and saved; the same command resumes" in logs[0]


def test_the_second_sigint_to_one_of_two_processes_ends_it_at_once(tmp_path):
    with run_together(tmp_path, signal.SIGINT, 2, 1) as processes:
        code = processes[1].wait(timeout=120)
    assert code == -signal.SIGINT, (tmp_path / "task-1.log").read_text()
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
