"""From one path to another: points of equal sigma / alpha are the same image up to a scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Real

from jaxldm.arguments import checked
from jaxldm.diffusion.denoiser import Denoiser
from jaxldm.diffusion.paths import A_PATH, Path, host_or_device, per_image
from jaxldm.errors import InvalidArgumentError


@checked(from_path=A_PATH, to_path=A_PATH)
def convert_time(
    t: Real[Any, " *shape"] | float, from_path: Path, to_path: Path
) -> tuple[Float[Any, " *shape"], Float[Any, " *shape"]]:
    """(t', scale): at t' `to_path` has the sigma / alpha of `from_path` at t, and x_t' = scale x_t.

    scale = sqrt(alpha'^2 + sigma'^2) / sqrt(alpha^2 + sigma^2), finite at the clean end and at pure noise
    (Karras et al. 2022, appendix C: paths of one ratio differ by a scale and a clock).

    Args:
        t: a time or an array of times of `from_path`; NumPy or JAX.

    Raises:
        InvalidArgumentError: host times outside `from_path` or noisier than `to_path` goes. Device arrays
            cannot be looked at: they are clamped to the noisy end of `to_path`.

    >>> from jaxldm import diffusion as D
    >>> t, scale = convert_time(3.0, D.EDM(), D.Flow())
    >>> float(t), float(scale)
    (0.75, 0.25)
    """
    xp, t = host_or_device(t)
    if xp is np:
        _check_times(t, from_path, to_path)
    alpha, sigma = from_path.alpha(t), from_path.sigma(t)
    most = _most(to_path)
    with np.errstate(divide="ignore"):
        ratio = sigma / alpha
    t_to = to_path.time(xp.where(ratio < most, ratio, most))
    alpha_to, sigma_to = to_path.alpha(t_to), to_path.sigma(t_to)
    return t_to, xp.sqrt(alpha_to**2 + sigma_to**2) / xp.sqrt(alpha**2 + sigma**2)


@checked(path=A_PATH)
def on_path(denoise: Denoiser, path: Path) -> Denoiser:
    """The same network, sampled on another path than the one it was trained on.

    denoise'(x, t) = denoise(scale x, t') with (t', scale) from `convert_time`. Rows noisier than the
    network's path goes are answered as at its noisy end.

    Args:
        denoise: knows its path, as everything from `denoiser` does.
        path: where x and t live from now on; make the grid on it.

    Raises:
        InvalidArgumentError: a plain function, whose path is not known.
    """
    if getattr(denoise, "path", None) is None:
        raise InvalidArgumentError(
            "on_path must know the network's own path: wrap it as D.Denoiser(denoise, path)"
        )

    def function(x, t):
        t, scale = convert_time(t, path, denoise.path)
        return denoise(per_image(scale, x) * x, t)

    return Denoiser(function, path)


def _most(path: Path) -> float:
    with np.errstate(divide="ignore"):
        return float(path.sigma(path.t_noisy) / path.alpha(path.t_noisy))


def _check_times(t: Float[Any, " ..."], from_path: Path, to_path: Path) -> None:
    if not np.all((t >= from_path.t_clean) & (t <= from_path.t_noisy)):
        raise InvalidArgumentError(
            f"times of the {from_path.name} path run from {from_path.t_clean:g} to {from_path.t_noisy:g}"
        )
    with np.errstate(divide="ignore"):
        ratio = np.max(from_path.sigma(t) / from_path.alpha(t), initial=0.0)
    if ratio > _most(to_path) * (1 + 1e-9):
        raise InvalidArgumentError(
            f"sigma / alpha = {ratio:g} is noisier than the {to_path.name} path, which ends at "
            f"{_most(to_path):g}: convert cleaner times, or make that path longer"
        )
