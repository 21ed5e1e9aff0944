"""What the C library does with memory that a program has freed."""

import ctypes

from jax._src import hardware_utils  # what jax itself looks with; there is no public way before the runtime is up

_LARGEST = 1 << 30
# Of malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX.
_SETTINGS = ((-1, 2 * _LARGEST - 1), (-3, _LARGEST), (-8, 1))


def keep_freed_memory() -> bool:
    """Where CPUs compute, has glibc keep what is freed for the next allocation; True where it does so now.

    XLA allocates the temporary memory of a program anew each time that it runs. As it is, glibc takes more than 32 MiB (64 in a
    thread) from the kernel and gives it back, and the kernel clears every page again: a third of a small model's training step
    (docs/log.md, 2026-11-27). Up to 1 GiB in one piece stays with the process after this, and up to 2 GiB at the end of the heap,
    so that a process holds more than it needs. Larger pieces go back as before, and with other C libraries all do.

    To be called before threads allocate. Hosts of TPUs and GPUs, whose programs have their memory there, are left alone.
    """
    if hardware_utils.num_available_tpu_chips_and_device_id()[0] or hardware_utils.has_visible_nvidia_gpu():
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    return set_option is not None and all([set_option(option, value) for option, value in _SETTINGS])
