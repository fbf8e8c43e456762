"""Settings of the process for the command line and scripts; `import jaxldm` does not change any."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import jax
import jaxlib

from jaxldm.errors import InvalidArgumentError
from jaxldm.files import expanded

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
MAX_DEVICES = 8
COMPILATION_CACHE = "JAXLDM_COMPILATION_CACHE"  # an environment variable: a folder, or "off"
MAX_CACHE_BYTES = 2 * 2**30
# Flags of XLA: what YNNPACK computes, and whether oneDNN, which is in the wheels for x86, computes anything.
_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "-individual_convolution"}
_ONEDNN = {"xla_cpu_experimental_onednn_custom_call": "true"}
_MIN_COMPILE_SECONDS = 0.2  # smaller functions compile about as fast as they are read


def prepare(*, keep_compiled: bool = False) -> None:
    """Makes JAX fast on a CPU; without effect on other devices. Call it once, at the start of a program.

    See `keep_freed_memory`, `use_fast_convolutions` and `use_every_core`; `experiments/benchmarks/README.md`
    shows the gain of each.

    Args:
        keep_compiled: for a program that starts often and runs for a short time, such as `jaxldm sample`:
            leaves oneDNN out, so that `use_compilation_cache`, called next, keeps every function. For a
            training leave it False.
    """
    keep_freed_memory()
    use_fast_convolutions(onednn=not keep_compiled)
    use_every_core()


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the system. Returns whether it did.

    XLA allocates the temporary buffer of a compiled function in each call. By default glibc gets it from the
    kernel every time, which faults in every page: a third of a training step. One arena, no mmap and no
    trimming (mallopt(3)) avoid that. Call it before the threads of JAX's CPU client start. Other C libraries
    and systems are not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])


def use_fast_convolutions(*, onednn: bool = True) -> bool:
    """Makes XLA compute convolutions on a CPU with oneDNN where it can, else Eigen. Returns whether it did.

    JAX 0.11 and 0.12 take YNNPACK for them, which is as fast at best, and needs up to four times as long:
    few output channels, small images with many channels, gradients of weights. oneDNN takes two thirds of
    Eigen's time where images are large and channels few, and the same elsewhere. Call it before the first
    computation. What XLA_FLAGS says about either stays; other versions do not get the flags, since XLA ends
    the process at one that it does not know, and JAX 0.10 gains nothing.

    Args:
        onednn: False leaves it out, and so does JAX_COMPILATION_CACHE_DIR: XLA cannot write a function with
            oneDNN's convolutions to a file, so that a compilation cache would not hold it.
    """
    given = os.environ.get("XLA_FLAGS", "")
    version = cast(Any, jaxlib).__version__.split(".")[:2]
    kept: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    wanted = _EIGEN | (_ONEDNN if onednn and kept is None else {})
    flags = [f"--{name}={value}" for name, value in wanted.items() if name not in given]
    if version not in (["0", "11"], ["0", "12"]) or not flags:
        return False
    os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()
    return True


def _has_onednn() -> bool:
    """Whether XLA was told to use oneDNN, and this process has no accelerator, whose functions have none."""
    platforms: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    plugins = platforms != "cpu" and any(find_spec(name) for name in ("jax_plugins", "libtpu"))
    said = any(f"{name}={value}" in os.environ.get("XLA_FLAGS", "") for name, value in _ONEDNN.items())
    return said and not plugins


def use_every_core() -> bool:
    """Makes JAX use the CPU as one device per core: a power of two, at most 8. Returns whether it did.

    XLA runs the small convolutions of a small model on one thread, whatever the number of cores; a batch that
    is split over as many devices as cores uses all of them. Call it before the first computation: after it,
    and where XLA_FLAGS or JAX_NUM_CPU_DEVICES set the number, nothing changes.
    """
    chosen: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    in_flags = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if in_flags or chosen > 0:
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jax.config.update("jax_num_cpu_devices", min(MAX_DEVICES, 1 << (cores.bit_length() - 1)))
    except RuntimeError:  # JAX has computed something already, which fixes its devices
        return False
    return True


def memory_bytes(device: Any = None) -> int:
    """Bytes of memory of an accelerator; without one, or for None, those that this process may use at most.

    Args:
        device: of JAX.
    """
    if device is not None and device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", sys.maxsize)
    return min(bound for bound in _host_memory_bounds() if bound > 0)


def _host_memory_bounds() -> Iterator[int]:
    """Of the machine, of the container and of the process."""
    yield sys.maxsize
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # another system, or "max": no bound
            yield int(Path(file).read_text())
    with contextlib.suppress(ImportError):
        import resource

        yield resource.getrlimit(resource.RLIMIT_AS)[0]  # -1: no bound


def user_cache_folder() -> Path | None:
    """The folder in which programs of this user cache files, by the conventions of the system.

    None for a user without a home folder, as in some containers.
    """
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        folder = "~/Library/Caches"
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return expanded(folder)
    except InvalidArgumentError:
        return None


def compilation_cache_folder() -> Path | None:
    """The folder of compiled functions that `JAXLDM_COMPILATION_CACHE` names, by default one of the user's.

    None where the variable is "off", and where the user has no home folder.
    """
    setting = os.environ.get(COMPILATION_CACHE, "")
    if setting.lower() in ("off", "0", "no", "false"):
        return None
    if setting:
        return expanded(setting)
    of_user = user_cache_folder()
    return of_user and of_user / "jaxldm" / "compiled"


def use_compilation_cache() -> Path | None:
    """Makes JAX keep compiled functions on disk, so that the next process does not compile them again.

    At most `MAX_CACHE_BYTES`: JAX removes the functions that were not used for longest. A cache folder that
    the environment already gives to JAX (JAX_COMPILATION_CACHE_DIR) stays as it is. A folder that cannot be
    written is not used. Nor is any where oneDNN computes (`use_fast_convolutions`), whose functions XLA
    cannot write: JAX would warn of each.

    Returns:
        The folder, or None without one.
    """
    given: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is not None:
        return Path(given)
    folder = compilation_cache_folder()
    if folder is None or _has_onednn():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # compiling again is slower, and no reason to stop
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
