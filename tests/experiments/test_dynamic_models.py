"""The script about dynamic transformers: networks that there are, and what a picture costs."""

import dataclasses

import numpy as np
import pytest

from experiments.less_compute import dynamic
from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import InvalidArgumentError


def test_every_network_can_be_built():
    for model in dynamic.MODELS.values():
        models.build(model.preset, **model.overrides)
    assert set(dynamic.QUICK) <= dynamic.MODELS.keys()
    with pytest.raises(InvalidArgumentError, match="models must be of DiT-Tiny, trained on"):
        dynamic.Dynamic(models=("DyDiT",)).fitted()


def test_a_picture_costs_what_each_of_its_steps_does():
    module = models.build("tiny-adaptive-depth", time_groups=2, plan=("1000", "1111"))
    cheap, whole = (models.count_macs(part) for part in models.planned_groups(module))
    grid = D.make_grid(D.VP.named("cosine"), 10)
    noisy = int(np.sum(np.asarray(grid.t)[:10] >= 500))
    assert 0 < noisy < 10
    assert dynamic.macs_a_picture(module, grid) == pytest.approx((noisy * whole + (10 - noisy) * cheap) / 1e9)
    plain = models.build("tiny-dit")
    assert dynamic.macs_a_picture(plain, grid) == pytest.approx(10 * models.count_macs(plain) / 1e9)
    fields = dataclasses.replace(module.config, plan=("1111", "1111"))
    assert models.count_macs(models.from_config(fields)) == models.count_macs(plain)
