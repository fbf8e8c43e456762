"""Consistency models from a teacher: latent consistency (LCM), distillation (CD), easy tuning (ECT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import count, number
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.few_steps.method import (
    A_DISTANCE,
    A_MEAN,
    A_WIDTH,
    TEACHER,
    Method,
    Setting,
    averaged,
    check_consistent,
    check_timesteps,
    cleanest,
    noisiest,
    root_dim,
    rows_of,
)
from jaxldm.training.step import LossFunction

CLOSEST = 2**16  # easy tuning's last pairs, t / (t - s): more is lost in float32
ORIGINAL_STEPS = 50  # of latent consistency models, as their schedulers count


def make_lcm_loss(setting: Setting) -> LossFunction:
    """Luo et al. 2023, Algorithm 1: f at t and where one step of the guided teacher leads to."""
    path, total = setting.path, cast(int, setting.path.num_train_timesteps)
    huber = few_steps.pseudo_huber(setting.numbers["huber"])
    original = min(ORIGINAL_STEPS, total)
    skipped = total // original

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0, scale = setting.examples(batch, keys[0]), setting.scales(batch, keys[1])
        condition = setting.condition(batch, scale)
        place = jax.random.randint(keys[2], (len(x_0),), 1, original + 1)
        t = (place * skipped - 1).astype(jnp.float32)
        s = jnp.maximum(t - skipped, 0)
        x_t = few_steps.noised(path, x_0, jax.random.normal(keys[3], x_0.shape), t)
        teacher = setting.teacher(state.frozen[TEACHER], condition, scale)
        f, target = (
            D.consistency_function(setting.student(own, condition))
            for own in (params, averaged(state, params))
        )
        x_s = few_steps.ddim_jump(teacher)(x_t, t, s)
        return few_steps.consistency_loss(f, target, x_t, t, x_s, s, distance=huber)

    return loss_fn


def make_cd_loss(setting: Setting) -> LossFunction:
    """Song et al. 2023, Algorithm 2: neighbours among Karras levels, a Heun step of the teacher between."""
    path, numbers = setting.path, setting.numbers
    ends = cleanest(path, 0.002), noisiest(path, 80.0)
    times = rows_of(path, few_steps.karras_levels(numbers["levels"], *ends))

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0, scale = setting.examples(batch, keys[0]), setting.scales(batch, keys[1])
        condition = setting.condition(batch, scale)
        row = jax.random.randint(keys[2], (len(x_0),), 0, len(times) - 1)
        t, s = (jnp.asarray(times, jnp.float32)[row + further] for further in (1, 0))
        x_t = few_steps.noised(path, x_0, jax.random.normal(keys[3], x_0.shape), t)
        teacher = setting.teacher(state.frozen[TEACHER], condition, scale)
        x_s = few_steps.heun_jump(teacher)(x_t, t, s)
        f, target = (setting.student(own, condition) for own in (params, averaged(state, params)))
        distance = few_steps.pseudo_huber(numbers["huber"] * root_dim(x_0))
        return few_steps.consistency_loss(f, target, x_t, t, x_s, s, distance=distance)

    return loss_fn


def make_ect_loss(setting: Setting) -> LossFunction:
    """Geng et al. 2025: pairs of one noise, which close up in stages; the target is the network itself."""
    path, numbers = setting.path, setting.numbers
    low, high = cleanest(path, 0.002), noisiest(path, 80.0)
    stages = numbers["stages"]
    length = max(1, setting.updates // stages)

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0 = setting.examples(batch, keys[0])
        condition = D.drop_condition(
            keys[1], setting.on.of(batch), setting.on.nulls(), setting.condition_dropout
        )
        ratio = jnp.exp(numbers["mean"] + numbers["std"] * jax.random.normal(keys[2], (len(x_0),)))
        t = jnp.clip(ratio, low, high)
        stage = jnp.minimum(state.step // length, stages - 1)
        q = numbers["q"]
        s = jax.lax.switch(
            stage, [lambda t, k=k: few_steps.easy_times(t, stage=k, q=q) for k in range(stages)], t
        )
        epsilon = jax.random.normal(keys[3], x_0.shape)
        rows = path.time(t), path.time(s)
        x_t, x_s = (few_steps.noised(path, x_0, epsilon, row) for row in rows)
        f = setting.student(params, condition)
        distance = few_steps.pseudo_huber(numbers["huber"] * root_dim(x_0))
        weight = 1 / (t - s)
        return few_steps.consistency_loss(f, f, x_t, rows[0], x_s, rows[1], distance=distance, weight=weight)

    return loss_fn


def check_easy(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """Refuse pairs that float32 cannot tell apart in the last stage, besides."""
    check_consistent(prediction)
    if numbers["stages"] * math.log(numbers["q"]) > math.log(CLOSEST):
        raise InvalidArgumentError(
            f"q ** stages is how close the pairs of ect come at last, and must be at most {CLOSEST}, got "
            f"{numbers['q']:g} ** {numbers['stages']}: give fewer stages, as in --options stages=4"
        )


LCM = Method(
    about="latent consistency: the end of the guided teacher's trajectory from any of its 50 timesteps",
    make_loss=make_lcm_loss,
    solver="lcm",
    numbers={"huber": 0.001},
    limits={"huber": A_DISTANCE},
    training={"epochs": 8, "ema_decay": 0.95},
    check=check_timesteps,
    adapts=True,
)
CD = Method(
    about="consistency distillation: the same, between 18 noise levels and by Heun's steps",
    make_loss=make_cd_loss,
    solver="lcm",
    numbers={"levels": 18, "huber": 0.00054},
    limits={"levels": count(2, 10_000), "huber": A_DISTANCE},
    training={"epochs": 8},
    check=check_consistent,
    adapts=True,
)
ECT = Method(
    about="easy consistency tuning: from the teacher's weights, without asking it",
    make_loss=make_ect_loss,
    solver="lcm",
    guidance="outside",
    # The log-normal times are for data of standard deviation 0.5: latents have 1.
    numbers={"mean": -0.4, "std": 2.0, "q": 4.0, "stages": 4, "huber": 0.00054},
    limits={
        "mean": A_MEAN,
        "std": A_WIDTH,
        "q": number(above=1, high=CLOSEST),
        "stages": count(1, 64),
        "huber": A_DISTANCE,
    },
    training={"epochs": 8},
    check=check_easy,
    adapts=True,
)
