"""What is tried: each entry of each scheduler's signature with values other than its default."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any, NamedTuple

import numpy as np
from diffusers import schedulers as reference

from jaxldm.schedulers.table import INVERSES, SCHEDULERS

_V = {"prediction_type": "v_prediction"}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_DYNAMIC = {"use_dynamic_shifting": True}
_THRESHOLD = {"thresholding": True}
_CONTINUOUS = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 120.0} | _V
# Entry -> values tried; a dictionary says what must stand next to it for the entry to have a meaning.
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.0005],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "trained_betas": [np.linspace(0.0004, 0.018, 1000).tolist()],
    "prediction_type": ["sample", "v_prediction"],
    "rescale_betas_zero_snr": [{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} | _V],
    "sigma_min": [{"sigma_min": 0.05, "use_karras_sigmas": True}],
    "sigma_max": [{"sigma_max": 8.0, "use_karras_sigmas": True}],
    "sigma_data": [0.7],
    "use_flow_sigmas": [_FLOW],
    "flow_shift": [{"flow_shift": 3.0} | _FLOW],
    "shift": [3.0],
    "beta_min": [0.2],
    "beta_max": [15.0],
    "sampling_eps": [0.01],
    "s": [0.02],
    "scaler": [2.0],
    "snr": [0.3],
    "correct_steps": [0, 2],
    "s_noise": [0.5],
    "clip_denoised": [False],
    "use_dynamic_shifting": [_DYNAMIC, {"use_dynamic_shifting": True} | _FLOW],
    "base_shift": [{"base_shift": 0.3} | _DYNAMIC],
    "max_shift": [{"max_shift": 0.9} | _DYNAMIC],
    "base_image_seq_len": [{"base_image_seq_len": 128} | _DYNAMIC],
    "max_image_seq_len": [{"max_image_seq_len": 8192} | _DYNAMIC],
    "time_shift_type": [{"time_shift_type": "linear"} | _DYNAMIC],
    "shift_terminal": [0.1, {"shift_terminal": 0.1} | _DYNAMIC, {"shift_terminal": 0.1} | _FLOW],
    "invert_sigmas": [True, {"invert_sigmas": True, "shift": 3.0}],
    "scale_factors": [[0.5, 1.0]],
    "upscale_mode": ["nearest"],
    "stochastic_sampling": [True],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "steps_offset": [1, {"steps_offset": 1, "timestep_spacing": "leading"}],
    "original_inference_steps": [40],
    "set_alpha_to_one": [True, False],
    "final_sigmas_type": [
        "sigma_min",
        {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    ],
    "timestep_type": [
        {"timestep_type": "continuous", "use_karras_sigmas": True},
        _CONTINUOUS | {"use_karras_sigmas": True},
        _CONTINUOUS | {"use_exponential_sigmas": True, "timestep_spacing": "leading"},
        _CONTINUOUS,
    ],
    "interpolation_type": [
        "log_linear",
        {"interpolation_type": "log_linear", "timestep_spacing": "leading", "steps_offset": 1},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True, "timestep_spacing": "trailing"},
        {"interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"},
    ],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "lambda_min_clipped": [{"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}],
    "sigma_schedule": ["exponential"],
    "rho": [5.0],
    "variance_type": ["fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", None],
    "skip_prk_steps": [True, False],
    "solver_order": [1, 2, 3],
    "algorithm_type": [
        "dpmsolver",
        "sde-dpmsolver",
        "sde-dpmsolver++",
        "deis",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 1},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {
            "algorithm_type": "dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_order": 3,
            "solver_type": "heun",
        },
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 1},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ],
    "predictor_order": [1, 3, {"predictor_order": 4, "lower_order_final": False}],
    "corrector_order": [1, 3, {"corrector_order": 4, "predictor_order": 3}],
    "tau_func": [{"tau_func": "all"}],
    "noise_sampler_seed": [3],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho", {"solver_type": "heun", "solver_order": 3}],
    "lower_order_final": [
        True,
        False,
        {"lower_order_final": False, "solver_order": 3},
        {"lower_order_final": True, "final_sigmas_type": "sigma_min"},
    ],
    "euler_at_final": [True, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}],
    "predict_x0": [False],
    "disable_corrector": [[0, 1]],
    "solver_p": [{"solver_p": {"_class_name": "DDIMScheduler"}}],
    "timestep_scaling": [5.0],
    "thresholding": [_THRESHOLD],
    "dynamic_thresholding_ratio": [{"dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5} | _THRESHOLD],
    "sample_max_value": [{"sample_max_value": 1.2} | _THRESHOLD],
    "clip_sample": [True, False],
    "clip_sample_range": [{"clip_sample_range": 0.5, "clip_sample": True}],
}
# Where an entry means something else.
OF_ONE: dict[str, dict[str, list[Any]]] = {
    "SASolverScheduler": {"algorithm_type": ["noise_prediction"]},
    "ScoreSdeVeScheduler": {"sigma_min": [0.05], "sigma_max": [50.0]},
    "CMStochasticIterativeScheduler": {
        "sigma_min": [0.01],
        "sigma_max": [40.0],
        "num_train_timesteps": [18, 4],
    },
    "UnCLIPScheduler": {"variance_type": ["learned_range"], "beta_schedule": ["linear"]},
    "EDMEulerScheduler": {"sigma_min": [0.01], "sigma_max": [40.0], "prediction_type": ["v_prediction"]},
    "EDMDPMSolverMultistepScheduler": {
        "sigma_min": [0.01],
        "sigma_max": [40.0],
        "prediction_type": ["v_prediction"],
    },
}


class Probe(NamedTuple):
    """One scheduler with one entry (None: none) changed; `config` holds that and what it needs."""

    scheduler: str
    entry: str | None
    config: dict[str, Any]

    def __str__(self) -> str:
        shown = {
            key: f"{len(value)} numbers" if key == "trained_betas" else value
            for key, value in self.config.items()
        }
        return f"{self.scheduler} {shown}"


def reference_class(scheduler: str) -> Any:
    """The class of diffusers. DPMSolverSDE's needs torchsde for its own noise alone, which is replaced."""
    if scheduler != "DPMSolverSDEScheduler":
        return getattr(reference, scheduler)
    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    if name not in sys.modules:
        absent = "torchsde" not in sys.modules
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        importlib.import_module(name)
        if absent:
            del sys.modules["torchsde"]
    return sys.modules[name].DPMSolverSDEScheduler


def signature(scheduler: str) -> dict[str, Any]:
    """The entries of a scheduler of the reference and their defaults."""
    parameters = inspect.signature(reference_class(scheduler).__init__).parameters
    rest = inspect.Parameter.VAR_KEYWORD
    return {
        name: value.default for name, value in parameters.items() if name != "self" and value.kind != rest
    }


def probes() -> list[Probe]:
    """Every scheduler as it is, then with every entry changed. KeyError: an entry without a value to try."""
    found = []
    for scheduler in (*SCHEDULERS, *INVERSES):
        known = signature(scheduler)
        found.append(Probe(scheduler, None, {}))
        for entry, default in known.items():
            for value in OF_ONE.get(scheduler, {}).get(entry, VALUES[entry]):
                config = value if isinstance(value, dict) else {entry: value}
                if config[entry] != default and config.keys() <= known.keys():
                    found.append(Probe(scheduler, entry, config))
    return found
