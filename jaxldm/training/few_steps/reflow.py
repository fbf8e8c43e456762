"""Reflow: the plain loss on pairs of noise and what the teacher draws of it."""

from __future__ import annotations

import functools

from jaxldm import few_steps
from jaxldm.training.few_steps.method import Method, Setting, check_says_x0
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


REFLOW = Method(
    about="straightens the teacher's trajectories, on pairs of noise and sample",
    make_loss=make_loss,
    numbers={"ends": 4.0, "pairs": 20_000, "teacher_steps": 20},
    training={"epochs": 6},
    check=check_says_x0,
    adapts=True,
    pairs=True,
)
