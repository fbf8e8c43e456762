"""The mathematics of diffusion: paths, predictions, denoisers, grids, solvers, and the fold that joins them.

    from jaxldm import diffusion as D

    path = D.VP.named("linear")
    grid = D.make_grid(path, 50)
    denoise = D.denoiser(network, D.epsilon(path))
    x_0 = D.sample(key, denoise, D.solvers.ddim(), grid, D.initial_noise(key, (16, 32, 32, 3), grid))

No network lives here. See docs/mathematics.md.
"""

from jaxldm.diffusion import caching, search, solvers
from jaxldm.diffusion.analytic import (
    gaussian_denoiser,
    gaussian_mixture_denoiser,
    gaussian_mixture_log_density,
    gaussian_solution,
)
from jaxldm.diffusion.betas import (
    BETAS,
    BetaSchedule,
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
from jaxldm.diffusion.cache_calibration import Calibration, calibrate_cache, fit_teacache
from jaxldm.diffusion.cached_sampling import CachedDenoiser, cached, cached_denoiser
from jaxldm.diffusion.caching import Cache
from jaxldm.diffusion.classifier_guidance import classifier_guidance
from jaxldm.diffusion.consistency import consistency_function
from jaxldm.diffusion.conversion import convert_time, on_path
from jaxldm.diffusion.cosine import Cosine
from jaxldm.diffusion.cutting import cut_by_strength, split_at_fraction, split_at_snr
from jaxldm.diffusion.denoiser import Denoiser, denoiser
from jaxldm.diffusion.distilled_times import lcm_timesteps
from jaxldm.diffusion.entries import (
    PATHS,
    path_from_dict,
    path_to_dict,
    prediction_of_0_1,
    prediction_to_dict,
)
from jaxldm.diffusion.evaluations import evaluation_counter, steps_within
from jaxldm.diffusion.grids import FINALS, Grid, cut, pad, reverse, steps_in
from jaxldm.diffusion.guidance import (
    Branches,
    autoguidance,
    classifier_free_guidance,
    condition_branches,
    guide,
    guide_branches,
    guide_chain,
    network_branches,
    rescale_guidance,
)
from jaxldm.diffusion.guidance_schedules import cfg_plus_plus, guidance_interval, guidance_schedule
from jaxldm.diffusion.inpainting import inpaint, resampling_grid
from jaxldm.diffusion.interpolants import INTERPOLANTS, Interpolant, interpolant_gamma
from jaxldm.diffusion.listeners import Listener, listening
from jaxldm.diffusion.losses import diffusion_loss, drop_condition, min_snr, p2
from jaxldm.diffusion.masked_tokens import (
    MASK_SCHEDULES,
    mask_by_chance,
    mask_fraction,
    mask_tokens,
    masked_token_loss,
)
from jaxldm.diffusion.paths import EDM, VP, ContinuousVP, Path
from jaxldm.diffusion.predictions import (
    PREDICTIONS,
    Prediction,
    edm,
    epsilon,
    flow,
    from_x0,
    implied_noise,
    linear_prediction,
    prediction,
    v,
    velocity,
    x0,
)
from jaxldm.diffusion.projected_guidance import (
    adaptive_projected_guidance,
    project_guidance,
    with_momentum,
)
from jaxldm.diffusion.rectified_flow import Flow, resolution_shift
from jaxldm.diffusion.sampling import bar_progress, image_keys, initial_noise, sample, sample_step
from jaxldm.diffusion.solvers import Restart, Solver, restart_grid
from jaxldm.diffusion.spacings import (
    SPACINGS,
    align_your_steps,
    at_sigmas,
    at_times,
    beta,
    beta_sigmas,
    exponential,
    karras,
    lcm,
    leading,
    linspace,
    linspace_fractional,
    make_grid,
    spacing_names,
    stage_c,
    trailing,
)
from jaxldm.diffusion.thresholding import change_x0, dynamic_threshold, static_threshold
from jaxldm.diffusion.training_times import (
    TRAINING_TIMES,
    TrainingTimes,
    cosmap,
    default_training_times,
    log_normal,
    logit_normal,
    mode,
    training_times,
    uniform,
)
from jaxldm.diffusion.unmasking import Unmasking, guided_logits, make_unmasking, sample_tokens

__all__ = [
    "BETAS",
    "EDM",
    "FINALS",
    "INTERPOLANTS",
    "MASK_SCHEDULES",
    "PATHS",
    "PREDICTIONS",
    "SPACINGS",
    "TRAINING_TIMES",
    "VP",
    "BetaSchedule",
    "Branches",
    "Cache",
    "CachedDenoiser",
    "Calibration",
    "ContinuousVP",
    "Cosine",
    "Denoiser",
    "Flow",
    "Grid",
    "Interpolant",
    "Listener",
    "Path",
    "Prediction",
    "Restart",
    "Solver",
    "TrainingTimes",
    "Unmasking",
    "adaptive_projected_guidance",
    "align_your_steps",
    "at_sigmas",
    "at_times",
    "autoguidance",
    "bar_progress",
    "beta",
    "beta_sigmas",
    "betas_from_alpha_bar",
    "cached",
    "cached_denoiser",
    "caching",
    "calibrate_cache",
    "cfg_plus_plus",
    "change_x0",
    "classifier_free_guidance",
    "classifier_guidance",
    "condition_branches",
    "consistency_function",
    "convert_time",
    "cosine_betas",
    "cosmap",
    "cut",
    "cut_by_strength",
    "default_training_times",
    "denoiser",
    "diffusion_loss",
    "drop_condition",
    "dynamic_threshold",
    "edm",
    "epsilon",
    "evaluation_counter",
    "exponential",
    "exponential_betas",
    "fit_teacache",
    "flow",
    "from_x0",
    "gaussian_denoiser",
    "gaussian_mixture_denoiser",
    "gaussian_mixture_log_density",
    "gaussian_solution",
    "guidance_interval",
    "guidance_schedule",
    "guide",
    "guide_branches",
    "guide_chain",
    "guided_logits",
    "image_keys",
    "implied_noise",
    "initial_noise",
    "inpaint",
    "interpolant_gamma",
    "karras",
    "laplace_betas",
    "lcm",
    "lcm_timesteps",
    "leading",
    "linear_betas",
    "linear_prediction",
    "linspace",
    "linspace_fractional",
    "listening",
    "log_normal",
    "logit_normal",
    "make_grid",
    "make_unmasking",
    "mask_by_chance",
    "mask_fraction",
    "mask_tokens",
    "masked_token_loss",
    "min_snr",
    "mode",
    "network_branches",
    "on_path",
    "p2",
    "pad",
    "path_from_dict",
    "path_to_dict",
    "prediction",
    "prediction_of_0_1",
    "prediction_to_dict",
    "project_guidance",
    "resampling_grid",
    "rescale_guidance",
    "rescale_zero_terminal_snr",
    "resolution_shift",
    "restart_grid",
    "reverse",
    "sample",
    "sample_step",
    "sample_tokens",
    "scaled_linear_betas",
    "search",
    "sigmoid_alphas_betas",
    "sigmoid_betas",
    "solvers",
    "spacing_names",
    "split_at_fraction",
    "split_at_snr",
    "stage_c",
    "static_threshold",
    "steps_in",
    "steps_within",
    "trailing",
    "training_times",
    "uniform",
    "v",
    "velocity",
    "with_momentum",
    "x0",
]
