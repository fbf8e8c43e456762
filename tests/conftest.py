"""Every test runs with strict rank and dtype promotion, on eight virtual CPU devices."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the suite's time is compiling; what is tested does not depend on how hard XLA optimises, nor on
# which of its two generators of code it takes: the older one compiles in half the time. (Set it to 0 for
# a run with the code that users run; it takes much longer.) XLA refuses to start with a flag that it does not
# know, so only the version that these were tried with is told them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
HASTY = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
jax.config.update("jax_disable_most_optimizations", HASTY)

# The first example of a property compiles; a deadline per example would only measure that.
settings.register_profile(
    "jaxldm", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("jaxldm")


@pytest.fixture
def optimized():
    """The code that users run, inside one test: for those whose bound leaves little room for rounding."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", HASTY)


@pytest.fixture
def x64():
    """Double precision inside one test."""
    with jax.enable_x64(True):
        yield
