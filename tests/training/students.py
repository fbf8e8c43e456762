"""The smallest teacher, its students, and how often one of them computes what it draws."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import models, pipelines
from jaxldm.training import distill_recipe

SMALL = {"hidden_size": 16, "depth": 1, "num_heads": 2}
SIZES = {**SMALL, "patch_size": 7, "sample_size": 28, "in_channels": 1}


def random_params(module):
    """Of a network that looks at all its inputs, where a new one is 0 whatever it is given."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: (0.1 * rng.normal(size=spec.shape)).astype(np.float32), models.shapes(module)
    )


def pipeline(prediction=None, random=False, **changes):
    """A teacher that nobody trained."""
    module = models.build("tiny-dit", **SIZES, num_classes=10, **changes)
    params = random_params(module) if random else models.init(module, jax.random.key(0))
    network = pipelines.Network(module, params)
    return pipelines.class_to_image(network, prediction or D.v(D.VP.named("cosine")))


def student(teacher, method, **options):
    """The recipe of a student: two updates an epoch."""
    options = {"epochs": 4, "batch_size": 32, "save_every": 1, **options}
    recipe = distill_recipe(teacher, method, dataset="mnist5k", **options)
    return dataclasses.replace(recipe, max_train_images=64)


def evaluations(pipe, **options):
    """How many images the network is given for one that is drawn."""
    seen = []
    call = pipe.denoiser.module.__class__.__call__
    jax.clear_caches()  # a program that was compiled before counts for nobody, or for who compiled it

    def counted(self, x, *inputs, **more):
        jax.debug.callback(lambda: seen.append(len(x)))
        return call(self, x, *inputs, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.denoiser.module.__class__, "__call__", counted)
        pipe = pipe.replace(images_per_device=1)
        images = pipe(jax.random.key(0), [3], batch_size=1, devices=jax.devices()[:1], **options)
        jax.effects_barrier()
    assert np.isfinite(images).all()
    return sum(seen)
