"""The names of 0.1, for code that has not moved to the new ones yet. Temporary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxldm.diffusion import denoiser as denoisers
from jaxldm.diffusion import losses
from jaxldm.diffusion.cosine import Cosine
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.interpolants import Interpolant
from jaxldm.diffusion.paths import EDM, VP, ContinuousVP, Path
from jaxldm.diffusion.predictions import Prediction, edm, implied_noise, prediction, velocity
from jaxldm.diffusion.predictions import from_x0 as prediction_from_x0
from jaxldm.diffusion.rectified_flow import Flow


def vp_path(betas: Any) -> VP:
    """`VP`."""
    return VP(betas)


def edm_path(sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """`EDM`."""
    return EDM(sigma_min=sigma_min, sigma_max=sigma_max)


def flow_path(t_min: float = 1e-3, *, shift: float = 1.0) -> Flow:
    """`Flow`."""
    return Flow(shift=shift, t_min=t_min)


def continuous_vp_path(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> ContinuousVP:
    """`ContinuousVP`."""
    return ContinuousVP(beta_min=beta_min, beta_max=beta_max, t_min=t_min)


def interpolant_path(name: str = "linear", *, gamma: Any = None, t_min: float = 1e-3) -> Interpolant:
    """`Interpolant`."""
    return Interpolant(name, gamma=gamma, t_min=t_min)


def cosine_path(offset: float = 0.008, scaler: float = 1.0) -> Cosine:
    """`Cosine`."""
    return Cosine(offset=offset, scaler=scaler)


def denoiser(
    network: Callable[[Any, Any], Any],
    path: Path | Prediction | None = None,
    prediction: str | Prediction = "epsilon",
    *,
    learned_variance: bool = False,
) -> Denoiser:
    """`denoiser(network, prediction)`, and denoiser(network, path, "epsilon")."""
    given = prediction if path is None else path
    if isinstance(given, Path):
        given = make_prediction(prediction, given)
    return denoisers.denoiser(network, given, learned_variance=learned_variance)


make_prediction = prediction


def diffusion_loss(
    key: Any,
    network: Any,
    path: Path | Prediction,
    x_0: Any,
    condition: Any = None,
    *,
    prediction: str = "epsilon",
    sigma_data: float | None = None,
    min_snr_gamma: float | None = None,
    **options: Any,
) -> Any:
    """`diffusion_loss(key, network, prediction, ...)`, and with a path and a name in its place."""
    if isinstance(path, Path):
        path = make_prediction(prediction, path) if sigma_data is None else edm(path, sigma_data)
    if min_snr_gamma is not None:
        options["weight"] = losses.min_snr(min_snr_gamma)
    return losses.diffusion_loss(key, network, path, x_0, condition, **options)


def velocity_denoiser(predict: Callable[[Any, Any], Any], path: Path) -> Denoiser:
    """`denoiser(predict, velocity(path))`."""
    return denoisers.denoiser(predict, velocity(path))


def edm_preconditioned(network: Any, sigma_data: float = 0.5, path: Path | None = None) -> Denoiser:
    """`denoiser(network, edm(path, sigma_data))`."""
    return denoisers.denoiser(network, edm(EDM() if path is None else path, sigma_data))


class _Level(Path):
    """A path that has one noise level."""

    def __init__(self, alpha: Any, sigma: Any):
        self.level = alpha, sigma

    def coefficients(self, xp, t):
        return self.level

    def time_of(self, xp, ratio):
        raise NotImplementedError

    def alpha(self, t):
        return self.level[0]

    def sigma(self, t):
        return self.level[1]

    zero_terminal_snr = False


def to_x0(name: str, output: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
    """`Prediction.to_x0` at a noise level."""
    return prediction(name, _Level(alpha, sigma)).to_x0(output, x_t, None)


def target(name: str, x_0: Any, epsilon: Any, alpha: Any, sigma: Any) -> Any:
    """`Prediction.target` at a noise level."""
    return prediction(name, _Level(alpha, sigma)).target(x_0, epsilon, None)


def x0_error_per_output_error(name: str, alpha: Any, sigma: Any) -> Any:
    """`Prediction.gain` at a noise level."""
    return prediction(name, _Level(alpha, sigma)).gain(None)


def from_x0(name: str | Prediction, x_0: Any, x_t: Any, alpha: Any, sigma: Any = None) -> Any:
    """`from_x0(prediction, x_0, x_t, t)`, and with a name and a noise level in place of prediction and t."""
    if isinstance(name, Prediction):
        return prediction_from_x0(name, x_0, x_t, alpha)
    return target(name, x_0, implied_noise(x_0, x_t, alpha, sigma), alpha, sigma)
