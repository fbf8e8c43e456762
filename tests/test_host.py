"""How programs prepare the processor, seen from fresh processes."""

import os
import platform
import subprocess
import sys

import pytest

SHOW = "import jax; print(jax.local_device_count())"
PREPARE = "from jaxldm import host; print(host.use_every_core());"


def run(code: str, *arguments: str, **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_one_device_per_core():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told, devices = run(PREPARE + SHOW)
    assert told == "True"
    assert int(devices) <= min(cores, 8) < 2 * int(devices) or int(devices) == 8


@pytest.mark.parametrize(
    "environment",
    [{"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {"JAX_NUM_CPU_DEVICES": "3"}],
)
def test_a_number_that_was_chosen_stays(environment):
    assert run(PREPARE + SHOW, **environment) == ["False", "3"]


def test_too_late_changes_nothing():
    assert run("import jax; jax.devices();" + PREPARE + SHOW) == ["False", "1"]


def test_freed_memory_is_kept():
    """A large block comes from the heap that is kept, not from a mapping that is given back when freed."""
    code = """
import ctypes, sys
from jaxldm import host
told = host.keep_freed_memory() if sys.argv[1:] == ["keep"] else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Info(ctypes.Structure):  # struct mallinfo2: hblks, the number of mapped blocks, is the fourth
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc.mallinfo2.restype = Info
before = libc.mallinfo2().hblks
assert libc.malloc(ctypes.c_size_t(64 << 20))
print(told, libc.mallinfo2().hblks - before)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert run(code, "keep") == ["True", "0"]
    assert run(code) == ["None", "1"]
