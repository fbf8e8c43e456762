"""Progressive distillation in rounds: a student has half its teacher's steps, and is the next teacher."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import count
from jaxldm.errors import InvalidArgumentError
from jaxldm.training.few_steps.method import (
    TEACHER,
    Method,
    Setting,
    averaged,
    check_says_x0,
    check_steps_of_path,
)
from jaxldm.training.state import TrainState
from jaxldm.training.step import LossFunction

MOST_STEPS = 2**16


def rounds_of(num_steps: int | None, numbers: Mapping[str, Any]) -> int:
    """How often the steps are halved."""
    return (numbers["start_steps"] // cast(int, num_steps)).bit_length() - 1


def check(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """Refuse steps that do not come out by halving, and a teacher whose x_0 is undefined."""
    check_says_x0(prediction)
    start, end = numbers["start_steps"], cast(int, num_steps)
    halved = [start >> k for k in range(1, start.bit_length()) if start % (1 << k) == 0]
    if end not in halved:
        raise InvalidArgumentError(
            f"progressive distillation halves the steps: {start} of the teacher become "
            f"{', '.join(map(str, halved)) or 'none'}, not {end}: give another --num-steps, or another start "
            f"as in --options start_steps={2 * end}"
        )
    check_steps_of_path("start_steps", start, prediction.path)


def make_loss(setting: Setting) -> LossFunction:
    """`few_steps.progressive_loss` of the round that the state is in."""
    rounds, start = rounds_of(setting.num_steps, setting.numbers), setting.numbers["start_steps"]
    times = [np.asarray(D.make_grid(setting.path, start >> number).t) for number in range(rounds)]
    length = max(1, setting.updates // rounds)

    def loss_fn(params, state, batch, key):
        keys = jax.random.split(key, 4)
        x_0, scale = setting.examples(batch, keys[0]), setting.scales(batch, keys[1])
        number = jnp.minimum(state.step // length, rounds - 1)
        draws = [functools.partial(few_steps.draw_double_steps, times=t, batch_size=len(x_0)) for t in times]
        t, middle, s = jax.lax.switch(number, draws, keys[2])
        # From the second round on the teacher is a student, which has the guidance inside.
        condition = setting.condition(batch, scale)
        always = rounds == 1 or (np.ndim(scale) == 0 and scale == 1)
        guided = scale if always else jnp.where(number == 0, scale, 1.0)
        teacher = setting.teacher(state.frozen[TEACHER], condition, guided)
        return few_steps.progressive_loss(
            functools.partial(setting.network, params),
            few_steps.ddim_jump(teacher),
            setting.prediction,
            x_0,
            jax.random.normal(keys[3], x_0.shape),
            t,
            middle,
            s,
            condition,
        )

    return loss_fn


def next_round(state: TrainState) -> TrainState:
    """The student becomes the teacher, and goes on from there."""
    student = averaged(state, state.params)
    return state.replace(
        params=student,
        ema_params=None if state.ema_params is None else student,
        frozen={**state.frozen, TEACHER: student},
    )


PROGRESSIVE = Method(
    about="halves the steps in rounds, each student being the next teacher",
    make_loss=make_loss,
    steps=4,
    numbers={"start_steps": 16},
    limits={"start_steps": count(2, MOST_STEPS)},
    training={"epochs": 8},
    check=check,
    rounds=rounds_of,
    next_round=next_round,
)
