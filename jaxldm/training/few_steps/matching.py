"""Distribution matching distillation: a generator of a few steps, and a critic that follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import number
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.few_steps.consistency import ORIGINAL_STEPS
from jaxldm.training.few_steps.method import (
    A_COUNT,
    TEACHER,
    Method,
    Setting,
    check_says_x0,
    counts_timesteps,
)
from jaxldm.training.state import Params
from jaxldm.training.step import Player

STUDENT, CRITIC = "student", "critic"


def of_student(params: Params) -> Params:
    """The parameters of the student among those of players; any others as they are."""
    return params.get(STUDENT, params)


def check(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """Refuse more steps than the student's solver has, besides."""
    check_says_x0(prediction)
    if cast(int, num_steps) > ORIGINAL_STEPS:
        raise InvalidArgumentError(
            f"a student by dmd has 1 to {ORIGINAL_STEPS} steps, not {num_steps}: give another --num-steps"
        )


def times_of(path: D.Path, num_steps: int) -> Any:
    """The times at which the student is asked, the same as when it draws.

    Those of an `LCMScheduler`, with which it draws in other programs, too: for four steps 999, 759, 499 and
    259, where DMD2 has 999, 749, 499 and 249, as that scheduler takes whole places among the 50 timesteps
    999, 979, ... 19, and 50 is no multiple of 4.
    """
    if not counts_timesteps(path):
        return np.asarray(D.make_grid(path, num_steps).t)[:-1]
    original = min(ORIGINAL_STEPS, cast(int, path.num_train_timesteps))
    return D.lcm_timesteps(num_steps, cast(int, path.num_train_timesteps), original).astype(np.float32)


def make_players(setting: Setting) -> Sequence[Player]:
    """The generator, which moves once in so many updates of its critic (Yin et al. 2024, DMD2).

    A critic of several steps takes the step that drew an image. Else it would learn the mixture of what they
    draw, and that mixture alone would come to the teacher's distribution, none of the steps.
    """
    path, times = setting.path, times_of(setting.path, cast(int, setting.num_steps))

    def critic_of(params: Params, condition: Any, began: Any) -> Callable[..., Any]:
        """(x, t, any condition) -> output of the critic, for images of this condition and step."""
        if setting.critic is None:
            return lambda x, t, _: setting.network(params, x, t, condition)
        own = setting.critic
        return lambda x, t, _: own(params, x, t, condition, jnp.broadcast_to(began, x.shape[:1]))

    def draw(params: Params, batch: Mapping[str, Any], key: Any) -> tuple[Any, Any, Any, Any]:
        """(images, their condition, their scale, the time at which the step began that drew them)."""
        keys = jax.random.split(key, 4)
        shape, scale = batch["mean"].shape, setting.scales(batch, keys[0])
        condition = setting.condition(batch, scale)
        generate = setting.student(params, condition)
        still = setting.student(jax.lax.stop_gradient(params), condition)
        noise = jax.random.normal(keys[1], shape)
        row = jax.random.randint(keys[2], (), 0, len(times))
        x = few_steps.backward_simulation(keys[3], still, path, noise * path.sigma(times[0]), times, row)
        began = jnp.asarray(times)[row]
        return generate(x, began), condition, scale, began

    def generator(params, state, batch, key):
        drawing, noising, timing = jax.random.split(key, 3)
        images, condition, scale, began = draw(params, batch, drawing)
        own = critic_of(state.params[CRITIC], condition, began)
        share = jax.random.uniform(timing, (len(images),), jnp.float32, 0.02, 0.98)
        t = path.t_min + share * (path.t_noisy - path.t_min)
        gradient = few_steps.distribution_matching_gradient(
            setting.teacher(state.frozen[TEACHER], condition, scale),
            D.denoiser(lambda x, t: own(x, t, None), setting.prediction),
            jax.lax.stop_gradient(images),
            path,
            jax.random.normal(noising, images.shape),
            t,
        )
        return few_steps.distribution_matching_loss(images, jax.lax.stop_gradient(gradient))

    def critic(params, state, batch, key):
        drawing, learning = jax.random.split(key)
        images, condition, _, began = draw(state.params[STUDENT], batch, drawing)
        images = jax.lax.stop_gradient(images)
        return D.diffusion_loss(learning, critic_of(params, condition, began), setting.prediction, images)

    every = setting.numbers["critic_updates"]
    slower = setting.optimizer_of(every, setting.numbers["generator_rate"])
    return (
        Player(STUDENT, generator, slower, setting.ema_decay, every=every),
        Player(CRITIC, critic, setting.optimizer),
    )


DMD = Method(
    about="distribution matching (DMD2 without a discriminator): what a critic tells from the teacher",
    make_loss=make_players,
    solver="lcm",
    steps=4,
    numbers={"critic_updates": 2, "generator_rate": 0.2},
    limits={"critic_updates": A_COUNT, "generator_rate": number(high=1, above=0)},
    training={"epochs": 8, "learning_rate": 1e-3},
    check=check,
    critic=True,
)
