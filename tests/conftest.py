"""Every test runs with strict rank and dtype promotion, on eight virtual CPU devices."""

import contextlib
import ctypes
import gc
import os
import pathlib
import shutil
import sys
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The arrays of PyTorch and NumPy are tiny here, and threads that wait for each other take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAXLDM_COMPILATION_CACHE", "off")  # nothing of the tests goes into the user's cache
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of the process that started them
    os.environ["JAXLDM_DATA_DIR"] = tempfile.mkdtemp(prefix="jaxldm-data-")  # nor into the user's data sets
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the suite's time is compiling, so XLA compiles the quick way here: with most of its optimizations
# off, and with the older of its two code generators, which takes half the time. `make test-optimized` sets
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 to compile as users do, and takes much longer; the fixture `optimized`
# below does so for the tests where it matters. XLA refuses to start with a flag that it does not know, so
# only the version that these flags were tried with is given them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

import annotations
import jax
import kept_programs
import pytest
import references
import thorough
from hypothesis import HealthCheck, settings

# Before anything of `jaxldm` is imported.
annotations.install("jaxldm")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
kept_programs.install()
# Imports and tracing make millions of small objects: to look for cycles among them as often as Python does by
# itself takes a twentieth of the time.
gc.set_threshold(20_000, 20, 20)
UNOPTIMIZED = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", UNOPTIMIZED)

# The first example of a property compiles; a deadline per example would only measure that.
settings.register_profile(
    "jaxldm", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("jaxldm")

# Folders whose tests run with annotations checked.
CHECKED = {"nn", "models", "diffusion", "schedulers", "metrics", "data", "checkpoints"}
CHECKED |= {"training", "pipelines", "serving", "cli", "faults", "experiments", "few_steps"}


@contextlib.contextmanager
def optimizing():
    """Compile as users do, here and in child processes.

    What was compiled before is dropped at both ends, as compiled functions do not remember the setting.
    """
    if not UNOPTIMIZED:
        yield
        return
    jax.clear_caches()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimized():
    """Compile one test as users do. A file with `OPTIMIZED = True` does so for all, its fixtures too."""
    with optimizing():
        yield


@pytest.fixture
def x64():
    """Double precision inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def checked_annotations(request):
    """Check annotations in the folders `CHECKED`, but not in tests marked `unchecked`."""
    folder = request.path.relative_to(pathlib.Path(__file__).parent).parts[0]
    with annotations.checking(folder in CHECKED and "unchecked" not in request.keywords):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Random weights of a reference in PyTorch do not depend on the tests before, also in fixtures."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_file(request):
    """Around a file of tests: `OPTIMIZED`, a first key, and at the end a bound on the memory of the process.

    JAX keeps every compiled function while the process lives, which is gigabytes for the whole suite.
    """
    annotations.begin_file()
    with optimizing() if getattr(request.module, "OPTIMIZED", False) else contextlib.nullcontext():
        jax.random.key(0)  # else the first key of a test that counts compilations may be one
        yield
    # What this does not free is mostly the programs of `kept_programs`, the last to go: they save most time.
    for forget in (jax.clear_caches, kept_programs.forget):
        if resident_memory() > memory_limit():
            forget()
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise


def memory_limit() -> float:
    """Bytes for one process: a sixth of the machine's, so that two of them and what they start have room."""
    from jaxldm import host  # not before `annotations.install`

    return min(max(host.memory_bytes() / 6, 1.2e9), 4e9)


def resident_memory() -> int:
    """Bytes of memory that this process has in use; 0 where the system does not say."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def without_torch(config) -> bool:
    return "not torch" in (config.getoption("markexpr") or "")


def pytest_configure(config):
    if without_torch(config):
        references.stand_in_for_missing()


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAXLDM_DATA_DIR"], ignore_errors=True)


def pytest_ignore_collect(collection_path, config):
    if collection_path.name.startswith("test_") and without_torch(config):
        return references.needs_reference_everywhere(collection_path) or None
    return None


def pytest_terminal_summary(terminalreporter, config):
    if without_torch(config):
        files = (references.ROOT / "tests").rglob("test_*.py")
        count = sum(references.needs_reference_everywhere(path) for path in files)
        terminalreporter.write_line(
            f"left out by -m 'not torch': {count} whole files, and what was deselected"
        )


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", None) in references.dependents(item.path):
            item.add_marker("torch")
        if thorough.has(item.nodeid):
            item.add_marker("thorough")


def pytest_collection_finish():
    references.remove_stand_ins()
    gc.collect()
    gc.freeze()  # PyTorch, diffusers and the like stay
