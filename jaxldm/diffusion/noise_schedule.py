"""How a trained network sees noise, as plain data: path and prediction, to and from scheduler_config.json."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxldm.diffusion import paths
from jaxldm.diffusion.predictions import PREDICTIONS
from jaxldm.diffusion.sampling import Denoiser, denoiser, edm_preconditioned
from jaxldm.errors import CheckpointError, InvalidArgumentError, JaxldmError, one_of

# Our name of a beta schedule -> the function, and its name in the scheduler_config.json that diffusers reads.
BETAS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "linear": (paths.linear_betas, "linear"),
    "scaled_linear": (paths.scaled_linear_betas, "scaled_linear"),
    "cosine": (paths.cosine_betas, "squaredcos_cap_v2"),
}
# Path -> the scheduler of diffusers that walks it.
_SCHEDULERS = {"vp": "DDIMScheduler", "edm": "EDMEulerScheduler", "flow": "FlowMatchEulerDiscreteScheduler"}
# Other schedulers of diffusers that say the same of a model.
_ALIASES = {
    "DDPMScheduler": "vp",
    "PNDMScheduler": "vp",
    "DPMSolverMultistepScheduler": "vp",
    "EulerDiscreteScheduler": "vp",
}


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Path and prediction of a trained network.

    path: "vp" (DDPM), "edm" or "flow".
    prediction: one of `jaxldm.diffusion.PREDICTIONS`; the network of an "edm" path is preconditioned instead.
    betas, num_train_timesteps, beta_start, beta_end, zero_terminal_snr: of the "vp" path alone; a beta_start
      or beta_end of None is the published one.
    sigma_data, sigma_min, sigma_max: of the "edm" path alone.
    """

    path: str = "vp"
    prediction: str = "epsilon"
    betas: str = "linear"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def make_path(self) -> paths.Path:
        """The path itself. Raises `UnknownNameError` and `InvalidArgumentError` for what cannot be one."""
        return _make_path(self)

    def make_denoiser(self, predict: Callable[[Any, Any], Any]) -> Denoiser:
        """`denoise(x, t) -> x_0` of a network that was trained on this schedule."""
        if self.path == "edm":
            return edm_preconditioned(predict, self.sigma_data, self.make_path())
        return denoiser(predict, self.make_path(), self.prediction)

    def to_dict(self) -> dict[str, Any]:
        """The entries of scheduler_config.json, in the words of diffusers, which opens it as a scheduler."""
        config: dict[str, Any] = {"_class_name": _SCHEDULERS[self.path]}
        if self.path == "vp":
            betas = self._beta_options()
            return (
                config
                | betas
                | {
                    "beta_schedule": BETAS[self.betas][1],
                    "num_train_timesteps": self.num_train_timesteps,
                    "prediction_type": self.prediction,
                    "rescale_betas_zero_snr": self.zero_terminal_snr,
                    "timestep_spacing": "trailing",
                    "clip_sample": False,
                    "set_alpha_to_one": True,
                    "steps_offset": 0,
                }
            )
        if self.path == "edm":
            return config | {
                "sigma_data": self.sigma_data,
                "sigma_min": self.sigma_min,
                "sigma_max": self.sigma_max,
                "prediction_type": "epsilon",
            }
        return config | {"num_train_timesteps": 1000, "shift": 1.0, "_prediction_type": self.prediction}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The inverse of `to_dict`; reads what diffusers writes for a DDPM model, too.

        Raises:
          CheckpointError: a scheduler or an option that is not known here.
        """
        name = config.get("_class_name")
        path = next((path for path, known in _SCHEDULERS.items() if known == name), _ALIASES.get(name))
        if path is None:
            raise CheckpointError(
                f"scheduler_config.json has _class_name {name!r}; known: "
                f"{', '.join([*_SCHEDULERS.values(), *_ALIASES])}"
            )
        try:
            if path == "flow":
                schedule = cls("flow", config.get("_prediction_type", "flow"))
            elif path == "edm":
                schedule = cls(
                    "edm",
                    **{
                        key: float(config[key])
                        for key in ("sigma_data", "sigma_min", "sigma_max")
                        if key in config
                    },
                )
            else:
                schedule = cls._from_betas(config)
            schedule.make_denoiser(lambda x, t: x)  # a path and a prediction that go together
        except (JaxldmError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"scheduler_config.json does not describe a schedule known here: {error}"
            ) from error
        return schedule

    @classmethod
    def _from_betas(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        published = config.get("beta_schedule", "linear")
        names = {theirs: ours for ours, (_, theirs) in BETAS.items()}
        if config.get("trained_betas") is not None:
            raise CheckpointError("trained_betas are not supported: use one of the named beta schedules")
        betas = names[one_of("beta_schedule", published, names)]
        # diffusers' own defaults stand where the file is silent; the cosine schedule has no start and end.
        start, end = (
            (None, None)
            if betas == "cosine"
            else (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
        )
        return cls(
            "vp",
            config.get("prediction_type", "epsilon"),
            betas,
            config.get("num_train_timesteps", 1000),
            start,
            end,
            bool(config.get("rescale_betas_zero_snr", False)),
        )

    def _beta_options(self) -> dict[str, float]:
        """beta_start and beta_end as numbers, the published ones where they were left out."""
        if self.betas == "cosine":
            return {}
        start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[self.betas]
        return {
            "beta_start": start if self.beta_start is None else self.beta_start,
            "beta_end": end if self.beta_end is None else self.beta_end,
        }


@functools.lru_cache
def _make_path(schedule: NoiseSchedule) -> paths.Path:
    one_of("path", schedule.path, _SCHEDULERS)
    one_of("prediction", schedule.prediction, PREDICTIONS)
    if schedule.path == "edm":
        return paths.edm_path(schedule.sigma_data, schedule.sigma_min, schedule.sigma_max)
    if schedule.path == "flow":
        return paths.flow_path()
    function = BETAS[one_of("betas", schedule.betas, BETAS)][0]
    if schedule.num_train_timesteps < 2:
        raise InvalidArgumentError("num_train_timesteps must be 2 or more")
    betas = function(schedule.num_train_timesteps, **schedule._beta_options())
    return paths.vp_path(paths.rescale_zero_terminal_snr(betas) if schedule.zero_terminal_snr else betas)
