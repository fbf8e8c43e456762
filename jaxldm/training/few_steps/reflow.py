"""Reflow: the plain loss on pairs of noise and what the teacher draws of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jaxldm import diffusion as D
from jaxldm import few_steps
from jaxldm.arguments import count, number
from jaxldm.training.few_steps.method import A_COUNT, Method, Setting, check_says_x0, check_steps_of_path
from jaxldm.training.step import LossFunction

NOISE, SAMPLE, SCALE = "noise", "sample", "scale"  # columns of pairs


def make_loss(setting: Setting) -> LossFunction:
    """Liu et al. 2022 with the times of Lee et al. 2024, on the teacher's own path."""
    path = setting.path

    def loss_fn(params, state, batch, key):
        noise, sample = batch[NOISE], batch[SAMPLE]
        u = few_steps.u_shaped_times(key, len(sample), setting.numbers["ends"])
        t = path.t_min + u * (path.t_noisy - path.t_min)
        scale = batch.get(SCALE, setting.guidance_scale[0])
        network = functools.partial(setting.network, params)
        return few_steps.reflow_loss(
            network, setting.prediction, sample, noise, t, setting.condition(batch, scale)
        )

    return loss_fn


def check(prediction: D.Prediction, num_steps: int | None, numbers: Mapping[str, Any]) -> None:
    """Refuse more steps of the teacher than its path has, besides."""
    check_says_x0(prediction)
    check_steps_of_path("teacher_steps", numbers["teacher_steps"], prediction.path)


REFLOW = Method(
    about="straightens the teacher's trajectories, on pairs of noise and sample",
    make_loss=make_loss,
    numbers={"ends": 4.0, "pairs": 20_000, "teacher_steps": 20},
    limits={"ends": number(above=0, high=50), "pairs": A_COUNT, "teacher_steps": count(1, 10_000)},
    training={"epochs": 6},
    check=check,
    adapts=True,
    pairs=True,
)
