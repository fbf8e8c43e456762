"""The entries of a scheduler_config.json: what each may be, and what a scheduler does where one is absent."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from jaxldm.entries import Bounds, read_value, read_values
from jaxldm.errors import CheckpointError
from jaxldm.exact import LARGEST_INT32, MAX_TIMESTEPS
from jaxldm.reading import shown

PLACE = "scheduler_config.json"
_Flag: Any = bool | None  # null is false, as in diffusers
_Count: Any = Annotated[int, Bounds(0, LARGEST_INT32)]
_Float: Any = Annotated[float, Bounds(-3.4e38, 3.4e38)]
_Positive: Any = Annotated[float, Bounds(1e-30, 3.4e38)]
_Unit: Any = Annotated[float, Bounds(0, 1)]
TYPES: Mapping[str, Any] = {
    "_class_name": str,
    # the path and the prediction
    "num_train_timesteps": Annotated[int, Bounds(1, MAX_TIMESTEPS)],
    "beta_schedule": str,
    "beta_start": _Unit,
    "beta_end": _Unit,
    "trained_betas": tuple[_Float, ...] | None,
    "rescale_betas_zero_snr": _Flag,
    "prediction_type": str,
    "sigma_min": _Float | None,
    "sigma_max": _Float | None,
    "sigma_data": _Positive,
    "use_flow_sigmas": _Flag,
    "flow_shift": _Positive | None,
    "shift": _Positive,
    "beta_min": _Positive,
    "beta_max": _Positive,
    "sampling_eps": _Positive,
    "s": _Float,
    "scaler": _Float,
    "use_dynamic_shifting": _Flag,
    "base_shift": _Float | None,
    "max_shift": _Float | None,
    "base_image_seq_len": _Count | None,
    "max_image_seq_len": _Count | None,
    "time_shift_type": str | None,
    # the grid
    "timestep_spacing": str,
    "steps_offset": Annotated[int, Bounds(0, MAX_TIMESTEPS)],
    "original_inference_steps": Annotated[int, Bounds(1, MAX_TIMESTEPS)],
    "set_alpha_to_one": _Flag,
    "final_sigmas_type": str | None,
    "timestep_type": str,
    "interpolation_type": str,
    "use_karras_sigmas": _Flag,
    "use_exponential_sigmas": _Flag,
    "use_beta_sigmas": _Flag,
    "use_lu_lambdas": _Flag,
    "lambda_min_clipped": Annotated[float, Bounds()],  # minus infinity: no bound
    "sigma_schedule": str | None,
    "rho": _Positive,
    "shift_terminal": _Unit | None,
    "invert_sigmas": _Flag,
    "scale_factors": tuple[_Float, ...] | None,
    "upscale_mode": str,
    # the solver
    "variance_type": str | None,
    "skip_prk_steps": _Flag,
    "solver_order": int,
    "algorithm_type": str,
    "solver_type": str,
    "lower_order_final": _Flag,
    "euler_at_final": _Flag,
    "predict_x0": _Flag,
    "disable_corrector": tuple[_Count, ...] | None,
    "solver_p": Any,
    "stochastic_sampling": _Flag,
    "predictor_order": _Count,
    "corrector_order": _Count,
    "tau_func": Any,
    "noise_sampler_seed": _Count | None,
    "snr": Annotated[float, Bounds(0, 3.4e38)],
    "correct_steps": Annotated[int, Bounds(0, 100)],
    "s_noise": Annotated[float, Bounds(0, 3.4e38)],
    "timestep_scaling": _Float,
    # x_0
    "thresholding": _Flag,
    "dynamic_thresholding_ratio": _Unit,
    "sample_max_value": _Positive,
    "clip_sample": _Flag,
    "clip_sample_range": _Positive,
    "clip_denoised": _Flag,
    # entries of our own
    "_betas": str,
    "_prediction_type": str,
    "_spacing": str | None,
    "_final": str,
    "_t_min": _Positive,
    "_shift_t_min_twice": _Flag,
}
# Of `OWN`, whose entries differ.
TYPES_OF_OWN: Mapping[str, Any] = {"path": dict, "prediction": str, "grid": dict, "sigma_data": _Positive}
# What schedulers of diffusers do where their own file is silent, if not what most of them do.
_LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LCMScheduler": {**_LATENT_DIFFUSION, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_LATENT_DIFFUSION, "beta_schedule": "scaled_linear"},
    "HeunDiscreteScheduler": _LATENT_DIFFUSION,
    "KDPM2DiscreteScheduler": _LATENT_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _LATENT_DIFFUSION,
    "DPMSolverSDEScheduler": _LATENT_DIFFUSION,
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "CMStochasticIterativeScheduler": {"num_train_timesteps": 40, "clip_denoised": True},
}
# Schedulers that clip x_0 to [-1, 1] where the file that names them does not say whether.
CLIPS_BY_DEFAULT = ("DDPMScheduler", "DDIMScheduler", "UnCLIPScheduler")


def typed(config: Any) -> dict[str, Any]:
    """The entries of a file, each of the type that it must have, or `CheckpointError`.

    Entries that nothing here knows are left as they are, as in diffusers, unless they look like a name that
    is misspelled: then the error says which.
    """
    entries = read_value(config, dict, PLACE)
    kinds = TYPES_OF_OWN if entries.get("_class_name") == "PathScheduler" else TYPES
    for key in entries:
        if not isinstance(key, str):
            raise CheckpointError(f"{PLACE} has a key that is no string: {shown(key)}")
        near = [] if key in kinds else difflib.get_close_matches(key[:60], kinds, n=1, cutoff=0.9)
        if near and not key.startswith("_"):
            raise CheckpointError(f"{PLACE} has an unknown key {shown(key)}; did you mean {near[0]!r}?")
    return read_values(entries, kinds, PLACE)


def with_defaults(config: Mapping[str, Any], scheduler: str, *, names_it: bool) -> dict[str, Any]:
    """The entries and, where they are silent, what the scheduler of diffusers does then.

    Args:
        config: of a file.
        scheduler: its class in diffusers.
        names_it: the file is that scheduler's own. Another's file that does not say whether to clip x_0 is
            for latents, which have no range, so that nothing is clipped.
    """
    clips = {"clip_sample": True} if names_it and scheduler in CLIPS_BY_DEFAULT else {}
    return {**clips, **DEFAULTS.get(scheduler, {}), **config}
