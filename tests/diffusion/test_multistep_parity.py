"""Multistep solvers against the schedulers of `diffusers` of the same name, on the same grid and network.

Steps 1, 2, 5, 10, 50, each prediction and each spacing or sigma option that both have; the largest
difference must stay below 1e-4 of the largest value. Differences of convention are named where they are met.
"""

import functools
import itertools

import diffusers
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
    OPEN_SPACINGS,
    PREDICTIONS,
    STEPS,
    compare,
    compare_in_float64,
    compare_in_sigma_space,
    jax_network,
    near_zero_terminal_snr,
    run_ours,
    run_reference,
    start_noise,
    with_float64_schedule,
)
from rule_grids import rule_grid

from jaxldm import diffusion as D

VP, FLOW = D.VP(D.linear_betas()), D.Flow()
RESPACED = {"karras": "rounded", "exponential": "cut"}  # what the reference tells the network of such a t


def flow_network(x, t):
    """The reference cuts 1000 t to whole numbers."""
    return jax_network(x, jnp.floor(1000 * t + 1e-4))


def test_lms():
    run = run_ours(D.solvers.lms(), VP)
    scheduler = with_float64_schedule(diffusers.LMSDiscreteScheduler(**LINEAR_BETAS))
    integrate = functools.cache(
        lambda grid, *numbers: type(scheduler).get_lms_coefficient(scheduler, *numbers)
    )
    for case in itertools.product(STEPS, FRACTIONAL_SPACINGS, (None, "karras", "exponential"), PREDICTIONS):
        steps, spacing, sigmas, prediction = case
        # Its integrals are numerical and slow, and the same for every prediction.
        scheduler.get_lms_coefficient = functools.partial(integrate, case[:3])
        scheduler.register_to_config(
            prediction_type=prediction,
            timestep_spacing=spacing,
            use_karras_sigmas=sigmas == "karras",
            use_exponential_sigmas=sigmas == "exponential",
        )
        scheduler.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=FRACTIONAL_SPACINGS[spacing], levels=sigmas)
        compare_in_sigma_space(run, prediction, grid, scheduler, case)


# The reference steps T // N timesteps down, which are not linspace's own next ones; and by its very first
# steps a run with Runge-Kutta needs four rows.
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skips, counts", [(True, STEPS), (False, STEPS[2:])], ids=["plms", "runge_kutta"])
def test_pndm(skips, counts, prediction):
    # For a network that predicts v the reference averages v: test_solver_order.py shows what that costs.
    run = run_ours(D.solvers.pndm(skip_prk_steps=skips, combine=prediction), VP, (prediction,))
    spacings = (("leading", 0, "clean"), ("leading", 1, "sigma_min"), ("trailing", 0, "clean"))
    for case in itertools.product(counts, spacings):
        steps, (spacing, offset, final) = case
        scheduler = diffusers.PNDMScheduler(
            **LINEAR_BETAS,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=final == "clean",
            skip_prk_steps=skips,
        )
        scheduler.set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=spacing, steps_offset=offset, final=final)
        compare(run, prediction, grid, scheduler, case)


@pytest.mark.parametrize("order", [2, 3])
def test_deis(order):
    run = run_ours(D.solvers.deis(order), VP)
    for case in itertools.product(PREDICTIONS, STEPS, OPEN_SPACINGS):
        prediction, steps, spacing = case
        scheduler = diffusers.DEISMultistepScheduler(
            **LINEAR_BETAS, prediction_type=prediction, timestep_spacing=spacing, solver_order=order
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing=OPEN_SPACINGS[spacing], final="sigma_min")
        compare_in_float64(run, prediction, grid, scheduler, case)


def test_deis_with_respaced_sigmas():
    # The reference repeats the last sigma, so its last step stands still: N of its steps are N - 1 of ours.
    # It counts that one too when it lowers the order at the end, so here the order is kept.
    run = run_ours(D.solvers.deis(3, lower_order_final=False), VP)
    for case in itertools.product(PREDICTIONS, STEPS[1:], RESPACED.items()):
        prediction, steps, (sigmas, label) = case
        scheduler = diffusers.DEISMultistepScheduler(
            **LINEAR_BETAS,
            prediction_type=prediction,
            solver_order=3,
            lower_order_final=False,
            **{f"use_{sigmas}_sigmas": True},
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
        grid = D.make_grid(VP, steps - 1, spacing=sigmas, final="sigma_min")
        np.testing.assert_array_equal(LABELS[label](grid.t, grid), scheduler.timesteps.numpy())
        compare_in_float64(run, prediction, grid, scheduler, case, label)


def test_deis_on_the_flow_path():
    run = run_ours(D.solvers.deis(3, lower_order_final=False), FLOW, ("flow",), flow_network)
    for steps in STEPS[1:]:
        scheduler = diffusers.DEISMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3, lower_order_final=False
        )
        scheduler.set_timesteps(steps)
        grid = D.cut(D.at_times(FLOW, scheduler.sigmas[:-1].numpy()), 0, steps - 1)
        compare(run, "flow", grid, scheduler, steps)


def respaced_or_not(scheduler_class, prediction, steps, spacing, final, **options):
    """The reference, our grid and what the network is told, for a spacing or a way to respace sigma."""
    if spacing in RESPACED:
        options[f"use_{spacing}_sigmas"] = True
        grid, label = D.make_grid(VP, steps, spacing=spacing, final=final), RESPACED[spacing]
    else:
        options["timestep_spacing"] = spacing
        grid, label = rule_grid(VP, steps, spacing=OPEN_SPACINGS[spacing], final=final), "exact"
    scheduler = scheduler_class(
        **LINEAR_BETAS, prediction_type=prediction, final_sigmas_type=FINAL_SIGMAS[final], **options
    )
    with_float64_schedule(scheduler).set_timesteps(steps)
    np.testing.assert_array_equal(LABELS[label](grid.t[:steps], grid), scheduler.timesteps.numpy())
    return grid, scheduler, label


@pytest.mark.parametrize(
    "order, solver_type, solver",
    [
        (2, "heun", D.solvers.dpmpp_2m(solver_type="heun")),
        (3, "midpoint", other_solvers.dpmpp_3m("halved")),
        (3, "heun", other_solvers.dpmpp_3m("halved", solver_type="heun")),
    ],
    ids=["2m_heun", "3m_midpoint", "3m_heun"],
)
def test_dpmpp_multistep(order, solver_type, solver):
    # The reference takes half of the second difference: test_solver_order.py shows what that costs.
    run = run_ours(solver, VP)
    cases = list(itertools.product(PREDICTIONS, STEPS, OPEN_SPACINGS, FINAL_SIGMAS))
    cases += itertools.product(PREDICTIONS, STEPS, RESPACED, ("clean",))
    for case in cases:
        grid, scheduler, label = respaced_or_not(
            diffusers.DPMSolverMultistepScheduler, *case, solver_order=order, solver_type=solver_type
        )
        compare(run, case[0], grid, scheduler, case, label)


def test_dpmpp_2s_heun():
    run = run_ours(D.solvers.dpmpp_2s(solver_type="heun"), VP)
    for case in itertools.product(PREDICTIONS, STEPS, FINAL_SIGMAS):
        prediction, steps, final = case
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **LINEAR_BETAS,
            prediction_type=prediction,
            final_sigmas_type=FINAL_SIGMAS[final],
            solver_type="heun",
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing="linspace_open", final=final)
        compare(run, prediction, grid, scheduler, case)


THIRDS = {
    "dpmpp_3s": ("dpmsolver++", 3, D.solvers.dpmpp_3s),
    "dpm_2s": ("dpmsolver", 2, D.solvers.dpm_2s),
    "dpm_3s": ("dpmsolver", 3, D.solvers.dpm_3s),
}


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("name", THIRDS)
def test_single_step_dpm_solvers(name, solver_type):
    algorithm, order, make = THIRDS[name]
    run = run_ours(make(solver_type=solver_type), VP)
    finals = FINAL_SIGMAS if algorithm == "dpmsolver++" else ("sigma_min",)  # the reference knows no others
    # With fewer steps float32 loses digits where eps is integrated from nearly pure noise.
    for case in itertools.product(PREDICTIONS, (10, 15, 20), finals):
        prediction, steps, final = case
        scheduler = diffusers.DPMSolverSinglestepScheduler(
            **LINEAR_BETAS,
            prediction_type=prediction,
            final_sigmas_type=FINAL_SIGMAS[final],
            solver_type=solver_type,
            algorithm_type=algorithm,
            solver_order=order,
        )
        with_float64_schedule(scheduler).set_timesteps(steps)
        grid = rule_grid(VP, steps, spacing="linspace_open", final=final)
        compare_in_float64(run, prediction, grid, scheduler, case)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    "order, solver", [(2, D.solvers.dpm_2m), (3, functools.partial(D.solvers.dpm_3m, parabola="half"))]
)
def test_dpm_solver_multistep(order, solver, solver_type):
    run = run_ours(solver(solver_type=solver_type), VP)
    for case in itertools.product(PREDICTIONS, STEPS, OPEN_SPACINGS, ("sigma_min",)):
        options = {"solver_order": order, "solver_type": solver_type, "algorithm_type": "dpmsolver"}
        grid, scheduler, label = respaced_or_not(diffusers.DPMSolverMultistepScheduler, *case, **options)
        compare_in_float64(run, case[0], grid, scheduler, case, label)


@pytest.mark.parametrize(
    "order, solver_type, options",
    [
        (1, "bh2", {}),
        (2, "bh1", {}),
        (2, "bh2", {"disable_corrector": (0, 1)}),
        (3, "bh2", {"lower_order_final": False}),
        (3, "bh2", {}),
    ],
)
def test_unipc(order, solver_type, options):
    run = run_ours(D.solvers.unipc(order, solver_type, **options), VP)
    # Onto the clean row h is infinite: there the reference makes NaN of bh1, and of orders above 1.
    finite = solver_type == "bh2" and options.get("lower_order_final", True)
    finals = FINAL_SIGMAS if finite else ("sigma_min",)
    cases = list(itertools.product(PREDICTIONS, STEPS, OPEN_SPACINGS, finals))
    if "clean" in finals:
        cases += itertools.product(PREDICTIONS, STEPS, RESPACED, ("clean",))
    for case in cases:
        grid, scheduler, label = respaced_or_not(
            diffusers.UniPCMultistepScheduler, *case, solver_order=order, solver_type=solver_type, **options
        )
        compare(run, case[0], grid, scheduler, case, label)


def test_unipc_of_type_bh1_ends_clean_where_the_reference_is_not_a_number():
    run = run_ours(D.solvers.unipc(solver_type="bh1"), VP, ("epsilon",))
    case = ("epsilon", 5, "linspace", "clean")
    grid, scheduler, _ = respaced_or_not(diffusers.UniPCMultistepScheduler, *case, solver_type="bh1")
    assert np.isnan(run_reference(scheduler, torch.from_numpy(start_noise()))).all()
    assert np.isfinite(run("epsilon", grid, start_noise())).all()


def test_unipc_on_the_flow_path():
    # The reference begins at sigma = 1 - 1e-6, for the sake of its logarithms.
    run = run_ours(D.solvers.unipc(3), FLOW, ("flow",), flow_network)
    for steps, shift in itertools.product(STEPS, (1.0, 3.0)):
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        grid = D.at_times(FLOW, scheduler.sigmas[:-1].numpy())
        compare(run, "flow", grid, scheduler, (steps, shift))


@pytest.mark.parametrize(
    "scheduler_class, solver, order",
    [
        (diffusers.DPMSolverMultistepScheduler, D.solvers.dpmpp_2m(), 2),
        (diffusers.DPMSolverMultistepScheduler, other_solvers.dpmpp_3m("halved"), 3),
        (diffusers.UniPCMultistepScheduler, D.solvers.unipc(), 2),
    ],
    ids=["dpmpp_2m", "dpmpp_3m", "unipc"],
)
def test_near_zero_terminal_snr(scheduler_class, solver, order):
    path = near_zero_terminal_snr()
    predictions = ("sample", "v_prediction")
    run = run_ours(solver, path, predictions)
    for case in itertools.product(predictions, STEPS):
        prediction, steps = case
        scheduler = scheduler_class(
            **LINEAR_BETAS,
            prediction_type=prediction,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            solver_order=order,
        )
        scheduler.set_timesteps(steps)
        compare(run, prediction, D.make_grid(path, steps, spacing="trailing"), scheduler, case)
