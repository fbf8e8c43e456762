"""Guidance distillation: the scale as an input of the network, at the price of one evaluation."""

from __future__ import annotations

import jax

from jaxldm import few_steps
from jaxldm.diffusion.guidance import broadcast_null
from jaxldm.diffusion.training_times import default_training_times
from jaxldm.training.few_steps.method import TEACHER, Method, Setting, named
from jaxldm.training.step import LossFunction


def make_loss(setting: Setting) -> LossFunction:
    """Meng et al. 2023, stage one."""

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0 = setting.examples(batch, keys[0])
        low, high = setting.guidance_scale
        scale = few_steps.draw_scales(keys[1], len(x_0), low, high)
        t = default_training_times(setting.path)(keys[2], (len(x_0),), setting.path).astype(x_0.dtype)
        condition = named(setting.on.of(batch))
        null = broadcast_null(named(setting.on.nulls()), condition)

        def student(x, t, condition, scale):
            return setting.network(params, x, t, {**condition, **setting.scale_input(scale)})

        def teacher(x, t, condition):
            return setting.network(state.frozen[TEACHER], x, t, {**condition, **setting.scale_input(scale)})

        epsilon = jax.random.normal(keys[3], x_0.shape)
        return few_steps.guidance_distillation_loss(
            student, teacher, setting.prediction, x_0, epsilon, t, scale, condition, null
        )

    return loss_fn


GUIDANCE = Method(
    about="guidance in one evaluation: the network takes its scale; the steps stay as many",
    make_loss=make_loss,
    default_steps=None,
    scales=(1.0, 7.5),
    training={"epochs": 6},
)
