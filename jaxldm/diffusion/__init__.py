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
from jaxldm.diffusion.grids import FINALS, SIGMAS, SPACINGS, Grid, cut, make_grid, pad, reverse, steps_in
from jaxldm.diffusion.guidance import classifier_free_guidance, guide, rescale_guidance
from jaxldm.diffusion.losses import diffusion_loss, drop_condition, min_snr_weight
from jaxldm.diffusion.noise_schedule import NoiseSchedule
from jaxldm.diffusion.paths import (
    Path,
    cosine_betas,
    edm_path,
    flow_path,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    vp_path,
)
from jaxldm.diffusion.predictions import PREDICTIONS, from_x0, target, to_x0
from jaxldm.diffusion.sampling import (
    Denoiser,
    denoiser,
    edm_preconditioned,
    image_keys,
    initial_noise,
    sample,
)
from jaxldm.diffusion.solvers import Solver

__all__ = [
    "FINALS",
    "PREDICTIONS",
    "SIGMAS",
    "SPACINGS",
    "Denoiser",
    "Grid",
    "NoiseSchedule",
    "Path",
    "Solver",
    "classifier_free_guidance",
    "cosine_betas",
    "cut",
    "denoiser",
    "diffusion_loss",
    "drop_condition",
    "edm_path",
    "edm_preconditioned",
    "flow_path",
    "from_x0",
    "gaussian_denoiser",
    "gaussian_mixture_denoiser",
    "gaussian_mixture_log_density",
    "gaussian_solution",
    "guide",
    "image_keys",
    "initial_noise",
    "linear_betas",
    "make_grid",
    "min_snr_weight",
    "pad",
    "rescale_guidance",
    "rescale_zero_terminal_snr",
    "reverse",
    "sample",
    "scaled_linear_betas",
    "solvers",
    "steps_in",
    "target",
    "to_x0",
    "vp_path",
]
