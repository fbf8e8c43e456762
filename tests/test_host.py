"""Settings of a process: devices, memory and the compilation cache, seen from new processes."""

import os
import platform
import subprocess
import sys

import jax
import pytest

from jaxldm import host

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
    done, devices = run(PREPARE + SHOW)
    assert done == "True"
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
done = host.keep_freed_memory() if sys.argv[1:] == ["keep"] else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Info(ctypes.Structure):  # struct mallinfo2: hblks, the number of mapped blocks, is the fourth
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc.mallinfo2.restype = Info
before = libc.mallinfo2().hblks
assert libc.malloc(ctypes.c_size_t(64 << 20))
print(done, libc.mallinfo2().hblks - before)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert run(code, "keep") == ["True", "0"]
    assert run(code) == ["None", "1"]


CONVOLUTION = """
from jaxldm import host
host.prepare()
import jax
from jax import lax, numpy as jnp
def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
shapes = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
print("ynn" in jax.jit(convolve).lower(*shapes).compile().as_text())
"""


def test_convolutions_are_not_left_to_ynnpack():
    assert run(CONVOLUTION) == ["False"]


def test_versions_without_these_flags_and_what_the_user_said_stay(monkeypatch):
    eigen = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    onednn = "--xla_cpu_experimental_onednn_custom_call=true"
    other = "--xla_cpu_experimental_ynn_fusion_type=+dot"
    without = "--xla_cpu_experimental_onednn_custom_call=false"
    for version, before, after in (
        ("0.12.0.1", "--a=1", f"--a=1 {eigen} {onednn}"),
        ("0.11.0", "", f"{eigen} {onednn}"),
        ("0.10.2", "--a=1", "--a=1"),
        ("0.1.2", "", ""),
        ("0.12.1", other, f"{other} {onednn}"),
        ("0.12.1", without, f"{without} {eigen}"),
        ("0.12.1", f"{without} {other}", f"{without} {other}"),
    ):
        monkeypatch.setattr(host.jaxlib, "__version__", version)
        monkeypatch.setenv("XLA_FLAGS", before)
        assert host.use_fast_convolutions() == (before != after)
        assert os.environ["XLA_FLAGS"] == after
        monkeypatch.setenv("XLA_FLAGS", before)
        host.use_fast_convolutions(onednn=False)
        assert os.environ["XLA_FLAGS"] == after.replace(onednn, "").strip()


KEPT = """
import sys, warnings
from jaxldm import host
warnings.simplefilter("error")
host.prepare(**({"keep_compiled": True} if "keep" in sys.argv else {}))
folder = host.use_compilation_cache()
import jax
from jax import lax, numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(convolve)(jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 16))).block_until_ready()
print(folder is not None, "onednn_custom_call=true" in __import__("os").environ.get("XLA_FLAGS", ""))
print(events.count("cache_hits") > 0)
"""


def test_a_function_with_convolutions_is_kept_for_the_next_process(tmp_path):
    """XLA cannot write those of oneDNN: a process has either these or the cache, and no warning."""
    kept = {host.COMPILATION_CACHE: str(tmp_path / "kept")}
    assert run(KEPT, "keep", **kept) == ["True", "False", "False"]
    assert run(KEPT, "keep", **kept) == ["True", "False", "True"]
    has_cache, has_onednn, hit = run(KEPT, **{host.COMPILATION_CACHE: str(tmp_path / "other")})
    assert (has_cache != has_onednn, hit) == ("True" != "False", "False")
    own = run(KEPT, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own == ["True", "False", "False"] and any((tmp_path / "own").iterdir())


COMPILE = """
import sys, time
from jaxldm import host
folder = host.use_compilation_cache()
import jax
from jax import numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
f = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.linalg.qr(y @ x)[0], x).sum())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
f(jnp.eye(8))
print(folder, events.count("cache_hits") > 0, jax.config.jax_compilation_cache_max_size)
"""


def test_a_second_process_does_not_compile_again(tmp_path):
    """Without an environment variable, in the user's cache folder, of bounded size."""
    folder = tmp_path / "cache" / "jaxldm" / "compiled"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), host.COMPILATION_CACHE: ""}
    if sys.platform != "linux":
        pytest.skip("another cache folder")
    assert run(COMPILE, **environment) == [str(folder), "False", str(host.MAX_CACHE_BYTES)]
    assert run(COMPILE, **environment) == [str(folder), "True", str(host.MAX_CACHE_BYTES)]


def test_the_folder_of_compiled_functions(monkeypatch, tmp_path):
    monkeypatch.setenv(host.COMPILATION_CACHE, str(tmp_path / "mine"))
    assert host.compilation_cache_folder() == tmp_path / "mine"
    monkeypatch.setenv(host.COMPILATION_CACHE, "off")
    assert host.compilation_cache_folder() is None and host.use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(host.COMPILATION_CACHE, str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_text("")
    assert host.use_compilation_cache() is None
