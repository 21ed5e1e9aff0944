"""Two processes of a run on this machine, as two tasks of Slurm; with one fault in them, or none."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
COUNT = 2
DEVICES = 1  # of each process; more would wait for each other by turning in circles, on the same few cores


class Ended(NamedTuple):
    """How a run ended. codes, logs: of each process. seconds: from the fault to the last process's end; None if none struck.

    overdue: it was ended by whoever waited for it. seconds_to_word: from the fault until a process said who or what is wrong;
    None if none did.
    """

    codes: list[int]
    logs: list[str]
    seconds: float | None
    overdue: bool
    seconds_to_word: float | None


def run_together(arguments: list[str], fault: dict[str, Any], folder: Path, patience: float) -> Ended:
    """Runs `run.py` with the arguments in both processes until both have ended, or for `patience` seconds.

    Args:
      fault: see `victim`; without "mark", which is set here.
      folder: for logs and marks, and for compiled programs.
    """
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    description = json.dumps({**fault, "mark": str(mark)})
    command = [sys.executable, "-m", "experiments.benchmarks.faults.victim", description, *arguments]
    paths = [folder / f"process-{index}.log" for index in range(COUNT)]
    processes = []
    job = _free_job()
    for index, path in enumerate(paths):
        with path.open("wb") as log:
            environment = _environment(index, job, folder)
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            )
    deadline, said = time.monotonic() + patience, None
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        if said is None and any(line.startswith(b"run.py:") for path in paths for line in path.read_bytes().splitlines()):
            said = time.time()
    now, overdue = time.time(), any(process.poll() is None for process in processes)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    codes = [process.wait() for process in processes]
    struck = json.loads(mark.read_text())["time"] if mark.exists() else None
    logs = [path.read_text(errors="replace") for path in paths]
    since = lambda moment: None if struck is None or moment is None else moment - struck
    return Ended(codes, logs, since(now), overdue, since(said))


def _environment(index: int, job: int, folder: Path) -> dict[str, str]:
    task = {"JOB_ID": job, "STEP_NODELIST": "127.0.0.1", "NTASKS": COUNT, "PROCID": index, "LOCALID": index}
    return {
        **os.environ,
        **{f"SLURM_{name}": str(value) for name, value in task.items()},
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def _free_job() -> int:
    """The number of a job whose ports, which jax and the roll call make from it, are free."""
    for job in random.sample(range(1, 4096), 4095):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in (61440 + job, 61440 + job - 1):
                stack.enter_context(socket.create_server(("", port)))
            return job
    raise OSError("no two ports from 61440 on are free")
