"""scheduler_config.json as diffusers writes it: rows, solver and changes of x_0 are the scheduler's own."""

import json

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest

from jaxldm import diffusion as D
from jaxldm import schedulers
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError
from jaxldm.schedulers import GridRule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def levels(scheduler, steps):
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
    ours = schedulers.from_config(written(scheduler))
    for steps in (4, 13):
        theirs = levels(scheduler, steps)
        if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
            theirs = np.append(theirs[:-1:2], 0)  # every row but the first and the last is there twice
        grid = ours.make_grid(steps)
        # Its float32 alphas_cumprod leave 3e-4 in the smallest sigma; LCM's last row is not clean but unused.
        count = -1 if isinstance(scheduler, diffusers.LCMScheduler) else None
        np.testing.assert_allclose((grid.sigma / grid.alpha)[:count], theirs[:count], rtol=5e-4, atol=1e-6)


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
def test_entries_of_another_scheduler_are_ignored(read_by, foreign):
    """`OtherScheduler.from_config(...)` keeps entries that the other one does not know."""
    scheduler = getattr(diffusers, read_by).from_config(SD | foreign)
    grid = schedulers.from_config(SD | foreign | {"_class_name": read_by}).make_grid(7)
    np.testing.assert_allclose(grid.sigma / grid.alpha, levels(scheduler, 7), rtol=5e-4, atol=1e-6)


@pytest.mark.parametrize("karras", [False, True])
def test_static_flow_shift(karras):
    """Stable Diffusion 3: the scheduler's own grid; its last t is shifted twice, ours once."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=karras)
    once = schedulers.from_config(written(scheduler))
    assert once.prediction == D.flow(D.Flow(shift=3.0))
    scheduler.set_timesteps(28)
    twice = schedulers.from_config(written(scheduler) | {"_shift_t_min_twice": True})
    assert twice == once.with_grid(shift_t_min_twice=True)
    np.testing.assert_allclose(twice.make_grid(28).t, scheduler.sigmas, rtol=3e-6)


def test_dynamic_flow_shift():
    """FLUX.1-dev: the pipeline gives N even values and mu, from the number of image tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ours = schedulers.from_config(written(scheduler))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=1.15)
    np.testing.assert_allclose(ours.make_grid(28, num_image_tokens=4096).t, scheduler.sigmas, rtol=1e-6)
    assert ours.path_for(4096).default_shift == pytest.approx(np.exp(1.15))
    assert ours.path_for() == ours.path == D.Flow(shift=3.0)
    static = schedulers.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert static.path_for(4096) == D.Flow(shift=3.0)


def test_flow_sigmas_of_other_schedulers():
    config = written(
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
    )
    ours = schedulers.from_config(config)
    assert ours.prediction == D.flow(D.Flow(shift=3.0)) and ours.grid == GridRule()
    another = schedulers.from_config(config, "euler")
    assert another.prediction == ours.prediction and another.grid == ours.grid
    ends = schedulers.from_config(config | {"final_sigmas_type": "sigma_min"})
    assert ends.grid == GridRule(final="sigma_min")


def test_timesteps_of_dpm_solver_on_cosine_betas():
    """`lambda_min_clipped`, under all spacings, for both schedulers that read it."""
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler):
        several = kind is diffusers.DPMSolverMultistepScheduler
        for spacing in ("linspace", "leading", "trailing") if several else ("linspace",):
            more = {"timestep_spacing": spacing} if several else {}
            scheduler = kind(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, **more)
            scheduler.set_timesteps(10)
            ours = schedulers.from_config(written(scheduler))
            np.testing.assert_array_equal(ours.make_grid(10).t[:-1], scheduler.timesteps.numpy())
            again = schedulers.from_config(schedulers.to_config(ours.prediction, ours.grid))
            assert again.grid == ours.grid
    with pytest.raises(InvalidArgumentError, match="counts timesteps"):
        GridRule(lambda_min=-5.0).make(D.Flow(), 4)
    with pytest.raises(InvalidArgumentError, match="leaves no timestep"):
        GridRule(lambda_min=100.0).make(ours.path, 4)


@pytest.mark.parametrize(
    ("config", "solver"),
    [
        ({"_class_name": "PNDMScheduler"}, D.solvers.pndm(skip_prk_steps=False)),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, D.solvers.pndm()),
        ({"_class_name": "DPMSolverMultistepScheduler"}, D.solvers.dpmpp_2m()),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, D.solvers.dpmpp_3m()),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            D.solvers.dpmpp_2m_sde(),
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_type": "heun"}, D.solvers.dpmpp_2s("heun")),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, D.solvers.dpmpp_2m()),  # Playground v2.5
        ({"_class_name": "LCMScheduler"}, D.solvers.lcm()),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, D.solvers.ddpm("large")),
        ({"_class_name": "DDPMWuerstchenScheduler"}, D.solvers.ddpm(final_noise=False)),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, D.solvers.flow_heun()),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, D.solvers.unipc(3)),
    ],
    ids=lambda value: value.get("_class_name") if isinstance(value, dict) else "",
)
def test_the_solver_is_the_schedulers(config, solver):
    assert schedulers.from_config(config).solver == solver


def test_another_solver_has_the_rows_of_its_own_scheduler():
    config = SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    multistep = schedulers.from_config(config, "dpmpp_2m")
    assert multistep.solver == D.solvers.dpmpp_2m() and multistep.grid == GridRule(spacing="linspace_open")
    assert multistep.path == schedulers.from_config(config).path
    assert schedulers.from_config(config, "ddim", eta=0.5).solver == D.solvers.ddim(0.5)
    own = schedulers.from_config(config, D.solvers.dpmpp_2m())  # a solver of one's own keeps the file's rows
    assert own.solver == D.solvers.dpmpp_2m() and own.grid == schedulers.from_config(config).grid
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert schedulers.from_config(flow, "unipc").grid == schedulers.from_config(flow).grid
    early = schedulers.from_config(config, "dpmpp_2m", stops_early=True)
    assert early.solver == D.solvers.dpmpp_2m(lower_order_final=False)
    wuerstchen = {"_class_name": "DDPMWuerstchenScheduler"}
    assert schedulers.from_config(wuerstchen, stops_early=True).solver == D.solvers.ddpm()


def test_what_is_done_to_x_0():
    pixels = {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 2.0}

    def denoised(config, solver=None):
        sampler = schedulers.from_config(config, solver).sampler
        network = lambda x, t: jnp.full_like(x, 9.0)  # noqa: E731
        return sampler, sampler._replace(learned_variance=False).denoiser(network)(jnp.ones((1, 4)), 500.0)

    of_x0 = {"prediction_type": "sample"}
    assert denoised(pixels | of_x0)[1].max() == 2.0
    assert denoised(pixels | of_x0, "dpmpp_2m")[1].max() == 9.0  # its scheduler ignores clip_sample
    assert denoised(pixels | of_x0 | {"clip_sample": False})[1].max() == 9.0
    dynamic = pixels | {"thresholding": True, "sample_max_value": 3.0, "variance_type": "learned_range"}
    sampler, x_0 = denoised(dynamic | of_x0)
    assert sampler.threshold == (0.995, 3.0) and not sampler.clips and sampler.learned_variance
    assert x_0.max() == 1.0
    lcm, x_0 = denoised(SD | of_x0 | {"_class_name": "LCMScheduler", "timestep_scaling": 1e-4})
    assert lcm.timestep_scaling == 1e-4 and 1.0 < x_0.max() < 2.0  # c_skip x + c_out x_0 close to x
    assert lcm == schedulers.from_config(
        {"_class_name": "DDIMScheduler"} | SD | of_x0, "lcm"
    ).sampler._replace(timestep_scaling=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: schedulers.from_config({"_class_name": "DDIMScheduler"}, "dim"), UnknownNameError, "'ddim'"),
        (
            lambda: schedulers.from_config({"_class_name": "DDIMScheduler"}, D.solvers.ddim(), eta=1.0),
            InvalidArgumentError,
            "eta",
        ),
        (
            lambda: schedulers.from_config({"_class_name": "DDIMScheduler"}, "dpmpp_2m", eta=1.0),
            InvalidArgumentError,
            "no option 'eta'",
        ),
        (
            lambda: schedulers.Scheduler(
                schedulers.Sampler(D.v(D.VP.named("linear")), D.solvers.ddim()),
                dynamic_shift=schedulers.DynamicShift(),
            ),
            InvalidArgumentError,
            "needs a flow path",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_algorithm_that_is_not_known_here():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver+"}
    with pytest.raises(CheckpointError, match="name a solver"):
        schedulers.from_config(config)
    assert schedulers.from_config(config, "ddim").grid == GridRule(spacing="leading")


CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_predict"}, "v_prediction"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5, 1.0]}, "scale_factors"),
        ({"_class_name": "FlowMatchLCMScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "HeunDiscreteScheduler", "interpolation_type": "log_linear"}, "known for Heun"),
        ({"_class_name": "EulerDiscreteScheduler", **CONTINUOUS}, "sigma_min, sigma_max"),
        ({"_class_name": "SASolverScheduler", "algorithm_type": "noise_prediction"}, "data_prediction"),
        ({"_class_name": "DDIMInverseScheduler", "timestep_spacing": "linspace"}, "'leading' and 'trailing'"),
        ({"_class_name": "NoiseSchedule", "path": "interpolant", "interpolant": "gpv"}, "gvp"),
        ({"_class_name": "NoiseSchedule", "pth": "interpolant"}, "pth"),
        ({"_class_name": "PathScheduler", "path": {"type": "flaw"}, "prediction": "flow"}, "'flow'"),
        ({"_class_name": "PathScheduler", "path": {"type": "flow", "shft": 1}, "prediction": "flow"}, "shft"),
        (
            {"_class_name": "PathScheduler", "path": {"type": "a.b:C"}, "prediction": "flow"},
            "import a.b first .*jaxldm --import a.b",
        ),
        ({"_class_name": "PathScheduler"}, "scheduler_config"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "Leading"}, "did you mean 'leading'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed"}, "fixed_small"),
        ({"_class_name": "UniPCScheduler"}, "'UniPCScheduler'; .*did you mean 'UniPCMultistepScheduler'"),
        ({"_class_name": "DDIMSchduler"}, "did you mean 'DDIMScheduler'"),
        ({"_class_name": "FooScheduler"}, r"'FooScheduler'; known: DDPM[^;]*$"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 2.0]}, "every beta"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "even"}, "linspace"),
        ({"_class_name": "DDIMScheduler", "timestep_type": "continuous"}, "timestep_type"),
        ({"_class_name": "DDIMScheduler", "interpolation_type": "log_linear"}, "interpolation_type"),
        (
            {"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0, "use_karras_sigmas": True},
            "sigma_max",
        ),
        ({"_class_name": "DDIMScheduler", "prediction_type": "noise"}, "v_prediction"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1}, "num_train_timesteps"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}, "scheduler_config"),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "epsilon",
        ),
        ({"_class_name": "DDPMWuerstchenScheduler", "s": -1.0}, "offset must be a positive"),
        ({}, "DDIMScheduler"),
    ],
)
def test_what_is_not_known_is_refused(config, words):
    with pytest.raises(CheckpointError, match=words):
        schedulers.from_config(config)
