"""Freed memory that is kept: page faults of a thread that allocates, fills and frees the same size over and over."""

import json
import platform
import resource
import subprocess
import sys

import pytest
from jax._src.hardware_utils import TpuVersion

from lfm_jax import host_memory

_FAULTS = """
import ctypes, json, resource, sys, threading
from lfm_jax.host_memory import keep_freed_memory

kept = sys.argv[1] == "keep" and keep_freed_memory()
library = ctypes.CDLL(None)
library.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: every page is a small one
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes, library.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def fill(size):
    place = library.malloc(size)
    library.memset(place, 1, size)
    library.free(place)

def count(size, found):
    fill(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        fill(size)
    found.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 2)

found = []
for size in (100 << 20, 1100 << 20):
    thread = threading.Thread(target=count, args=(size, found))
    thread.start()
    thread.join()
print(json.dumps([kept, *found]))
"""


def _faults(argument: str) -> tuple[bool, float, float]:
    """(kept, faults of filling 100 MiB, of filling 1,100 MiB)."""
    ran = subprocess.run([sys.executable, "-c", _FAULTS, argument], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_not_fetched_again_up_to_a_gibibyte():
    pages = (100 << 20) // resource.getpagesize()
    kept, small, large = _faults("keep")
    assert kept and small < 0.01 * pages
    assert large > 10 * pages  # what may stay with the process has an end
    kept, small, _ = _faults("as it is")
    assert not kept and small > 20 * 0.01 * pages


@pytest.mark.parametrize("chips, gpu", [(4, False), (0, True)])
def test_hosts_of_accelerators_are_left_alone(monkeypatch, chips, gpu):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: pytest.fail("the C library was asked"))
    found = (chips, TpuVersion.v6e if chips else None)
    monkeypatch.setattr(host_memory.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: found)
    monkeypatch.setattr(host_memory.hardware_utils, "has_visible_nvidia_gpu", lambda: gpu)
    assert not host_memory.keep_freed_memory()


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(host_memory.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
    monkeypatch.setattr(host_memory.hardware_utils, "has_visible_nvidia_gpu", lambda: False)
    assert not host_memory.keep_freed_memory()
