"""Several processes as one run: whether this one belongs to any, a roll call that names who is missing, and the way out."""

import contextlib
import os
import re
import socket
import sys
import time
from typing import NamedTuple, NoReturn

import jax
from jax._src import cloud_tpu_init, clusters  # jax.distributed.initialize asks these, and gives their answer to nobody

from lfm_jax.sharding import peers

# A preempted pod is scheduled, gets its image and starts Python in this time, or there is no machine for it.
TIMEOUT_SECONDS = 30 * 60
EXIT_AGAIN = 75  # as a run that was interrupted (lfm_jax.training): the same command, again
_RETRY_SECONDS = 2.0
_ALL_HERE = "all here"
_MAX_MESSAGE_BYTES = 1 << 16
# Variables without which jax need not be asked on a machine without TPUs: those of a step under Slurm and under Open MPI.
_STARTED_TOGETHER = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")


class Cluster(NamedTuple):
    """The processes of a run. coordinator: "host:port" of process 0. index: which one this is. local_devices: None for all."""

    coordinator: str
    size: int
    index: int
    local_devices: list[int] | None


class PeersMissing(SystemExit):
    """Not all processes of the run have come in time; the exit code asks for the same command again."""


def find_cluster(timeout_seconds: float = TIMEOUT_SECONDS) -> Cluster | None:
    """What this process was started as a part of; None where it is alone.

    jax knows a TPU slice on GKE by `TPU_WORKER_HOSTNAMES`, one of TPU VMs by the metadata server, several slices by
    `MEGASCALE_NUM_SLICES` in either, Slurm and Open MPI by the variables of a step. It is asked only where there is a TPU or such
    a variable: on other machines nothing is looked up.
    """
    if cloud_tpu_init.running_in_cloud_tpu_vm:
        workers = os.environ.get("TPU_WORKER_HOSTNAMES")
        if workers and "," not in workers and _slices() == 1:
            return None  # one host on GKE: jax would look for other slices, for seconds
    elif not any(name in os.environ for name in _STARTED_TOGETHER):
        return None
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(timeout_seconds))
    coordinator, size, index, local_devices = found
    return None if size in (None, 1) else Cluster(coordinator, size, index, local_devices)


def join(timeout_seconds: float = TIMEOUT_SECONDS) -> int:
    """Starts `jax.distributed` where this process is one of several; returns which one it is, 0 where it is alone.

    To be called before anything touches a device.

    Raises:
      PeersMissing: after `timeout_seconds` some have not come; who it is has been printed.
    """
    try:
        cluster = find_cluster(timeout_seconds)
        if cluster is None:
            return 0
        absent = call_roll(cluster, timeout_seconds)
    except RuntimeError as error:  # of jax: for so long the network has not known the name of process 0
        absent = f"process 0 has not come: {error}."
    if absent:
        print(f"run.py: {absent} Nothing is lost: the same command again.", file=sys.stderr, flush=True)
        raise PeersMissing(EXIT_AGAIN)
    jax.distributed.initialize(
        cluster.coordinator, cluster.size, cluster.index, cluster.local_devices,
        cluster_detection_method="deactivate",
        # lfm_jax.sharding.peers is faster and says more; this is for the day when its threads are dead.
        heartbeat_timeout_seconds=3 * 60,
        # At the end process 0 may be writing for long while the others wait for it.
        shutdown_timeout_seconds=TIMEOUT_SECONDS,
    )  # fmt: skip
    return cluster.index


def leave(code: int) -> NoReturn:
    """Ends the process with `code`, at once where it is one of several and something went wrong.

    An ordinary exit waits for the others, who wait for this one in a collective: minutes later all are aborted, and the code that
    tells a mistake (2) from a crash is lost.
    """
    peers.leave(code)
    if code and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # of a log whose disk is full
                stream.flush()
        os._exit(code)
    sys.exit(code)


def call_roll(cluster: Cluster, timeout_seconds: float) -> str:
    """Waits until all processes of the cluster have called process 0; says who is missing, "" when all are here.

    jax's own initialisation ends the process when its time is up, without saying whom it waited for. The port is the one below
    the coordinator's.
    """
    deadline = time.monotonic() + timeout_seconds
    host, _, port = cluster.coordinator.rpartition(":")
    if cluster.index == 0:
        return _take_roll(cluster, int(port) - 1, timeout_seconds, deadline)
    return _answer_roll(cluster, (host, int(port) - 1), timeout_seconds, deadline)


def _take_roll(cluster: Cluster, port: int, timeout_seconds: float, deadline: float) -> str:
    names: dict[int, str] = {0: socket.gethostname()}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), backlog=cluster.size))
        connections: dict[int, socket.socket] = {}  # of each process the newest: one that calls twice has died in between
        while len(names) < cluster.size and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(_RETRY_SECONDS)
                index, _, name = connection.recv(512).decode(errors="replace").partition(" ")
            except OSError:
                continue
            if re.fullmatch(r"[0-9]{1,6}", index) and 0 < int(index) < cluster.size:
                names[int(index)], connections[int(index)] = name, connection
        message = _absence(cluster, names, timeout_seconds)
        for connection in connections.values():
            with contextlib.suppress(OSError):  # it has gone again, and jax will miss it
                connection.sendall((message or _ALL_HERE).encode())
    return message


def _answer_roll(cluster: Cluster, address: tuple[str, int], timeout_seconds: float, deadline: float) -> str:
    pause = 0.1
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic())) as connection:
                connection.sendall(f"{cluster.index} {socket.gethostname()}".encode())
                connection.settimeout(timeout_seconds + _RETRY_SECONDS)  # process 0 may have begun to wait later
                chunks = iter(lambda connection=connection: connection.recv(_MAX_MESSAGE_BYTES), b"")
                answer = b"".join(chunks).decode(errors="replace")
            if answer:
                return "" if answer == _ALL_HERE else answer
        except OSError:
            pass  # process 0 is not there yet, or is starting anew
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, _RETRY_SECONDS)
    return (
        f"process 0 of {cluster.size} did not answer at {address[0]}:{address[1]} in {timeout_seconds:.0f} seconds; this is "
        f"process {cluster.index} on {socket.gethostname()}."
    )


def _absence(cluster: Cluster, names: dict[int, str], timeout_seconds: float) -> str:
    missing = [index for index in range(cluster.size) if index not in names]
    if not missing:
        return ""
    per_slice = cluster.size // _slices()
    where = lambda index: f"{index} (worker {index % per_slice} of slice {index // per_slice})"
    here = ", ".join(f"{index} on {name}" for index, name in sorted(names.items()))
    return (
        f"after {timeout_seconds:.0f} seconds {len(missing)} of {cluster.size} processes have not come: "
        f"{', '.join(map(where, missing))}. Here are {here}."
    )


def _slices() -> int:
    return int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
