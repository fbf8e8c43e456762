"""Stochastic and distilled solvers against the schedulers of `diffusers`, both fed the same noise.

Steps 1, 2, 5, 10, 50, each prediction and each spacing or sigma option that both have; the largest
difference must stay below 1e-4 of the largest value. Where the reference is wrong, the case says so.
"""

import importlib
import itertools
import sys
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import other_solvers
import pytest
import torch
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_edm_dpmsolver_multistep,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_lcm,
    scheduling_lcm,
    scheduling_tcd,
)
from reference_schedulers import (
    FINAL_SIGMAS,
    LINEAR_BETAS,
    MAX_STEPS,
    OPEN_SPACINGS,
    PREDICTIONS,
    SEED,
    STEPS,
    assert_close,
    compare,
    feed_noise,
    jax_network,
    network,
    run_ours,
    run_reference,
    start_noise,
    step_noise,
    with_float64_schedule,
)
from rule_grids import rule_grid

from jaxldm import diffusion as D

SCALED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
VP = D.VP(D.linear_betas())
SCALED_VP = D.VP(D.scaled_linear_betas())
NOISE = start_noise()


def sde_scheduler(prediction, order, **options):
    return with_float64_schedule(
        diffusers.DPMSolverMultistepScheduler(
            **LINEAR_BETAS,
            solver_order=order,
            prediction_type=prediction,
            **{"algorithm_type": "sde-dpmsolver++"} | options,
        )
    )


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_sde(order, solver_type):
    # Of third order the reference's own coefficient of the second difference is wrong:
    # test_stochastic_solvers.py measures what it is worth.
    solver = D.solvers.dpmpp_2m_sde(solver_type=solver_type)
    if order == 3:
        solver = other_solvers.dpmpp_3m("diffusers", eta=1.0, solver_type=solver_type)
    run = run_ours(solver, VP)
    spacings = OPEN_SPACINGS if solver_type == "midpoint" else ("trailing",)  # one is enough for the other
    for case in itertools.product(PREDICTIONS, STEPS, spacings, FINAL_SIGMAS):
        prediction, steps, spacing, final = case
        scheduler = sde_scheduler(
            prediction,
            order,
            solver_type=solver_type,
            timestep_spacing=spacing,
            final_sigmas_type=FINAL_SIGMAS[final],
        )
        scheduler.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=OPEN_SPACINGS[spacing], final=final)
        compare(run, prediction, grid, scheduler, case, variance_noise=step_noise())


@pytest.mark.parametrize("order, solver_type", [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_dpm_sde(order, solver_type):
    run = run_ours(D.solvers.dpm_sde(order, solver_type=solver_type), VP)
    for prediction, steps in itertools.product(PREDICTIONS, STEPS):
        options = {"solver_type": solver_type, "final_sigmas_type": "sigma_min"}
        scheduler = sde_scheduler(prediction, order, algorithm_type="sde-dpmsolver", **options)
        scheduler.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing="linspace_open", final="sigma_min")
        compare(run, prediction, grid, scheduler, (prediction, steps), variance_noise=step_noise())


def test_dpmpp_sde_with_respaced_sigmas():
    # The reference shows the network whole timesteps, rounded or cut, beside sigmas that are neither.
    run = run_ours(D.solvers.dpmpp_2m_sde(), VP)
    labels = {"karras": "rounded", "exponential": "cut"}
    for case in itertools.product(PREDICTIONS, STEPS, labels):
        prediction, steps, sigmas = case
        scheduler = sde_scheduler(prediction, 2, **{f"use_{sigmas}_sigmas": True})
        scheduler.set_timesteps(steps)
        grid = D.make_grid(VP, steps, spacing=sigmas)
        compare(run, prediction, grid, scheduler, case, label=labels[sigmas], variance_noise=step_noise())


def test_flow_dpmpp_sde():
    path = D.Flow()
    run = run_ours(
        D.solvers.dpmpp_2m_sde(),
        path,
        ("flow",),
        network_of=lambda x, t: jax_network(x, jnp.floor(1000 * t + 1e-3)),
    )
    for steps in STEPS:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        )
        scheduler.set_timesteps(steps)
        grid = D.at_times(path, scheduler.sigmas[:-1].numpy())
        compare(run, "flow", grid, scheduler, steps, variance_noise=step_noise())


def test_edm_dpmpp_sde(monkeypatch):
    path = D.EDM()
    denoise = D.denoiser(jax_network, D.edm(D.EDM(), 0.5))
    solver = D.solvers.dpmpp_2m_sde(lower_order_final=False)
    run = jax.jit(lambda grid, x: D.sample(jax.random.key(SEED), denoise, solver, grid, x))
    start = 80 * NOISE
    for steps in STEPS[1:]:
        scheduler = diffusers.EDMDPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", lower_order_final=False
        )
        scheduler.set_timesteps(steps)
        feed_noise(monkeypatch, scheduling_edm_dpmsolver_multistep, step_noise())
        ours = np.asarray(run(D.pad(D.make_grid(path, steps), MAX_STEPS), start))
        assert_close(ours, run_reference(scheduler, torch.from_numpy(start)), steps)


def test_cosine_dpm_solver(monkeypatch):
    # The scheduler of Stable Audio: dpmpp_2m_sde in sigma, with EDM's preconditioning and its own label.
    # Its noise comes from a Brownian tree of the package torchsde, not needed when the noise is fed.
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    path = D.EDM(sigma_min=0.3, sigma_max=500.0)

    def function(x, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        output = jax_network(x / jnp.sqrt(sigma**2 + 1), jnp.arctan(sigma) * (2 / np.pi))
        return x / (sigma**2 + 1) - sigma / jnp.sqrt(sigma**2 + 1) * output

    denoise, solver = D.Denoiser(function, path), D.solvers.dpmpp_2m_sde()
    run = jax.jit(lambda grid, x: D.sample(jax.random.key(SEED), denoise, solver, grid, x))
    for steps in STEPS[1:]:  # the reference has no grid of one sigma
        scheduler = module.CosineDPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        noises = iter(step_noise())
        scheduler.noise_sampler = lambda sigma, sigma_next, noises=noises: next(noises)
        grid = D.make_grid(path, steps, spacing="exponential")
        ours = np.asarray(run(D.pad(grid, MAX_STEPS), 500 * NOISE))
        assert_close(ours, run_reference(scheduler, torch.from_numpy(500 * NOISE)), steps)


def test_ddpm_with_learned_variance(monkeypatch):
    def two_outputs(x, t, xp):
        return xp.concatenate([network(x, t, xp), xp.sin(3 * x + 0.01 * t)], axis=-1)

    denoisers = [
        D.denoiser(
            lambda x, t: two_outputs(x, t.reshape(-1, 1, 1, 1), jnp),
            D.prediction(prediction, VP),
            learned_variance=True,
        )
        for prediction in PREDICTIONS
    ]

    @jax.jit
    def run(index, grid, x):
        def function(x, t):
            return jax.lax.switch(index, [denoise.with_variance for denoise in denoisers], x, t)

        denoise = D.Denoiser(lambda x, t: function(x, t)[0], VP, function)
        return D.sample(jax.random.key(SEED), denoise, D.solvers.ddpm("learned"), grid, x)

    def channels_first(x):
        return torch.movedim(x, -1, 1)

    # With trailing spacing the reference adds noise to the clean image, a mean of beta and of 1e-20; the last
    # timestep of the other two is 0, where it adds none.
    for case in itertools.product(PREDICTIONS, STEPS, ("leading", "linspace")):
        prediction, steps, spacing = case
        scheduler = diffusers.DDPMScheduler(
            **LINEAR_BETAS,
            clip_sample=False,
            prediction_type=prediction,
            timestep_spacing=spacing,
            variance_type="learned_range",
        )
        scheduler.set_timesteps(steps)
        feed_noise(monkeypatch, scheduling_ddpm, [channels_first(z) for z in step_noise()])
        x = torch.from_numpy(NOISE)
        for t in scheduler.timesteps:
            output = channels_first(torch.from_numpy(two_outputs(x.numpy(), np.float32(t), np)))
            x = scheduler.step(output, t, channels_first(x), return_dict=False)[0].movedim(1, -1)
        grid = D.pad(D.make_grid(VP, steps, spacing=spacing), MAX_STEPS)
        assert_close(np.asarray(run(PREDICTIONS.index(prediction), grid, NOISE)), x.numpy(), case)


def test_lcm(monkeypatch, optimized):
    denoisers = [
        D.consistency_function(D.denoiser(jax_network, D.prediction(prediction, SCALED_VP)))
        for prediction in PREDICTIONS
    ]

    @jax.jit
    def run(index, grid, x):
        denoise = D.Denoiser(lambda x, t: jax.lax.switch(index, denoisers, x, t), SCALED_VP)
        return D.sample(jax.random.key(SEED), denoise, D.solvers.lcm(), grid, x)

    for case in itertools.product(PREDICTIONS, STEPS, (50, 100)):
        prediction, steps, original = case
        scheduler = diffusers.LCMScheduler(
            **SCALED, prediction_type=prediction, original_inference_steps=original
        )
        scheduler.set_timesteps(steps)
        timesteps = D.lcm_timesteps(steps, original_inference_steps=original)
        np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())
        feed_noise(monkeypatch, scheduling_lcm, step_noise())
        grid = D.pad(D.at_times(SCALED_VP, timesteps), MAX_STEPS)
        ours = np.asarray(run(PREDICTIONS.index(prediction), grid, NOISE))
        # In float64: of epsilon in fifty steps the rounding of both together is above the bound.
        reference = run_reference(with_float64_schedule(scheduler), torch.from_numpy(NOISE).double())
        assert_close(ours, reference, case)


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_lcm_timesteps_of_image_to_image(strength):
    for steps in (1, 2, 4, 8):
        scheduler = diffusers.LCMScheduler(**SCALED)
        scheduler.set_timesteps(steps, strength=strength)
        np.testing.assert_array_equal(D.lcm_timesteps(steps, strength=strength), scheduler.timesteps.numpy())


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_tcd(gamma, monkeypatch):
    # The reference never reaches the clean image: its last step goes to timestep 0, which keeps noise of
    # standard deviation 0.03. So does a grid with final="sigma_min"; by default ours goes to the clean row.
    run = run_ours(D.solvers.tcd(gamma), SCALED_VP)
    for case in itertools.product(PREDICTIONS, STEPS):
        prediction, steps = case
        scheduler = diffusers.TCDScheduler(**SCALED, prediction_type=prediction)
        scheduler.set_timesteps(steps)
        timesteps = D.lcm_timesteps(steps)
        np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())
        feed_noise(monkeypatch, scheduling_tcd, step_noise())
        grid = D.at_times(SCALED_VP, timesteps, final="sigma_min")
        compare(run, prediction, grid, scheduler, case, eta=[gamma] * MAX_STEPS)


def test_flow_lcm(monkeypatch):
    # The Euler scheduler's stochastic_sampling is the same renoising under another name. Both schedulers
    # shift t_min = 1/1000 before they shift the whole grid, unless they are given the sigmas.
    path = D.Flow()
    run = run_ours(D.solvers.lcm(), path, ("flow",), network_of=lambda x, t: jax_network(x, 1000 * t))
    for case in itertools.product(STEPS, (1.0, 3.0), ("lcm", "stochastic_euler")):
        steps, shift, name = case
        if name == "lcm":
            scheduler, module = diffusers.FlowMatchLCMScheduler(shift=shift), scheduling_flow_match_lcm
        else:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
            module = scheduling_flow_match_euler_discrete
        scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1e-3, steps))
        feed_noise(monkeypatch, module, step_noise())
        compare(run, "flow", D.make_grid(path, steps, spacing="linspace", shift=shift), scheduler, case)


@pytest.mark.parametrize(
    "name, scheduler_class",
    [
        ("flow_euler", diffusers.FlowMatchEulerDiscreteScheduler),
        ("flow_heun", diffusers.FlowMatchHeunDiscreteScheduler),
    ],
)
def test_flow_euler_and_heun(name, scheduler_class):
    # Heun's scheduler takes no sigmas, so both are left to shift t_min twice; the grid's path copies that.
    solver = D.solvers.make(name)
    run = run_ours(solver, D.Flow(), ("flow",), network_of=lambda x, t: jax_network(x, 1000 * t))
    for case in itertools.product(STEPS, (1.0, 3.0)):
        steps, shift = case
        path = D.Flow(t_min=shift * 1e-3 / (1 + (shift - 1) * 1e-3))
        scheduler = scheduler_class(shift=shift)
        scheduler.set_timesteps(steps)
        compare(run, "flow", D.make_grid(path, steps, spacing="linspace", shift=shift), scheduler, case)
