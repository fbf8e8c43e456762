"""The registry and the room's exports are one list."""

import pytest

from jaxldm import models
from jaxldm.models.registry import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_and_configs_of_the_registry_are_exported(name):
    for kind in ARCHITECTURES[name]:
        assert kind.__name__ in models.__all__ and getattr(models, kind.__name__) is kind


def test_every_preset_belongs_to_an_architecture():
    for name, config in models.PRESETS.items():
        assert type(models.build(name)) is ARCHITECTURES[models.class_name(config)][0]
