"""Ancestral solvers and DPM2 against the schedulers of `diffusers` of the same name, fed the same noise."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import (
    scheduling_euler_ancestral_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_ltx_euler_ancestral_rf,
)
from reference_schedulers import (
    FRACTIONAL_SPACINGS,
    LINEAR_BETAS,
    STEPS,
    compare,
    compare_in_sigma_space,
    feed_noise,
    jax_network,
    near_zero_terminal_snr,
    run_ours,
    step_noise,
    with_float64_schedule,
)
from rule_grids import rule_grid

from jaxldm import diffusion as D

VP, FLOW = D.VP(D.linear_betas()), D.Flow()
PREDICTIONS = ("epsilon", "v_prediction")  # these schedulers know no other


def test_euler_ancestral(monkeypatch):
    run = run_ours(D.solvers.euler_ancestral(), VP, PREDICTIONS)
    for case in itertools.product(PREDICTIONS, STEPS, FRACTIONAL_SPACINGS):
        prediction, steps, spacing = case
        scheduler = diffusers.EulerAncestralDiscreteScheduler(
            **LINEAR_BETAS, prediction_type=prediction, timestep_spacing=spacing
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        feed_noise(monkeypatch, scheduling_euler_ancestral_discrete, step_noise())
        grid = D.make_grid(VP, steps, spacing=FRACTIONAL_SPACINGS[spacing])
        compare_in_sigma_space(run, prediction, grid, scheduler, case)


def test_euler_ancestral_near_zero_terminal_snr(monkeypatch):
    path = near_zero_terminal_snr()
    run = run_ours(D.solvers.euler_ancestral(), path, ("v_prediction",))
    for steps in STEPS:
        scheduler = diffusers.EulerAncestralDiscreteScheduler(
            **LINEAR_BETAS,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        scheduler.set_timesteps(steps)
        feed_noise(monkeypatch, scheduling_euler_ancestral_discrete, step_noise())
        grid = D.make_grid(path, steps, spacing="trailing")
        # The reference computes x - (x - x_0) in float32 with x in the ten thousands.
        compare_in_sigma_space(run, "v_prediction", grid, scheduler, steps, tolerance=1e-3)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_euler_ancestral_of_rectified_flow(eta, monkeypatch):
    solver = D.solvers.euler_ancestral(eta, form="rectified_flow")
    run = run_ours(solver, FLOW, ("flow",), network_of=lambda x, t: jax_network(x, 1000 * t))
    for steps in STEPS:
        sigmas = np.linspace(1, 0, steps + 1)
        scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        feed_noise(monkeypatch, scheduling_ltx_euler_ancestral_rf, step_noise())
        compare(run, "flow", D.at_times(FLOW, sigmas[:-1]), scheduler, steps)


def redo_ancestral_sigmas_in_float64(scheduler, steps):
    """sigma_down = sigma_next^2 / sigma, which the reference finds as a difference of squares in float32.

    Over long steps nothing is left of it: at two steps of linspace spacing the reference draws NaN.
    """
    sigmas = scheduler.sigmas[::2][: steps + 1].double()
    up, down, between = torch.zeros(3, steps + 1, dtype=torch.float64)
    down[:-1] = sigmas[1:] ** 2 / sigmas[:-1]
    up[:-1] = (sigmas[1:] ** 2 - down[:-1] ** 2).clamp(min=0).sqrt()
    between[:-2] = (sigmas[:-2] * down[:-2]).sqrt()
    lost = scheduler.sigmas_down[: max(2 * steps - 3, 0)]
    assert ((lost > 0).all() and torch.isfinite(lost).all()) or steps == 2

    def twice(values):
        return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])

    scheduler.sigmas_up, scheduler.sigmas_down, scheduler.sigmas_interpol = map(twice, (up, down, between))
    # With eta = 1 the middle, sqrt(sigma sigma_down), is sigma_next: each row's time is told twice.
    scheduler.timesteps[1::2] = scheduler.timesteps[2::2]


@pytest.mark.parametrize(
    "scheduler_class, solver",
    [
        (diffusers.KDPM2DiscreteScheduler, D.solvers.dpm2()),
        (diffusers.KDPM2AncestralDiscreteScheduler, D.solvers.dpm2_ancestral()),
    ],
    ids=["dpm2", "dpm2_ancestral"],
)
def test_dpm2(scheduler_class, solver, monkeypatch):
    run = run_ours(solver, VP, PREDICTIONS)
    # With Karras sigmas the reference rounds the rows' timesteps, and not those of the middles.
    labels = {None: "exact", "karras": "rounded_on_rows", "exponential": "exact"}
    scheduler = with_float64_schedule(scheduler_class(**LINEAR_BETAS))
    for case in itertools.product(PREDICTIONS, STEPS, FRACTIONAL_SPACINGS, labels):
        prediction, steps, spacing, sigmas = case
        scheduler.register_to_config(
            prediction_type=prediction,
            timestep_spacing=spacing,
            use_karras_sigmas=sigmas == "karras",
            use_exponential_sigmas=sigmas == "exponential",
        )
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == 2 * steps - 1
        if scheduler_class is diffusers.KDPM2AncestralDiscreteScheduler:
            redo_ancestral_sigmas_in_float64(scheduler, steps)
        feed_noise(monkeypatch, scheduling_k_dpm_2_ancestral_discrete, step_noise())
        grid = rule_grid(VP, steps, spacing=FRACTIONAL_SPACINGS[spacing], levels=sigmas)
        # x_0 = (x - sigma eps) / alpha with alpha = 0.006 has lost two digits of float32, and long ancestral
        # steps multiply x_0(middle) - x_0 by several.
        lossy = prediction == "epsilon" and scheduler_class is diffusers.KDPM2AncestralDiscreteScheduler
        tolerance = 5e-4 if lossy else 1e-4
        compare_in_sigma_space(run, prediction, grid, scheduler, case, labels[sigmas], tolerance)
