"""Methods without a teacher: mean flows, shortcut models, consistency training (iCT) and drifting."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import count, number, refuse
from jaxldm.diffusion.guidance import broadcast_null
from jaxldm.diffusion.paths import per_image
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.few_steps.method import (
    A_COUNT,
    A_DISTANCE,
    A_MEAN,
    A_WIDTH,
    TABLE,
    Method,
    Setting,
    averaged,
    check_consistent,
    check_says_x0,
    cleanest,
    named,
    noisiest,
    root_dim,
)
from jaxldm.training.step import LossFunction

LEVELS = 10, 1280  # of improved consistency training, at first and at last


def check_straight(prediction: D.Prediction, *others: Any) -> None:
    """Refuse anything but the velocity of the straight path."""
    if prediction.name != "flow" or not isinstance(prediction.path, D.Flow):
        raise InvalidArgumentError(
            f"mean flows and shortcuts are velocities on the straight path, not {prediction.name} on the "
            f"{prediction.path.name} path: give the recipe prediction=D.flow(D.Flow())"
        )


def make_mean_flow_loss(setting: Setting, loss: Callable[..., Any] | None = None) -> LossFunction:
    """Geng et al. 2025, Algorithm 1, with guidance inside the target (section 4.2)."""
    numbers, loss = setting.numbers, few_steps.mean_flow_loss if loss is None else loss

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 5)
        x_0, scale = setting.examples(batch, keys[0]), setting.scales(batch, keys[1])
        r, t = few_steps.interval_times(keys[2], len(x_0), numbers["equal"], numbers["mean"], numbers["std"])
        epsilon = jax.random.normal(keys[3], x_0.shape)
        condition = named(setting.condition(batch, scale))
        null = {**condition, **broadcast_null(named(setting.on.nulls()), named(setting.on.of(batch)))}

        def u(z, r, t, condition):
            return setting.network(params, z, t, {**condition, "step_size": t - r})

        velocity = epsilon - x_0
        if setting.guidance_scale != (1.0, 1.0):
            kappa = numbers["kappa"]
            omega = scale * (1 - kappa)
            z = few_steps.noised(setting.path, x_0, epsilon, t)
            guided = few_steps.guided_velocity(u, z, t, velocity, condition, null, omega, kappa)
            dropped = jax.random.bernoulli(keys[4], setting.condition_dropout, (len(x_0),))
            velocity = jnp.where(per_image(dropped, x_0), velocity, guided)
            condition = jax.tree.map(lambda own, other: _chosen(dropped, other, own), condition, null)
        still = int(numbers["equal"] * len(x_0)) if setting.whole_batch else 0
        return loss(u, x_0, epsilon, r, t, condition, velocity=velocity, power=numbers["power"], still=still)

    return loss_fn


def _chosen(which: Any, first: Any, second: Any) -> Any:
    """The first where `which` [B] says so, else the second."""
    return jnp.where(which.reshape(-1, *[1] * (second.ndim - 1)), first, second)


def make_shortcut_loss(setting: Setting) -> LossFunction:
    """Frans et al. 2025, Algorithm 1: a part of the batch learns that one step is two of half the size."""
    numbers = setting.numbers

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 5)
        x_0 = setting.examples(batch, keys[0])
        epsilon = jax.random.normal(keys[1], x_0.shape)
        first = min(max(1, round(len(x_0) * numbers["consistency_share"])), len(x_0) - 1)
        condition = named(setting.on.of(batch))
        condition = D.drop_condition(keys[2], condition, named(setting.on.nulls()), setting.condition_dropout)
        t, d = few_steps.shortcut_times(keys[3], len(x_0), numbers["smallest"])
        anywhere = jax.random.uniform(keys[4], (len(x_0),))
        t = jnp.where(jnp.arange(len(x_0)) < first, t, anywhere)

        def network(own: Any, x: Any, t: Any, d: Any, condition: Mapping[str, Any]) -> Any:
            return setting.network(own, x, t, {**condition, "step_size": d})

        own = jax.tree.map(lambda leaf: leaf[:first], condition)
        x_t = few_steps.noised(setting.path, x_0[:first], epsilon[:first], t[:first])
        average = functools.partial(network, averaged(state, params))
        target = few_steps.shortcut_target(average, x_t, t[:first], d[:first], own)
        student = functools.partial(network, params)
        return few_steps.shortcut_loss(student, x_0, epsilon, t, d, target, condition)

    return loss_fn


def make_ict_loss(setting: Setting) -> LossFunction:
    """Song and Dhariwal 2024: pairs of neighbours on a grid that doubles, the target the network itself."""
    path, numbers = setting.path, setting.numbers
    ends = cleanest(path, 0.002), noisiest(path, 80.0)
    levels = {
        step: few_steps.num_levels(step, setting.updates, *LEVELS)
        for step in range(0, setting.updates, max(1, setting.updates // 64))
    }
    counts = sorted(set(levels.values()))
    starts = jnp.asarray([min(step for step, found in levels.items() if found == n) for n in counts])

    def pairs(number: int) -> Callable[[Any, int], Any]:
        sigmas = few_steps.karras_levels(number, *ends)
        p = few_steps.interval_probabilities(sigmas, numbers["mean"], numbers["std"])
        return lambda key, size: few_steps.draw_neighbours(key, sigmas, size, p)

    def draw_pair(draw, size, key):
        return draw(key, size)

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0 = setting.examples(batch, keys[0])
        condition = D.drop_condition(
            keys[1], setting.on.of(batch), setting.on.nulls(), setting.condition_dropout
        )
        size = len(x_0)
        draws = [functools.partial(draw_pair, pairs(number), size) for number in counts]
        t, s = jax.lax.switch(jnp.sum(state.step >= starts) - 1, draws, keys[2])
        rows, epsilon = (path.time(t), path.time(s)), jax.random.normal(keys[3], x_0.shape)
        x_t, x_s = (few_steps.noised(path, x_0, epsilon, row) for row in rows)
        f = setting.student(params, condition)
        distance = few_steps.pseudo_huber(numbers["huber"] * root_dim(x_0))
        weight = 1 / (t - s)
        return few_steps.consistency_loss(f, f, x_t, rows[0], x_s, rows[1], distance=distance, weight=weight)

    return loss_fn


def check_one_step(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """Refuse more than one step, and a network whose x_0 is undefined at pure noise."""
    check_says_x0(prediction)
    if num_steps != 1:
        raise InvalidArgumentError(
            f"drifting has no path between noise and image: num_steps must be 1, not {num_steps}"
        )
    path = prediction.path
    noise = np.full((1, 1, 1, 1), float(path.sigma(path.t_noisy)), np.float32)
    size = abs(float(np.squeeze(prediction.to_x0(np.zeros_like(noise), noise, np.full(1, path.t_noisy)))))
    if not 0.1 < size < 10:  # copies of one picture do not push each other apart
        raise InvalidArgumentError(
            f"drifting begins with what a network of zeros draws, which with {prediction.name} on the "
            f"{path.name} path is noise of size {size:.2g}, and has to be about that of images, 1: give the "
            "recipe prediction=D.flow(D.Flow())"
        )


def make_drifting_loss(setting: Setting) -> LossFunction:
    """Deng et al. 2026: each update pushes some images of a few classes.

    Distances and forces are those of the latents themselves. In the paper they are of the features of a
    network that was trained on images.
    """
    numbers, path = setting.numbers, setting.path
    classes, size = numbers["classes"], numbers["images"]

    def loss_fn(params, state, batch, key):
        table = state.frozen[TABLE]
        keys = jax.random.split(key, 3)
        chosen = jax.random.permutation(keys[0], table.shape[0])[:classes]
        rows = jax.random.randint(keys[1], (len(chosen), size), 0, table.shape[1])
        wanted = table[chosen[:, None], rows].reshape(len(chosen), size, -1)
        noise = jax.random.normal(keys[2], (len(chosen) * size, *table.shape[2:])) * path.sigma(path.t_noisy)
        drawn = setting.student(params, jnp.repeat(chosen.astype(jnp.int32), size))(noise, path.t_noisy)
        drawn = drawn.reshape(len(chosen), size, -1)
        losses = [few_steps.drifting_loss(*one) for one in zip(drawn, wanted, strict=True)]
        return tuple(
            jax.tree.map(lambda *parts: sum(parts) / len(parts), *losses)  # of each class alike
        )

    return loss_fn


_TIMES = {"equal": 0.75, "mean": -0.4, "std": 1.0, "power": 1.0, "kappa": 0.0}
_LIMITS = {
    "equal": number(0, 1),
    "mean": A_MEAN,
    "std": A_WIDTH,
    "power": number(0, 10),
    "kappa": number(0, below=1),
}


def a_power_of_two(name: str, value: Any) -> int:
    """2, 4, 8, 16, ..."""
    found = count(2, 2**20)(name, value)
    if found & (found - 1):
        raise refuse(name, "2, 4, 8, 16, ...", value)
    return found


MEAN_FLOW = Method(
    about="the average velocity of a step, by a Jacobian-vector product; guidance inside",
    make_loss=make_mean_flow_loss,
    default_steps=1,
    numbers=_TIMES,
    limits=_LIMITS,
    check=check_straight,
    taught=False,
    inputs=("step_size",),
)
IMPROVED_MEAN_FLOW = MEAN_FLOW._replace(
    about="the same as a loss of the velocity itself",
    make_loss=functools.partial(make_mean_flow_loss, loss=few_steps.improved_mean_flow_loss),
)
SHORTCUT = Method(
    about="the length of a step as an input, for which one step is two of half the length",
    make_loss=make_shortcut_loss,
    guidance="outside",
    numbers={"consistency_share": 0.25, "smallest": 128},
    least_batch=2,
    limits={"consistency_share": number(above=0, below=1), "smallest": a_power_of_two},
    check=check_straight,
    taught=False,
    inputs=("step_size",),
)
ICT = Method(
    about="consistency training from nothing, on a grid of noise levels that doubles",
    make_loss=make_ict_loss,
    solver="lcm",
    guidance="outside",
    # As ECT's times: the log-normal is for data of standard deviation 0.5, latents have 1.
    numbers={"mean": -0.4, "std": 2.0, "huber": 0.00054},
    limits={"mean": A_MEAN, "std": A_WIDTH, "huber": A_DISTANCE},
    check=check_consistent,
    taught=False,
)
DRIFTING = Method(
    about="images pushed towards data and away from each other, without a path; one step",
    make_loss=make_drifting_loss,
    steps=1,
    guidance="none",
    numbers={"classes": 2, "images": 32, "per_class": 256},
    limits={"classes": A_COUNT, "images": count(2, 4096), "per_class": A_COUNT},
    check=check_one_step,
    tables="per_class",
    taught=False,
)
