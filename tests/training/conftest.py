"""What several files of this folder use."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import pytest

from jaxldm import models


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """The second run of the same recipe finds the programs of the first on disk."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def shapes_once():
    """The shapes of a network are found once, where one folder is opened again and again."""
    real, cached = models.shapes, functools.cache(models.shapes)

    def shapes(module):
        found = cached(module) if isinstance(module, nn.Module) else real(module)
        return jax.tree.map(lambda leaf: leaf, found)

    with mock.patch.object(models, "shapes", shapes):
        yield
