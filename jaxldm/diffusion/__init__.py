"""The mathematics of diffusion: paths, predictions, denoisers, grids, solvers, and the fold that joins them.

    from jaxldm import diffusion as D

    path = D.vp_path(D.linear_betas())
    grid = D.make_grid(path, 50)
    denoise = D.denoiser(predict, path, prediction="epsilon")
    x_0 = D.sample(key, denoise, D.solvers.ddim(), grid, D.initial_noise(key, (16, 32, 32, 3), grid))

No network lives here. See docs/mathematics.md.
"""

from jaxldm.diffusion import solvers
from jaxldm.diffusion.analytic import (
    gaussian_denoiser,
    gaussian_mixture_denoiser,
    gaussian_mixture_log_density,
    gaussian_solution,
)
from jaxldm.diffusion.betas import (
    betas_from_alpha_bar,
    cosine_betas,
    exponential_betas,
    laplace_betas,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    sigmoid_alphas_betas,
    sigmoid_betas,
)
from jaxldm.diffusion.conversion import convert_time, on_path
from jaxldm.diffusion.cutting import cut_by_strength, hand_over, split_at_snr
from jaxldm.diffusion.grids import FINALS, SIGMAS, SPACINGS, Grid, cut, make_grid, pad, reverse, steps_in
from jaxldm.diffusion.guidance import classifier_free_guidance, guide, rescale_guidance
from jaxldm.diffusion.interpolants import (
    INTERPOLANTS,
    from_sit,
    interpolant_gamma,
    interpolant_path,
    velocity_denoiser,
    velocity_to_x0,
)
from jaxldm.diffusion.losses import diffusion_loss, drop_condition, min_snr_weight
from jaxldm.diffusion.noise_schedule import NoiseSchedule
from jaxldm.diffusion.paths import Path, continuous_vp_path, edm_path, vp_path
from jaxldm.diffusion.predictions import PREDICTIONS, from_x0, target, to_x0
from jaxldm.diffusion.rectified_flow import TIME_DISTRIBUTIONS, flow_path, resolution_shift
from jaxldm.diffusion.sampling import (
    Denoiser,
    denoiser,
    edm_preconditioned,
    image_keys,
    initial_noise,
    sample,
)
from jaxldm.diffusion.scheduler_config import from_scheduler_config, to_scheduler_config
from jaxldm.diffusion.solvers import Solver

__all__ = [
    "FINALS",
    "INTERPOLANTS",
    "PREDICTIONS",
    "SIGMAS",
    "SPACINGS",
    "TIME_DISTRIBUTIONS",
    "Denoiser",
    "Grid",
    "NoiseSchedule",
    "Path",
    "Solver",
    "betas_from_alpha_bar",
    "classifier_free_guidance",
    "continuous_vp_path",
    "convert_time",
    "cosine_betas",
    "cut",
    "cut_by_strength",
    "denoiser",
    "diffusion_loss",
    "drop_condition",
    "edm_path",
    "edm_preconditioned",
    "exponential_betas",
    "flow_path",
    "from_scheduler_config",
    "from_sit",
    "from_x0",
    "gaussian_denoiser",
    "gaussian_mixture_denoiser",
    "gaussian_mixture_log_density",
    "gaussian_solution",
    "guide",
    "hand_over",
    "image_keys",
    "initial_noise",
    "interpolant_gamma",
    "interpolant_path",
    "laplace_betas",
    "linear_betas",
    "make_grid",
    "min_snr_weight",
    "on_path",
    "pad",
    "rescale_guidance",
    "rescale_zero_terminal_snr",
    "resolution_shift",
    "reverse",
    "sample",
    "scaled_linear_betas",
    "sigmoid_alphas_betas",
    "sigmoid_betas",
    "solvers",
    "split_at_snr",
    "steps_in",
    "target",
    "to_scheduler_config",
    "to_x0",
    "velocity_denoiser",
    "velocity_to_x0",
    "vp_path",
]
