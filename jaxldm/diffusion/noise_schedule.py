"""How a trained network sees noise, as plain data: the path and prediction that recipes hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxldm.diffusion import betas as beta_schedules
from jaxldm.diffusion.betas import BETAS, BetaSchedule
from jaxldm.diffusion.cosine import Cosine
from jaxldm.diffusion.denoiser import Denoiser, denoiser
from jaxldm.diffusion.interpolants import Interpolant
from jaxldm.diffusion.paths import EDM, VP, ContinuousVP, Path
from jaxldm.diffusion.predictions import PREDICTIONS, Prediction, prediction
from jaxldm.diffusion.rectified_flow import Flow, resolution_shift
from jaxldm.diffusion.training_times import TrainingTimes, default_training_times, training_times
from jaxldm.errors import one_of

PATHS = ("vp", "edm", "flow", "continuous_vp", "interpolant", "cosine")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Path and prediction of a trained network.

    path: "vp" (DDPM), "edm", "flow", "continuous_vp", "interpolant" or "cosine".
    prediction: one of `jaxldm.diffusion.PREDICTIONS`; the network of an "edm" path is preconditioned instead.
      On continuous paths also "velocity", alpha' x_0 + sigma' eps: what SiT says on each of its interpolants.
    betas, num_train_timesteps, beta_start, beta_end, zero_terminal_snr: of the "vp" path alone; a beta_start
      or beta_end of None is the published one.
    sigma_data, sigma_min, sigma_max: of the "edm" path alone.
    trained_betas: of "vp", the betas themselves, in place of betas ... beta_end.
    beta_min, beta_max: of "continuous_vp".
    interpolant, gamma: of "interpolant": "linear", "gvp" or "vp", and (smin, smax) or None.
    t_min: of the continuous paths "flow", "continuous_vp" and "interpolant".
    time_distribution: of training on "flow" and "interpolant".
    shift: of "flow", static.
    dynamic_shift: of "flow", (base_shift, max_shift, base_tokens, max_tokens) of `resolution_shift`, or None;
      FLUX.1-dev has (0.5, 1.15, 256, 4096). Then `make_path` wants the number of image tokens.
    dynamic_shift_kind: "exponential" or "linear".
    offset, scaler: of "cosine".
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
    trained_betas: tuple[float, ...] | None = None
    beta_min: float = 0.1
    beta_max: float = 20.0
    interpolant: str = "linear"
    gamma: tuple[float, float] | None = None
    t_min: float = 1e-3
    time_distribution: str = "uniform"
    shift: float = 1.0
    dynamic_shift: tuple[float, float, int, int] | None = None
    dynamic_shift_kind: str = "exponential"
    offset: float = 0.008
    scaler: float = 1.0

    def __post_init__(self):
        for name in ("trained_betas", "gamma", "dynamic_shift"):  # lists, where they come from JSON
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                object.__setattr__(self, name, tuple(value))

    def make_path(self, num_image_tokens: int | None = None) -> Path:
        """The path itself. Raises `UnknownNameError` and `InvalidArgumentError` for what cannot be one.

        Args:
            num_image_tokens: sets the shift of a flow path with `dynamic_shift`; without it the shift is
                `shift`.
        """
        return _make_path(self, num_image_tokens if self.dynamic_shift is not None else None)

    def make_prediction(self, num_image_tokens: int | None = None) -> Prediction:
        """What the network's output means, on the path. Raises as `make_path` does."""
        path = self.make_path(num_image_tokens)
        if self.path == "edm":
            return prediction("edm", path, sigma_data=self.sigma_data)
        return prediction(self.prediction, path)

    def make_training_times(self) -> TrainingTimes:
        """The distribution of t in training. Raises `UnknownNameError`."""
        if self.time_distribution == "uniform":
            return default_training_times(self.make_path())
        return training_times(self.time_distribution)

    def make_denoiser(
        self, predict: Callable[[Any, Any], Any], *, learned_variance: bool = False
    ) -> Denoiser:
        """`denoise(x, t) -> x_0` of a network that was trained on this schedule; see `denoiser`."""
        return denoiser(predict, self.make_prediction(), learned_variance=learned_variance)

    def make_betas(self) -> np.ndarray:
        """The betas of a "vp" path, float64 [T]."""
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, np.float64)
            return beta_schedules.rescale_zero_terminal_snr(betas) if self.zero_terminal_snr else betas
        return self._beta_schedule().make()

    def beta_options(self) -> dict[str, float]:
        """beta_start and beta_end as numbers, the published ones where they were left out."""
        return self._beta_schedule().ends()

    def _beta_schedule(self) -> BetaSchedule:
        return BetaSchedule(
            one_of("betas", self.betas, BETAS),
            self.num_train_timesteps,
            self.beta_start,
            self.beta_end,
            self.zero_terminal_snr,
        )

    def to_dict(self, grid_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The entries of scheduler_config.json, in the words of diffusers; see `to_scheduler_config`."""
        from jaxldm.diffusion.scheduler_config import to_scheduler_config

        return to_scheduler_config(self, grid_options)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The inverse of `to_dict`; reads what diffusers writes, too; see `from_scheduler_config`.

        Raises:
          CheckpointError: a scheduler or an option that is not known here.
        """
        from jaxldm.diffusion.scheduler_config import from_scheduler_config

        return from_scheduler_config(config)[0]


def _make_path(schedule: NoiseSchedule, num_image_tokens: int | None) -> Path:
    one_of("path", schedule.path, PATHS)
    one_of("prediction", schedule.prediction, PREDICTIONS)
    if schedule.path == "edm":
        return EDM(sigma_min=schedule.sigma_min, sigma_max=schedule.sigma_max)
    if schedule.path == "cosine":
        return Cosine(offset=schedule.offset, scaler=schedule.scaler)
    if schedule.path == "continuous_vp":
        return ContinuousVP(beta_min=schedule.beta_min, beta_max=schedule.beta_max, t_min=schedule.t_min)
    if schedule.path == "interpolant":
        return Interpolant(schedule.interpolant, gamma=schedule.gamma, t_min=schedule.t_min)
    if schedule.path == "flow":
        shift = schedule.shift
        if num_image_tokens is not None:
            base_shift, max_shift, base_tokens, max_tokens = schedule.dynamic_shift
            shift = resolution_shift(
                num_image_tokens,
                base_tokens=base_tokens,
                max_tokens=max_tokens,
                base_shift=base_shift,
                max_shift=max_shift,
                kind=schedule.dynamic_shift_kind,
            )
        return Flow(shift=shift, t_min=schedule.t_min)
    if schedule.trained_betas is not None:
        return VP(schedule.make_betas())
    return VP.named(
        one_of("betas", schedule.betas, BETAS),
        schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        zero_terminal_snr=schedule.zero_terminal_snr,
    )
