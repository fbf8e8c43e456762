"""Consistency models as denoisers, and the timesteps that latent consistency models were trained on."""

from __future__ import annotations

import numpy as np

from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.solvers.solver import path_of
from jaxldm.diffusion.thresholding import change_x0
from jaxldm.errors import InvalidArgumentError


def consistency_function(
    denoise: Denoiser, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> Denoiser:
    """c_skip x + c_out x_0, which is x itself at t = 0: the boundary condition of consistency models.

    With s = timestep_scaling t, t the timestep's number, and d = sigma_data (Song et al. 2023, equation
    5; Luo et al. 2023, appendix)

        c_skip = d^2 / (s^2 + d^2),    c_out = s / sqrt(s^2 + d^2).

    Args:
        denoise: on a discrete path.
        timestep_scaling: 10 in published latent consistency models.
        sigma_data: the standard deviation of the data, > 0.

    Raises:
        InvalidArgumentError: a continuous path, where t is no number of a timestep; sigma_data <= 0.
    """
    path = path_of(denoise, "consistency_function")
    if path.num_train_timesteps is None:
        raise InvalidArgumentError(
            f"consistency_function scales the number of a timestep; this {path.name} path has none"
        )
    if not sigma_data > 0:
        raise InvalidArgumentError(f"sigma_data must be above 0, not {sigma_data}")

    def change(x_0, x, t):
        s = timestep_scaling * t
        total = s**2 + sigma_data**2
        return per_image(sigma_data**2 / total, x) * x + per_image(s / total**0.5, x) * x_0

    return change_x0(denoise, change)


def lcm_timesteps(
    num_inference_steps: int,
    num_train_timesteps: int = 1000,
    original_inference_steps: int = 50,
    strength: float = 1.0,
) -> np.ndarray:
    """The timesteps that a latent consistency model samples at, for `make_grid(timesteps=...)`.

    Distillation visits k, 2 k, ... less 1, with k = num_train_timesteps // original_inference_steps (Luo et
    al. 2023, section 4.3); N of them are taken, evenly by their place in that list, from its noisy end.

    Args:
        num_inference_steps: N, usually 1 to 8.
        num_train_timesteps: of the path.
        original_inference_steps: how many timesteps the distillation used. TCD uses the same list.
        strength: below 1 to start from a noised image: the noisiest part of the list is left out.

    Raises:
        InvalidArgumentError: more steps than the list has, or a strength outside (0, 1].

    >>> from jaxldm import diffusion as D
    >>> D.lcm_timesteps(4)
    array([999, 759, 499, 259])
    """
    if not 0 < strength <= 1:
        raise InvalidArgumentError(f"strength must lie above 0 and at most at 1, not {strength}")
    if not 1 <= original_inference_steps <= num_train_timesteps:
        raise InvalidArgumentError(
            f"original_inference_steps must lie in 1 to {num_train_timesteps}, not {original_inference_steps}"
        )
    visited = np.arange(1, int(original_inference_steps * strength) + 1)
    visited = visited * (num_train_timesteps // original_inference_steps) - 1
    if not 1 <= num_inference_steps <= len(visited):
        raise InvalidArgumentError(
            f"num_inference_steps={num_inference_steps}, but original_inference_steps x strength is "
            f"{len(visited)}: use 1 to {len(visited)} steps"
        )
    places = np.linspace(0, len(visited), num_inference_steps, endpoint=False).astype(int)
    return visited[::-1][places]
