"""A command in several processes, each a task of Slurm, which jax finds the others by."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

# What jax says where a process came to a collective 30 seconds after another, as on a busy machine one does that has to compile.
_TOO_LATE = "Gloo context initialization failed"
_TRIES = 4


@contextlib.contextmanager
def tasks(command: list[str], logs: Path, name: str, processes: int, devices: int) -> Iterator[list[subprocess.Popen]]:
    """The processes, which have so many devices together and end with the block; each has a log. One process is no task."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        job = free.getsockname()[1] % 4096  # from which jax makes the port
    started = []
    try:
        for index in range(processes):
            task = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": processes, "PROCID": index, "LOCALID": index}
            environment = {  # of two flags of one name the last holds
                **os.environ, **({f"SLURM_{key}": str(value) for key, value in task.items()} if processes > 1 else {}),
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}",
            }  # fmt: skip
            with (logs / f"{name}-{index}.log").open("wb") as log:
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run_tasks(command: list[str], logs: Path, name: str, processes: int, devices: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes and what was printed, of each process.

    Where one was too late for another, the same command is given again: it goes on.
    """
    for _ in range(_TRIES):
        with tasks(command, logs, name, processes, devices) as started:
            codes = [process.wait(timeout=900) for process in started]
        texts = [(logs / f"{name}-{index}.log").read_text() for index in range(processes)]
        if not any(_TOO_LATE in text for text in texts):
            break
    return codes, texts
