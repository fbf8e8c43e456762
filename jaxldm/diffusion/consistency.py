"""Consistency models as denoisers."""

from __future__ import annotations

from jaxldm.arguments import checked, number
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.solvers.solver import path_of
from jaxldm.diffusion.thresholding import change_x0
from jaxldm.errors import InvalidArgumentError


@checked(timestep_scaling=number(), sigma_data=number())
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
        raise InvalidArgumentError(f"sigma_data must be > 0, got {sigma_data}")

    def change(x_0, x, t):
        s = timestep_scaling * t
        total = s**2 + sigma_data**2
        return per_image(sigma_data**2 / total, x) * x + per_image(s / total**0.5, x) * x_0

    return change_x0(denoise, change)
