"""How programs prepare the processor, seen from fresh processes."""

import os
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
    """A temporary buffer that is allocated in every call is faulted in once, not in every call."""
    code = """
import resource, sys, jax, jax.numpy as jnp
from jaxldm import host
told = host.keep_freed_memory() if sys.argv[1:] == ["keep"] else None
f = jax.jit(lambda x: ((x @ x) @ x).sum())
x = jnp.ones((1000, 1000))
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x).block_until_ready()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    told, faults = run(code, "keep")
    if told == "False":
        pytest.skip("not glibc")
    _, faults_by_default = run(code)
    assert int(faults) < int(faults_by_default) / 4
