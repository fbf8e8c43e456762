"""Euler-ancestral and DPM2 against the schedulers of `diffusers` of the same name, fed the same noise."""

import itertools

import diffusers
import numpy as np
import pytest
from diffusers.schedulers import (
    scheduling_euler_ancestral_discrete,
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

from jaxldm import diffusion as D

VP, FLOW = D.vp_path(D.linear_betas()), D.flow_path()
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
        compare(run, "flow", D.make_grid(FLOW, timesteps=sigmas[:-1]), scheduler, steps)


def test_dpm2():
    run = run_ours(D.solvers.dpm2(), VP, PREDICTIONS)
    # With Karras sigmas the reference rounds the rows' timesteps, and not those of the middles.
    labels = {None: "exact", "karras": "rounded_on_rows", "exponential": "exact"}
    scheduler = with_float64_schedule(diffusers.KDPM2DiscreteScheduler(**LINEAR_BETAS))
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
        grid = D.make_grid(VP, steps, spacing=FRACTIONAL_SPACINGS[spacing], sigmas=sigmas)
        compare_in_sigma_space(run, prediction, grid, scheduler, case, labels[sigmas])
