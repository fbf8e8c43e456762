"""Every solver against the scheduler of `diffusers` that has its name, on the same grid and network.

Steps 1, 2, 5, 10, 50, each prediction and each spacing or sigma option that both have; the largest
difference must stay below 1e-4 of the largest value. Differences of convention are named where they are met.
"""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import other_solvers
import pytest
import torch
from reference_schedulers import (
    FINAL_SIGMAS,
    FRACTIONAL_SPACINGS,
    LABELS,
    LINEAR_BETAS,
    MAX_STEPS,
    OPEN_SPACINGS,
    PREDICTIONS,
    STEPS,
    assert_close,
    compare,
    compare_in_sigma_space,
    feed_ddpm_noise,
    jax_network,
    run_ours,
    run_reference,
    start_noise,
    step_noise,
    with_float64_schedule,
)
from rule_grids import rule_grid

from jaxldm import diffusion as D

BETAS = {**LINEAR_BETAS, "clip_sample": False}
NOISE = start_noise()
VP = D.VP(D.linear_betas())
ZERO_SNR = D.VP(D.rescale_zero_terminal_snr(D.linear_betas()))


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_ddim(eta):
    run = run_ours(D.solvers.ddim(eta), VP)
    noise = {"eta": [eta] * MAX_STEPS, "variance_noise": step_noise()} if eta else {}
    for case in itertools.product(PREDICTIONS, STEPS, (("leading", 0), ("leading", 1), ("trailing", 0))):
        prediction, steps, (spacing, offset) = case
        scheduler = diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset
        )
        scheduler.set_timesteps(steps)
        compare(
            run,
            prediction,
            rule_grid(VP, steps, spacing=spacing, steps_offset=offset),
            scheduler,
            case,
            **noise,
        )


def test_ddim_linspace_against_first_order_dpm_solver():
    # The reference's DDIMScheduler always steps T // N timesteps down, which are not linspace's own next
    # ones. Its first-order DPM-Solver++ is the same formula and does visit them.
    run = run_ours(D.solvers.ddim(), VP)
    for case in itertools.product(PREDICTIONS, STEPS):
        prediction, steps = case
        grid = D.make_grid(VP, steps, spacing="linspace")
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **LINEAR_BETAS, prediction_type=prediction, solver_order=1
        )
        scheduler.set_timesteps(timesteps=grid.t[:-1].astype(int).tolist())
        compare(run, prediction, grid, scheduler, case)


def test_ddim_that_ends_at_the_first_timestep():
    run = run_ours(D.solvers.ddim(), VP)
    for case in itertools.product(PREDICTIONS, STEPS):
        prediction, steps = case
        scheduler = diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction, set_alpha_to_one=False, steps_offset=1
        )
        scheduler.set_timesteps(steps)
        grid = D.make_grid(VP, steps, spacing="leading", final="sigma_min", offset=1)
        compare(run, prediction, grid, scheduler, case)


def test_ddim_from_zero_terminal_snr():
    run = run_ours(D.solvers.ddim(), ZERO_SNR, ("sample", "v_prediction"))
    for case in itertools.product(("sample", "v_prediction"), STEPS):
        prediction, steps = case
        scheduler = diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing="trailing", rescale_betas_zero_snr=True
        )
        scheduler.set_timesteps(steps)
        grid = D.make_grid(ZERO_SNR, steps, spacing="trailing")
        assert grid.alpha[0] == 0
        compare(run, prediction, grid, scheduler, case)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, monkeypatch):
    run = run_ours(D.solvers.ddpm(variance), VP)
    # With the large variance the reference adds noise to the clean image where the last timestep is not 0, as
    # with trailing spacing; ours never does.
    spacings = ("leading", "linspace", "trailing") if variance == "small" else ("leading", "linspace")
    for case in itertools.product(PREDICTIONS, STEPS, spacings):
        prediction, steps, spacing = case
        scheduler = diffusers.DDPMScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing=spacing, variance_type=f"fixed_{variance}"
        )
        scheduler.set_timesteps(steps)
        feed_ddpm_noise(monkeypatch, step_noise())
        compare(run, prediction, D.make_grid(VP, steps, spacing=spacing), scheduler, case)


@pytest.mark.parametrize(
    "scheduler_class, solver",
    [
        (diffusers.EulerDiscreteScheduler, D.solvers.euler()),
        (diffusers.HeunDiscreteScheduler, D.solvers.heun()),
    ],
)
def test_euler_and_heun(scheduler_class, solver):
    run = run_ours(solver, VP)
    for case in itertools.product(PREDICTIONS, STEPS, FRACTIONAL_SPACINGS, (None, "karras", "exponential")):
        prediction, steps, spacing, sigmas = case
        scheduler = with_float64_schedule(
            scheduler_class(
                **LINEAR_BETAS,
                prediction_type=prediction,
                timestep_spacing=spacing,
                use_karras_sigmas=sigmas == "karras",
                use_exponential_sigmas=sigmas == "exponential",
            )
        )
        scheduler.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=FRACTIONAL_SPACINGS[spacing], levels=sigmas)
        compare_in_sigma_space(run, prediction, grid, scheduler, case)


def test_euler_that_ends_at_sigma_min():
    run = run_ours(D.solvers.euler(), VP)
    for case in itertools.product(PREDICTIONS, STEPS[1:], ("linspace", "leading", "trailing")):
        prediction, steps, spacing = case
        scheduler = with_float64_schedule(
            diffusers.EulerDiscreteScheduler(
                **LINEAR_BETAS,
                prediction_type=prediction,
                timestep_spacing=spacing,
                final_sigmas_type="sigma_min",
            )
        )
        scheduler.set_timesteps(steps)
        if spacing == "trailing":
            grid = D.make_grid(VP, steps, spacing=spacing, final="sigma_min")
        else:
            # The reference's grid stops at sigma_min already and it adds that row again: its last step stands
            # still. Ours makes use of every step, so N of its steps are N - 1 of ours.
            assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
            grid = D.at_times(VP, scheduler.timesteps.numpy(), final="sigma_min")
            assert len(grid.t) == steps
        compare_in_sigma_space(run, prediction, grid, scheduler, case)


@pytest.mark.parametrize("final", ["clean", "sigma_min"])
def test_dpmpp_2m(final):
    run = run_ours(D.solvers.dpmpp_2m(), VP)
    for case in itertools.product(PREDICTIONS, STEPS, OPEN_SPACINGS):
        prediction, steps, spacing = case
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **LINEAR_BETAS,
            prediction_type=prediction,
            timestep_spacing=spacing,
            final_sigmas_type=FINAL_SIGMAS[final],
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=OPEN_SPACINGS[spacing], final=final)
        compare(run, prediction, grid, scheduler, case)


@pytest.mark.parametrize("final", ["clean", "sigma_min"])
def test_dpmpp_2s(final):
    run = run_ours(D.solvers.dpmpp_2s(), VP)
    for case in itertools.product(PREDICTIONS, STEPS):
        prediction, steps = case
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **LINEAR_BETAS, prediction_type=prediction, final_sigmas_type=FINAL_SIGMAS[final]
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        compare(run, prediction, rule_grid(VP, steps, spacing="linspace_open", final=final), scheduler, case)


@pytest.mark.parametrize(
    "scheduler_class, solver",
    [
        (diffusers.DPMSolverMultistepScheduler, D.solvers.dpmpp_2m()),
        (diffusers.DPMSolverSinglestepScheduler, D.solvers.dpmpp_2s()),
    ],
)
@pytest.mark.parametrize("sigmas, label", [("karras", "rounded"), ("exponential", "cut")])
def test_dpmpp_with_respaced_sigmas(sigmas, label, scheduler_class, solver):
    # The reference shows the network whole timesteps, rounded or cut, beside sigmas that are neither.
    run = run_ours(solver, VP)
    for case in itertools.product(PREDICTIONS, STEPS):
        prediction, steps = case
        scheduler = scheduler_class(
            **LINEAR_BETAS, prediction_type=prediction, **{f"use_{sigmas}_sigmas": True}
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        grid = D.make_grid(VP, steps, spacing=sigmas)
        np.testing.assert_array_equal(LABELS[label](grid.t[:-1], grid), scheduler.timesteps.numpy())
        compare(run, prediction, grid, scheduler, case, label)


@pytest.mark.parametrize(
    "scheduler_class, solver, options",
    [
        (diffusers.EDMEulerScheduler, D.solvers.euler(), {}),
        (diffusers.EDMDPMSolverMultistepScheduler, D.solvers.dpmpp_2m(False), {"lower_order_final": False}),
        (
            diffusers.EDMDPMSolverMultistepScheduler,
            other_solvers.dpmpp_3m("halved", lower_order_final=False),
            {"lower_order_final": False, "solver_order": 3},
        ),
    ],
    ids=["euler", "dpmpp_2m", "dpmpp_3m"],
)
def test_edm(scheduler_class, solver, options):
    path = D.EDM()
    denoise = D.denoiser(jax_network, D.edm(D.EDM(), 0.5))
    run = jax.jit(lambda grid, x: D.sample(jax.random.key(0), denoise, solver, grid, x))
    start = 80 * NOISE
    # Third order divides by the width of that last step, 0: NaN.
    finals = FINAL_SIGMAS if options.get("solver_order", 1) < 3 else ("clean",)
    for case in itertools.product(STEPS[1:], ("karras", "exponential"), finals):
        steps, sigmas, final = case
        scheduler = scheduler_class(
            sigma_schedule=sigmas,
            final_sigmas_type=FINAL_SIGMAS[final],
            **options,
        )
        scheduler.set_timesteps(steps)
        # With sigma_min the reference repeats the last row; see test_euler_that_ends_at_sigma_min.
        grid = D.make_grid(path, steps - (final == "sigma_min"), spacing=sigmas, final=final)
        np.testing.assert_allclose(grid.sigma[:steps], scheduler.sigmas[:steps], rtol=1e-5)
        assert_close(
            np.asarray(run(D.pad(grid, MAX_STEPS), start)),
            run_reference(scheduler, torch.from_numpy(start)),
            case,
        )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("shifts_t_min_twice", [False, True])
def test_flow_euler(shift, shifts_t_min_twice):
    # Left to itself the reference shifts t_min = 1/1000 before it shifts the whole grid. Ours shifts once,
    # or, with t_min shifted by hand, does the same.
    path = D.Flow(t_min=shift * 1e-3 / (1 + (shift - 1) * 1e-3) if shifts_t_min_twice else 1e-3)
    run = run_ours(D.solvers.euler(), path, ("flow",), network_of=lambda x, t: jax_network(x, 1000 * t))
    for steps in STEPS:
        grid = D.make_grid(path, steps, spacing="linspace", shift=shift)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps, sigmas=None if shifts_t_min_twice else np.linspace(1, 1e-3, steps))
        np.testing.assert_allclose(grid.sigma, scheduler.sigmas, rtol=1e-6)
        compare(run, "flow", grid, scheduler, steps)


@pytest.mark.parametrize(
    "scheduler_class, solver",
    [
        (diffusers.DPMSolverMultistepScheduler, D.solvers.dpmpp_2m()),
        (diffusers.DPMSolverSinglestepScheduler, D.solvers.dpmpp_2s()),
    ],
)
def test_flow_dpmpp(scheduler_class, solver):
    path = D.Flow()
    run = run_ours(
        solver, path, ("flow",), network_of=lambda x, t: jax_network(x, jnp.floor(1000 * t + 1e-3))
    )
    for steps in STEPS:
        scheduler = scheduler_class(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(steps)
        compare(run, "flow", D.at_times(path, scheduler.sigmas[:-1].numpy()), scheduler, steps)
