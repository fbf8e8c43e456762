"""SiT in training: it is told its own time, and asked for the velocity towards the data."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import InvalidArgumentError
from jaxldm.training import RECIPES
from jaxldm.training.diffusion import build_denoiser, make_loss

SMOKE = RECIPES["smoke-dit"]
TINY = {"hidden_size": 16, "depth": 1, "num_heads": 2}


def recipe_with(prediction):
    diffusion = dataclasses.replace(
        SMOKE.diffusion, preset="sit-s-8", overrides=TINY, prediction=prediction, condition_dropout=0.0
    )
    return dataclasses.replace(SMOKE, diffusion=diffusion)


class Exact(models.SiT):
    """Knows that every image is 0: x = (1 - s) eps at its time s, so the velocity to the data is -eps."""

    def __call__(self, x, t, labels=None, train=False):
        return -x / (1 - t)[:, None, None, None]


class Reversed(Exact):
    """The same velocity from the data to the noise."""

    def __call__(self, x, t, labels=None, train=False):
        return -super().__call__(x, t)


def test_the_exact_velocity_has_no_loss():
    recipe = recipe_with(D.flow(D.Flow()))
    module = build_denoiser(recipe, (8, 8, 1), 3)
    assert type(module) is models.SiT and not module.config.learn_sigma
    batch = {"mean": np.zeros((16, 8, 8, 1), np.float32), "label": np.zeros(16, np.int32)}

    def loss(kind):
        return make_loss(recipe.diffusion, kind(module.config))({}, None, batch, jax.random.key(0))[0]

    assert loss(Exact) < 1e-8 and 3 < loss(Reversed) < 5  # (2 eps)^2


def test_a_discrete_path_is_refused():
    with pytest.raises(InvalidArgumentError, match="continuous path"):
        build_denoiser(recipe_with(D.epsilon(D.VP.named("linear"))), (8, 8, 1), 3)
