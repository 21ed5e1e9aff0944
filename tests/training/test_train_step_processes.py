"""Two processes of four devices train as one of eight, and each finds its rows again in what is computed of all."""

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
import numpy as np
from jax.sharding import Mesh
port, process, *cases = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), heartbeat_timeout_seconds=30)
single = runpy.run_path("tests/training/test_train_step_sharded.py")
from lfm_jax.sharding import AXES
from lfm_jax.training import as_fed, host_part, place_batch
from lfm_jax.training.state import replicated
for case in cases:
    name, mesh_name = case.split("/")
    mesh, state = single["_parts"](name, mesh_name)[-1], single["_init"](name, mesh_name)
    for seed in range(3):
        state, metrics = single["_step"](name, mesh_name)(state, single["_placed"](seed, mesh))
        print(json.dumps([case, host_part(mesh)[1], {key: float(value) for key, value in metrics.items()}]), flush=True)
ring = np.array(jax.devices())[[0, 4, 5, 1, 2, 6, 7, 3]]
mesh = Mesh(ring.reshape([8 if axis == "fsdp" else 1 for axis in AXES]), AXES)
rows = np.arange(16 * 3).reshape(2, 8, 3)[host_part(mesh)[0]]
found = jax.jit(lambda tokens: tokens, out_shardings=replicated(mesh))(place_batch({"tokens": rows}, mesh)["tokens"])
print(json.dumps(["ring", np.asarray(found).tolist(), as_fed(np.asarray(found), mesh).tolist()]), flush=True)
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


def test_rows_come_back_in_the_order_in_which_they_were_fed(metrics):
    """Of devices in a ring, 0 1 1 0 0 1 1 0 by process, so that the rows of neither lie beside each other."""
    ((_, placed, found),) = (each for each in metrics if each[0] == "ring")
    rows = np.arange(16 * 3).reshape(16, 3)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(placed, rows[[0, 1, 8, 9, 10, 11, 2, 3, 4, 5, 12, 13, 14, 15, 6, 7]])


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
