"""Continuous-time consistency (sCM) from a teacher, on its own path seen as TrigFlow."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import number
from jaxldm.training.few_steps.method import (
    A_MEAN,
    A_WIDTH,
    TEACHER,
    Method,
    Setting,
    check_consistent,
    cleanest,
    noisiest,
)
from jaxldm.training.step import LossFunction


def make_loss(setting: Setting) -> LossFunction:
    """Lu and Song 2025, Algorithm 1, of the network moved to TrigFlow."""
    numbers = setting.numbers
    trig = few_steps.TrigFlow(sigma_data=numbers["sigma_data"])
    low, high = (
        float(trig.time(ratio)) for ratio in (cleanest(setting.path, 0.02), noisiest(setting.path, 80.0))
    )
    warm = max(1, round(setting.updates * numbers["warmup"]))

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0, scale = setting.examples(batch, keys[0]), setting.scales(batch, keys[1])
        condition = setting.condition(batch, scale)
        t = few_steps.trig_times(keys[2], len(x_0), numbers["mean"], numbers["std"], numbers["sigma_data"])
        t = jnp.clip(t, low, high)
        x_t = few_steps.noised(trig, x_0, jax.random.normal(keys[3], x_0.shape), t)
        teacher = D.on_path(setting.teacher(state.frozen[TEACHER], condition, scale), trig)
        student = D.on_path(setting.student(params, condition), trig)
        return few_steps.continuous_consistency_loss(
            lambda x, t: few_steps.trig_teacher_slope(student, x, t),
            x_t,
            t,
            few_steps.trig_teacher_slope(teacher, x_t, t),
            warmth=jnp.minimum(state.step / warm, 1.0),
            difference=numbers["difference"] or None,
            ends=(low, high),
        )

    return loss_fn


SCM = Method(
    about="continuous-time consistency (sCM): the tangent of the trajectory in place of a step",
    make_loss=make_loss,
    solver="lcm",
    # As ECT's times: tau is for data of standard deviation 0.5. Teachers know a thousand timesteps, and their
    # derivative by the time is mostly noise; a difference of 0 takes it all the same.
    numbers={"sigma_data": 1.0, "mean": -0.4, "std": 1.4, "warmup": 0.3, "difference": 0.1},
    limits={
        "sigma_data": number(above=0, high=1000),
        "mean": A_MEAN,
        "std": A_WIDTH,
        "warmup": number(0, 1),
        "difference": number(0, 1),
    },
    training={"epochs": 8, "learning_rate": 5e-4},
    check=check_consistent,
    adapts=True,
)
