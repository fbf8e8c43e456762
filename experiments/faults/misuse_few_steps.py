"""The valid calls that `misuse` starts from, of `jaxldm.few_steps`."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.faults.misuse_cases import FLOW, IMAGES, KEY, ONES, VP, Case, conditional, halve
from jaxldm import diffusion as D
from jaxldm import few_steps as few

LATE, EARLY = np.full(2, 0.8, np.float32), np.full(2, 0.4, np.float32)
SIGMAS = np.array([0.1, 0.5, 2.0])
TIMES = np.array([1.0, 0.5, 0.0])
SET = np.ones((3, 2), np.float32)


def jump(x_t, t, s):
    """A teacher's step."""
    return 0.5 * x_t


def with_interval(z, r, t, condition):
    """An average velocity."""
    return 0.5 * z


def of(at: str, /, *, words: Any = None, **arguments: Any) -> Case:
    """The case of a public function."""
    return Case(f"few.{at}", getattr(few, at), arguments, True, words or {})


def of_few_steps() -> list[Case]:
    """Of all its files."""
    return [*draws(), *teachers(), *distillation(), *consistency(), *without_a_teacher()]


def draws() -> list[Case]:
    """Times, scales and intervals."""
    batch = {"key": KEY, "batch_size": 2}
    return [
        of("halve", times=TIMES),
        of("draw_double_steps", **batch, times=TIMES),
        of("draw_scales", **batch, lowest=1.0, highest=7.5),
        of("draw_neighbours", **batch, sigmas=SIGMAS, probabilities=np.array([0.5, 0.5])),
        of("easy_times", t=ONES, stage=1, q=2.0, k=8.0, b=1.0),
        of("interval_probabilities", sigmas=SIGMAS, mean=-1.1, std=2.0),
        of("interval_times", **batch, equal=0.75, mean=-0.4, std=1.0),
        of("karras_levels", num_levels=4, sigma_min=0.002, sigma_max=80.0, rho=7.0),
        of("num_levels", step=1, total_steps=100, first=10, last=1280),
        of("shortcut_times", **batch, smallest=8),
        of("trig_times", **batch, mean=-1.0, std=1.4, sigma_data=0.5),
        of("u_shaped_times", **batch, a=4.0),
    ]


X_T = {"x_t": IMAGES, "t": EARLY}
DRAW = {"x_0": IMAGES, "epsilon": IMAGES}
TWO_SETS = {"samples": SET, "data": SET, "radii": (0.1,)}


def teachers() -> list[Case]:
    """Jumps, and related functions."""
    denoise = D.denoiser(halve, D.flow(FLOW))
    trajectory = np.zeros((3, 2, 4, 4, 1), np.float32)
    simulation = {"key": KEY, "generator": halve, "path": FLOW, "noise": IMAGES, "times": TIMES, "row": 1}
    return [
        of("ddim_jump", denoise=denoise),
        of("heun_jump", denoise=D.denoiser(halve, D.epsilon(VP))),
        of("noised", path=FLOW, **DRAW, t=EARLY),
        of("means_of", error=IMAGES),
        of("squares_of", error=IMAGES),
        of("straightness", trajectory=trajectory, t=TIMES),
        of("TrigFlow", sigma_data=0.5),
        of("trig_consistency", velocity=halve, **X_T),
        of("trig_teacher_slope", denoise=halve, **X_T),
        of("backward_simulation", **simulation),
    ]


def distillation() -> list[Case]:
    """Losses with a teacher."""
    flow = D.flow(FLOW)
    student = {"network": conditional, "prediction": flow, "condition": ONES}
    middle = (LATE + EARLY) / 2
    return [
        of("progressive_loss", **student, jump=jump, **DRAW, t=LATE, middle=middle, s=EARLY, weight=None),
        of(
            "guidance_distillation_loss",
            network=lambda x, t, condition, scale: 0.5 * x,
            teacher=conditional,
            prediction=flow,
            **DRAW,
            t=LATE,
            scale=ONES,
            condition=ONES,
            null_condition=ONES,
        ),
        of("reflow_loss", **student, samples=IMAGES, noise=IMAGES, t=EARLY, distance=few.means_of),
        of(
            "distribution_matching_gradient",
            real=halve,
            fake=halve,
            images=IMAGES,
            path=FLOW,
            epsilon=IMAGES,
            t=EARLY,
        ),
        of("distribution_matching_loss", images=IMAGES, gradient=IMAGES),
    ]


def consistency() -> list[Case]:
    """Consistency models."""
    pair = {"x_t": IMAGES, "t": LATE, "x_s": IMAGES, "s": EARLY}
    return [
        of("edm_consistency_model", network=halve, sigma_data=0.5, sigma_min=0.002),
        of("pseudo_huber", c=0.1),
        of("consistency_loss", f=halve, target=halve, **pair, distance=few.squares_of, weight=ONES),
        of(
            "continuous_consistency_loss",
            velocity=halve,
            **X_T,
            slope=IMAGES,
            warmth=1.0,
            c=0.1,
            normalise=True,
            difference=0.1,
            ends=(0.0, 1.5),
        ),
    ]


def without_a_teacher() -> list[Case]:
    """Shortcut models, mean flows and drifting."""
    stepped = {"network": lambda x, t, d, condition: 0.5 * x, "t": LATE, "d": EARLY, "condition": ONES}
    interval = {"u": with_interval, "t": LATE, "velocity": IMAGES, "condition": ONES}
    flows = {**interval, **DRAW, "r": EARLY, "power": 1.0, "offset": 0.01}
    return [
        of("shortcut_target", **stepped, x_t=IMAGES, clip=4.0, smallest=8),
        of("shortcut_loss", **stepped, **DRAW, target=IMAGES[:1]),
        of("mean_flow_loss", **flows, still=1),
        of("improved_mean_flow_loss", **flows, still=1),
        of("guided_velocity", **interval, z=IMAGES, null_condition=ONES, omega=1.5, kappa=0.5),
        of("drift", **TWO_SETS),
        of("drifting_loss", **TWO_SETS),
    ]
