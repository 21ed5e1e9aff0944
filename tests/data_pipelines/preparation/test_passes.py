"""Passes: whole or not at all, over the same documents, in order."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from etils import epath

from data_pipelines import Document
from data_pipelines.preparation.passes import fingerprint, in_order, once, same_documents, with_progress
from lfm_jax.configuration import ConfigError


def test_a_folder_appears_whole_and_is_made_once(tmp_path):
    folder = epath.Path(tmp_path) / "pass"

    def fails(part):
        (part / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(folder, fails)
    assert not folder.exists()
    once(folder, lambda part: (part / "b").write_text("whole"))
    once(folder, fails)
    assert [path.name for path in folder.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == ["pass"]


DOCUMENTS = [Document("one", "a"), Document("two", "b"), Document("caf\u00e9", "c\udcff")]


def test_documents_that_are_the_same_pass():
    fingerprints = [fingerprint(document) for document in DOCUMENTS]
    assert len(set(fingerprints)) == 3
    assert list(with_progress(same_documents(DOCUMENTS, fingerprints), "reading")) == DOCUMENTS


@pytest.mark.parametrize(
    "changed, message",
    [
        ([DOCUMENTS[0], Document("two", "B"), DOCUMENTS[2]], "document 1 .'B'. is not what it was when the source was"),
        ([DOCUMENTS[0], Document("too", "b")], "document 1 .'b'. is not what it was"),
        ([*DOCUMENTS, Document("more", "d")], "document 3 .'d'. is not what it was"),
        (DOCUMENTS[:2], "the source ends after 2 documents, and had more when it was first read"),
        ([], "the source ends after 0 documents"),
    ],
)
def test_a_source_that_has_changed_is_noticed(changed, message):
    with pytest.raises(ConfigError, match=message):
        list(same_documents(changed, [fingerprint(document) for document in DOCUMENTS]))


STARTED = []


def start(number):
    STARTED.append(number)


def square(number):
    if number == 13:
        raise ConfigError("thirteen")
    return STARTED[-1] + number * number, os.getpid()


@pytest.mark.parametrize("workers", [0, 1])
def test_results_come_in_the_order_of_the_tasks_and_errors_too(workers):
    found = in_order(range(20), square, start, (100,), workers)
    firsts = [next(found) for _ in range(13)]
    assert [value for value, _ in firsts] == [100 + number * number for number in range(13)]
    assert (os.getpid() in {process for _, process in firsts}) == (workers == 0)
    with pytest.raises(ConfigError, match="thirteen"):
        next(found)


PROGRAM = """
import os, time
from data_pipelines.preparation.passes import in_order
def start(): print(os.getpid(), flush=True)
def wait(_): time.sleep(600)
if __name__ == "__main__": list(in_order([0], wait, start, (), 1))
"""


def _runs(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks the process up in /proc")
def test_a_worker_ends_with_a_killed_parent(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    assert _runs(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        if not _runs(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker goes on without its parent")
