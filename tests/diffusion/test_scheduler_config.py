"""scheduler_config.json: the grid that a scheduler of diffusers walks, read and written."""

import json

import diffusers
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def walk(scheduler, steps):
    """(sigma / alpha at the rows, as the scheduler has it), for both kinds of schedulers."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas.double().numpy()
    abar = scheduler.alphas_cumprod.double().numpy()
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    abar = np.append(abar[scheduler.timesteps.numpy()], float(last))
    return np.sqrt((1 - abar) / abar)


def written(scheduler):
    return json.loads(json.dumps(dict(scheduler.config))) | {"_class_name": type(scheduler).__name__}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False),  # Stable Diffusion 1.5
        diffusers.DDIMScheduler(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2"),
        diffusers.DDIMScheduler(
            timestep_spacing="linspace",
            num_train_timesteps=500,
            trained_betas=np.linspace(0.001, 0.02, 500).tolist(),
        ),
        diffusers.DDPMScheduler(beta_schedule="sigmoid", timestep_spacing="trailing"),
        diffusers.DDPMScheduler(beta_schedule="laplace"),
        diffusers.EulerDiscreteScheduler(**SD),
        diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),  # SDXL
        diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True, timestep_spacing="trailing"),
        diffusers.EulerDiscreteScheduler(**SD, use_beta_sigmas=True),
        diffusers.EulerAncestralDiscreteScheduler(**SD),
        diffusers.HeunDiscreteScheduler(**SD, use_exponential_sigmas=True),
        diffusers.LMSDiscreteScheduler(**SD),
        diffusers.DPMSolverMultistepScheduler(**SD),
        diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="leading", steps_offset=1),
        diffusers.DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True),
        diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
        diffusers.DPMSolverMultistepScheduler(
            **SD, final_sigmas_type="sigma_min", timestep_spacing="trailing"
        ),
        diffusers.DPMSolverSinglestepScheduler(**SD),
        diffusers.DEISMultistepScheduler(**SD),
        diffusers.UniPCMultistepScheduler(**SD, timestep_spacing="trailing"),
        diffusers.LCMScheduler(**SD, original_inference_steps=50),
        diffusers.EDMEulerScheduler(sigma_max=40.0),
        diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule="exponential"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_grid_is_the_schedulers(scheduler):
    schedule, options = D.from_scheduler_config(written(scheduler))
    for steps in (4, 13):
        theirs = walk(scheduler, steps)
        if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
            theirs = np.append(theirs[:-1:2], 0)  # every row but the first and the last stands there twice
        grid = D.make_grid(schedule.make_path(), steps, **options)
        # Its float32 alphas_cumprod leave 3e-4 in the smallest sigma; LCM's last row is not clean but unused.
        ours = grid.sigma / grid.alpha
        count = -1 if isinstance(scheduler, diffusers.LCMScheduler) else None
        np.testing.assert_allclose(ours[:count], theirs[:count], rtol=5e-4, atol=1e-6)


_OF_PNDM = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
_OF_UNIPC = {"use_karras_sigmas": True, "final_sigmas_type": "zero"}


@pytest.mark.parametrize(
    ("read_by", "foreign"),
    [
        ("DDIMScheduler", _OF_UNIPC),
        ("DDIMScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", _OF_PNDM),
        ("DPMSolverMultistepScheduler", _OF_UNIPC),
        ("EulerDiscreteScheduler", _OF_PNDM),
        ("EulerDiscreteScheduler", _OF_UNIPC),
    ],
)
def test_entries_of_another_scheduler_are_not_heeded(read_by, foreign):
    """`OtherScheduler.from_config(...)` keeps entries that the other one does not know."""
    scheduler = getattr(diffusers, read_by).from_config(SD | foreign)
    schedule, options = D.from_scheduler_config(SD | foreign | {"_class_name": read_by})
    grid = D.make_grid(schedule.make_path(), 7, **options)
    np.testing.assert_allclose(grid.sigma / grid.alpha, walk(scheduler, 7), rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("karras", [False, True])
def test_static_flow_shift(karras):
    """Stable Diffusion 3: the scheduler's own grid; its last t is shifted twice, ours once."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=karras)
    schedule, options = D.from_scheduler_config(written(scheduler))
    assert (schedule.path, schedule.prediction, schedule.shift) == ("flow", "flow", 3.0)
    scheduler.set_timesteps(28)
    schedule, parity = D.from_scheduler_config(written(scheduler) | {"_shift_t_min_twice": True})
    assert parity == options | {"shift_t_min_twice": True}
    grid = D.make_grid(schedule.make_path(), 28, **parity)
    np.testing.assert_allclose(grid.t, scheduler.sigmas, rtol=3e-6)


def test_dynamic_flow_shift():
    """FLUX.1-dev: the pipeline gives N even values and mu."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule, options = D.from_scheduler_config(written(scheduler))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=1.15)
    grid = D.make_grid(schedule.make_path(4096), 28, **options)
    np.testing.assert_allclose(grid.t, scheduler.sigmas, rtol=1e-6)


def test_flow_sigmas_of_other_schedulers():
    config = written(
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
    )
    schedule, options = D.from_scheduler_config(config)
    assert schedule == D.NoiseSchedule("flow", "flow", shift=3.0) and options == {}


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": "trailing"},
        {"spacing": "leading", "steps_offset": 1},
        {"spacing": "linspace"},
        {"spacing": "trailing", "final": "sigma_min"},
        {"spacing": "linspace_fractional"},
        {"spacing": "linspace_open"},
        {"spacing": "leading_open", "steps_offset": 1, "final": "sigma_min"},
        {"sigmas": "karras"},
        {"sigmas": "uniform_log_snr"},
        {"spacing": "trailing", "sigmas": "beta"},
        {"spacing": "linspace_fractional", "sigmas": "exponential"},
        {"spacing": "lcm", "original_steps": 100},
    ],
    ids=str,
)
def test_written_options_are_read_again(options):
    schedule = D.NoiseSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config = json.loads(json.dumps(schedule.to_dict(options)))
    assert D.from_scheduler_config(config) == (schedule, options)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    grid = D.make_grid(schedule.make_path(), 7, **options)
    theirs = walk(scheduler, 7)[:-1]
    np.testing.assert_allclose((grid.sigma / grid.alpha)[:7], theirs, rtol=5e-4)


def test_options_of_the_continuous_paths_are_read_again():
    for schedule, options in (
        (D.NoiseSchedule("edm"), {"sigmas": "exponential"}),
        (D.NoiseSchedule("edm"), {"sigmas": "karras", "rho": 5.0}),
        (D.NoiseSchedule("flow", "flow"), {"spacing": "linspace", "sigmas": "beta", "shift_terminal": 0.02}),
        (D.NoiseSchedule("flow", "flow", shift=3.0), {"spacing": "linspace", "shift_t_min_twice": True}),
        (D.NoiseSchedule("continuous_vp"), {"spacing": "linspace"}),
    ):
        config = json.loads(json.dumps(D.to_scheduler_config(schedule, options)))
        assert D.from_scheduler_config(config) == (schedule, options)


@pytest.mark.parametrize(
    "path, options",
    [
        ("vp", {"spacing": "beta"}),
        ("vp", {"sigmas": "ays_sd15"}),
        ("vp", {"sigmas": "karras", "spacing": "linspace_open"}),
        ("vp", {"shift": 3.0}),
        ("edm", {"spacing": "trailing"}),
        ("flow", {"sigmas": "uniform_log_snr"}),
        ("interpolant", {"spacing": "trailing"}),
    ],
)
def test_what_diffusers_has_no_word_for_is_refused(path, options):
    schedule = D.NoiseSchedule(path, "epsilon" if path in ("vp", "edm") else "flow")
    with pytest.raises(InvalidArgumentError, match=r"pass (it|them) to make_grid"):
        schedule.to_dict(options)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "NoiseSchedule", "path": "interpolant", "interpolant": "gpv"}, "gvp"),
        ({"_class_name": "NoiseSchedule", "pth": "interpolant"}, "pth"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "Leading"}, "did you mean 'leading'"),
        ({}, "DDIMScheduler"),
    ],
)
def test_what_is_not_known_is_refused(config, words):
    with pytest.raises(CheckpointError, match=words):
        D.from_scheduler_config(config)
