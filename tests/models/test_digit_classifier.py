"""The digit classifier takes images of its own size."""

import jax
import jax.numpy as jnp
import pytest

from jaxldm import models

SMALL = {"sample_size": 8, "block_out_channels": (4, 4, 4), "num_features": 8}


def test_images_of_another_size_do_not_pass():
    module = models.build("digit-classifier", **SMALL)
    params = models.init(module, jax.random.key(0))
    with pytest.raises(AssertionError):
        module.apply({"params": params}, jnp.zeros([2, 9, 8, 1]))
