"""Two processes of four devices train as one of eight."""

import json
import runpy
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

SINGLE = ROOT / "tests" / "training" / "test_train_step_sharded.py"
# Each process gives its rows of the batch; where a sequence is split over both, both give the same.
CODE = """
import json, runpy, sys
import jax
port, process, *cases = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), heartbeat_timeout_seconds=30)
single = runpy.run_path("tests/training/test_train_step_sharded.py")
from lfm_jax.training import host_part
for case in cases:
    name, mesh_name = case.split("/")
    mesh, state = single["_parts"](name, mesh_name)[-1], single["_init"](name, mesh_name)
    for seed in range(3):
        state, metrics = single["_step"](name, mesh_name)(state, single["_placed"](seed, mesh))
        print(json.dumps([case, host_part(mesh)[1], {key: float(value) for key, value in metrics.items()}]), flush=True)
"""
# The parts that the rows are given in: one for each host, or the same from both.
CASES = {"lfm3/context mixed": 2, "dense/context": 1, "dense/mixed": 2, "moe/expert mixed": 2}


@pytest.fixture(scope="module")
def metrics():
    """Of three steps, by case, as the first process sees them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", CODE, port]
    processes = [
        subprocess.Popen([*command, str(number), *CASES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    seen = [[json.loads(line) for line in output.splitlines() if line.startswith('["')] for output, _ in outputs]
    assert seen[0] == seen[1]
    return seen[0]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_of_four_devices_equal_one_of_eight(case, metrics):
    """Loss and gradient norm of three steps within float32's rounding: the later ones show what the updates before did."""
    name, mesh_name = case.split("/")
    single = runpy.run_path(str(SINGLE))
    mesh, state = single["_parts"](name, mesh_name)[-1], single["_init"](name, mesh_name)
    found = [(parts, values) for which, parts, values in metrics if which == case]
    assert len(found) == 3
    for seed, (parts, values) in enumerate(found):
        assert parts == CASES[case]
        state, expected = single["_step"](name, mesh_name)(state, single["_placed"](seed, mesh))
        assert values.keys() == expected.keys()
        for key, value in values.items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-5, err_msg=f"{key} of step {seed + 1}")
