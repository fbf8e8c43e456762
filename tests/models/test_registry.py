"""The registry and the room's exports are one list."""

import jax
import pytest

from jaxldm import models
from jaxldm.models import registry
from jaxldm.models.registry import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_and_configs_of_the_registry_are_exported(name):
    for kind in ARCHITECTURES[name]:
        assert kind.__name__ in models.__all__ and getattr(models, kind.__name__) is kind


def test_every_preset_belongs_to_an_architecture():
    for name, config in models.PRESETS.items():
        assert type(models.build(name)) is ARCHITECTURES[models.class_name(config)][0]


def test_the_shapes_of_equal_modules_are_found_once(monkeypatch):
    """What a caller does to them stays its own, and double precision is found anew."""
    found, real = [], registry.shapes_of
    monkeypatch.setattr(registry, "shapes_of", lambda *inputs: found.append(inputs) or real(*inputs))
    sizes = {"hidden_size": 12, "depth": 1, "num_heads": 2, "sample_size": 4, "patch_size": 2}
    first, second = (models.shapes(models.build("tiny-dit", **sizes)) for _ in range(2))
    assert len(found) == 1 and first == second
    first["blocks_0"].clear()
    assert second["blocks_0"] and second == models.shapes(models.build("tiny-dit", **sizes))
    assert models.shapes(models.build("tiny-dit", **sizes | {"depth": 2})) != second and len(found) == 2
    with jax.enable_x64(True):
        models.shapes(models.build("tiny-dit", **sizes))
    assert len(found) == 3
