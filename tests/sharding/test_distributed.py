"""Processes find each other, say who is missing, and take no one along when they leave."""

import concurrent.futures
import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster

from lfm_jax.sharding import distributed
from lfm_jax.sharding.distributed import Cluster, PeersMissing, call_roll, find_cluster, join

SLURM = {"JOB_ID": "4097", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}


def coordinator():
    """An address whose lower neighbour, where the roll is called, is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1] + 1}"


@pytest.fixture
def metadata():
    """What the metadata server of a machine says, as (what it is asked for) -> text; without a TPU slice nothing."""
    pytest.importorskip("requests")  # with which jax asks
    attributes = {"tpu-env": ""}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[self.path.rpartition("/")[2]].encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        attributes["address"] = f"127.0.0.1:{server.server_port}"
        yield attributes
        server.shutdown()
        thread.join()


@pytest.fixture
def on_tpu(monkeypatch, metadata):
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    set_environment(monkeypatch, GCE_METADATA_IP=metadata["address"], NO_PROXY="127.0.0.1")


def set_environment(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # in a pod of one, jax would look for its client library
    monkeypatch.setattr(distributed.clusters.ClusterEnv, "auto_detect_unset_distributed_params", None)
    assert find_cluster() is None and join() == 0


def test_a_step_of_slurm_is_found(monkeypatch):
    set_environment(monkeypatch, **{f"SLURM_{name}": value for name, value in SLURM.items()})
    assert find_cluster() == Cluster("node3:61441", 2, 1, [0])


def test_one_task_of_slurm_is_alone(monkeypatch):
    set_environment(monkeypatch, **{f"SLURM_{name}": value for name, value in {**SLURM, "NTASKS": "1", "PROCID": "0"}.items()})
    assert find_cluster() is None and join() == 0


def test_a_slice_on_gke_is_found(monkeypatch, on_tpu):
    set_environment(monkeypatch, TPU_WORKER_HOSTNAMES="localhost,elsewhere", TPU_WORKER_ID="1")
    assert find_cluster() == Cluster("localhost:8482", 2, 1, None)


def test_slices_on_gke_are_found(monkeypatch, on_tpu):
    set_environment(monkeypatch, TPU_WORKER_HOSTNAMES="here,there", TPU_WORKER_ID="1")
    set_environment(monkeypatch, MEGASCALE_COORDINATOR_ADDRESS="localhost:8080", MEGASCALE_NUM_SLICES="3", MEGASCALE_SLICE_ID="2")
    assert find_cluster() == Cluster("localhost:8482", 6, 5, None)


def test_one_host_on_gke_is_alone_and_asks_nobody(monkeypatch):
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(distributed.clusters.ClusterEnv, "auto_detect_unset_distributed_params", None)
    set_environment(monkeypatch, TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    assert find_cluster() is None


def test_slices_of_tpu_vms_are_found(monkeypatch, on_tpu, metadata):
    metadata["agent-worker-number"] = "1"
    metadata["worker-network-endpoints"] = "name:1:127.0.0.1,name:2:127.0.0.2"
    metadata["tpu-env"] = "\n".join(
        ["MEGASCALE_NUM_SLICES: '2'", "MEGASCALE_SLICE_ID: '1'", "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'"]
    )
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name)
    assert find_cluster() == Cluster("127.0.0.1:8482", 4, 3, None)


def roll(size, indices, timeout):
    """What each of the processes is told."""
    address = coordinator()
    with concurrent.futures.ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(lambda index: call_roll(Cluster(address, size, index, None), timeout), indices))


def test_when_all_have_come_nobody_is_missing():
    assert roll(5, [3, 1, 0, 4, 2], timeout=60) == [""] * 5


def test_everyone_is_told_who_is_missing(monkeypatch):
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    told = roll(6, [0, 2, 4], timeout=3)
    name = socket.gethostname()
    assert set(told) == {
        "after 3 seconds 3 of 6 processes have not come: 1 (worker 1 of slice 0), 3 (worker 0 of slice 1), "
        f"5 (worker 2 of slice 1). Here are 0 on {name}, 2 on {name}, 4 on {name}."
    }


def test_without_process_0_its_address_is_told():
    (told,) = roll(2, [1], timeout=0.1)
    assert told.startswith("process 0 of 2 did not answer at 127.0.0.1:") and "this is process 1 on " in told


@pytest.mark.parametrize("message", [b"", b"GET / HTTP/1.1\r\n\r\n", b"7 stranger", b"0 stranger", b"\xff\xff"])
def test_strangers_who_call_are_not_counted(message):
    address = coordinator()
    host, _, port = address.rpartition(":")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        process_0 = pool.submit(call_roll, Cluster(address, 2, 0, None), 60)
        while True:
            try:
                with socket.create_connection((host, int(port) - 1)) as stranger:
                    stranger.sendall(message)
                break
            except ConnectionRefusedError:
                pass
        assert call_roll(Cluster(address, 2, 1, None), 60) == process_0.result() == ""


def test_a_run_that_is_not_complete_asks_for_the_same_command(monkeypatch, capsys):
    cluster = Cluster(coordinator(), 3, 0, None)
    monkeypatch.setattr(distributed, "find_cluster", lambda timeout: cluster)
    with pytest.raises(PeersMissing) as stopped:
        join(timeout_seconds=0.1)
    assert stopped.value.code == distributed.EXIT_AGAIN
    told = capsys.readouterr().err
    assert "2 of 3 processes have not come: 1 (worker 1 of slice 0), 2 (worker 2 of slice 0)." in told
    assert told.endswith("Nothing is lost: the same command again.\n")


def test_a_process_0_that_the_network_does_not_know_is_missing(monkeypatch, on_tpu, capsys):
    set_environment(monkeypatch, TPU_WORKER_HOSTNAMES="nowhere.invalid,localhost", TPU_WORKER_ID="1")
    with pytest.raises(PeersMissing) as stopped:
        join(timeout_seconds=0.1)
    assert stopped.value.code == distributed.EXIT_AGAIN
    assert "process 0 has not come: Failed to recognize coordinator address nowhere.invalid." in capsys.readouterr().err


def start_together(arguments):
    """Two processes as two tasks of Slurm on this machine."""
    job = int(coordinator().rpartition(":")[2]) % 4096  # from which jax makes the port
    processes = []
    for index in range(2):
        task = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": index, "LOCALID": index}
        environment = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in task.items()}}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes))
    return processes


def test_run_py_joins_the_processes_of_a_run(tmp_path):
    command = ["run.py", "--config=configs/parameter_audit.py", f"--workdir={tmp_path}/audit", "--config.presets=nano"]
    processes = start_together(command)
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert json.loads((tmp_path / "audit" / "results.json").read_text())["device"]["count"] == 16  # eight of each


# Process 1 ends with a mistake while process 0 waits for something else.
LEAVING = """
import jax, sys
from lfm_jax.sharding import distributed
index = distributed.join()
assert jax.process_count() == 2 and jax.process_index() == index
if index == 1:
    distributed.leave(2)
sys.stdin.read()
"""


def test_a_process_that_leaves_waits_for_nobody_and_keeps_its_exit_code():
    process_0, process_1 = start_together(["-c", LEAVING])
    printed = process_1.communicate(timeout=90)[0]
    assert process_0.poll() is None and process_1.returncode == 2, printed
    process_0.kill()
    process_0.communicate()


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_alone_leaves_as_usual(code):
    with pytest.raises(SystemExit) as left:
        distributed.leave(code)
    assert left.value.code == code
