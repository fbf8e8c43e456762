"""How a program uses the processor it runs on: for the command line and scripts, not for `import jaxldm`."""

from __future__ import annotations

import ctypes
import os
import platform

import jax

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
MOST_DEVICES = 8


def prepare() -> None:
    """Makes JAX quick on a CPU: call it once, first thing in a program; elsewhere it changes nothing.

    See `keep_freed_memory` and `use_every_core`; `experiments/benchmarks/README.md` has what each is worth.
    """
    keep_freed_memory()
    use_every_core()


def keep_freed_memory() -> bool:
    """Tells glibc to keep the memory that is freed rather than to hand it back; returns whether it was told.

    XLA allocates the temporary buffer of a compiled function anew in each call. By default glibc asks the
    kernel for it every time, and every page of it is then faulted in again: a third of a training step. One
    arena, no mmap and no trimming (mallopt(3)) end that. It must come before the threads of JAX's CPU client
    are made. Other C libraries and systems are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])


def use_every_core() -> bool:
    """Shows JAX the CPU as one device per core: a power of two, at most 8. Returns whether it did.

    XLA runs the small convolutions of a small model on one thread, however many cores there are; split over
    as many devices as cores, a batch keeps all of them busy. It must come before the first computation:
    afterwards, and where the number was chosen by XLA_FLAGS or JAX_NUM_CPU_DEVICES, it stays as it is.
    """
    chosen: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if in_flags or chosen > 0:
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", min(MOST_DEVICES, 1 << (cores.bit_length() - 1)))
    except RuntimeError:  # JAX has computed something already: its devices are what they are
        return False
    return True
