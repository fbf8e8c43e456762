"""Where to cut a grid: by image-to-image strength, by SNR, or between a base model and a refiner."""

from __future__ import annotations

import numpy as np

from jaxldm.arguments import checked, flag, number
from jaxldm.diffusion.grids import A_GRID, Grid, cut
from jaxldm.diffusion.paths import A_PATH, Path
from jaxldm.errors import InvalidArgumentError
from jaxldm.exact import as_typed, ceil_product, floor_product, least_share


@checked(grid=A_GRID, strength=number(above=0, high=1), round_up=flag)
def cut_by_strength(grid: Grid, strength: float, *, round_up: bool = False) -> Grid:
    """Image-to-image: the last int(N strength) of N steps; strength 1 is the whole grid.

    Start from alpha[0] x_0 + sigma[0] eps, with the first row of the grid that comes back. N strength is the
    product of the decimals that were typed: 50 steps at 0.58 keep 29, where binary floats give 28.

    Args:
        grid: from `make_grid`.
        strength: in (0, 1].
        round_up: ceil(N strength) steps, as diffusers' SD3 and FLUX pipelines count.

    Raises:
        InvalidArgumentError: a strength outside (0, 1], or so small that no step is left; a padded grid.

    >>> from jaxldm import diffusion as D
    >>> D.cut_by_strength(D.make_grid(D.Flow(), 4), 0.5).t
    array([0.5 , 0.25, 0.  ], dtype=float32)
    """
    steps = len(grid.t) - 1
    kept = ceil_product(steps, strength) if round_up else floor_product(steps, strength)
    if kept < 1:
        raise InvalidArgumentError(
            f"strength={strength} leaves none of {steps} steps: take more steps, or a strength of "
            f"{least_share(steps)}"
        )
    return cut(grid, steps - kept)


@checked(grid=A_GRID, snr=number(above=0))
def split_at_snr(grid: Grid, snr: float) -> tuple[Grid, Grid]:
    """(noisy part, clean part), split at the first row whose alpha^2 / sigma^2 is at least `snr`.

    Truncated sampling runs the noisy part, and leaves the rest to one call of the denoiser or to another
    model. That row ends the first part and starts the second: sampling both is sampling the whole grid.

    Raises:
        InvalidArgumentError: one of the two parts would be empty; a padded grid.

    >>> from jaxldm import diffusion as D
    >>> noisy, clean = D.split_at_snr(D.make_grid(D.Flow(), 4), 1.0)
    >>> noisy.t, clean.t
    (array([1.  , 0.75, 0.5 ], dtype=float32), array([0.5 , 0.25, 0.  ], dtype=float32))
    """
    alpha, sigma = (np.asarray(column, np.float64) for column in (grid.alpha, grid.sigma))
    return _split(grid, int((alpha**2 < snr * sigma**2).sum()), f"snr={snr:g}")


@checked(grid=A_GRID, path=A_PATH, fraction=number(above=0, below=1))
def split_at_fraction(grid: Grid, path: Path, fraction: float) -> tuple[Grid, Grid]:
    """(base model's part, refiner's part): the base removes `fraction` of the noise, from the noisy end.

    The base takes every step that starts at t >= T (1 - fraction), rounded on a discrete path: diffusers'
    `denoising_end` and `denoising_start` of SDXL. The row where the base stops is the row where the refiner
    starts, so both models on one path take exactly the steps of the whole grid.

    Args:
        grid: from `make_grid(path, ...)`.
        path: has T; on a continuous path the whole range of t.
        fraction: in (0, 1); 0.8 in SDXL.

    Raises:
        InvalidArgumentError: a fraction outside (0, 1), or one of the two parts would be empty; a padded
            grid.

    >>> from jaxldm import diffusion as D
    >>> path = D.VP(D.scaled_linear_betas())
    >>> base, refiner = D.split_at_fraction(D.make_grid(path, 50), path, 0.8)
    >>> len(base.t) - 1, len(refiner.t) - 1
    (40, 10)
    """
    if path.num_train_timesteps is None:
        start = max(path.t_clean, 0.0)
        last = path.t_noisy - fraction * (path.t_noisy - start)
    else:
        last = round(path.num_train_timesteps * (1 - as_typed(fraction)))
    last -= 1e-6 * path.t_noisy  # rows are rounded to float32
    return _split(grid, int((grid.t[:-1] >= last).sum()), f"fraction={fraction:g}")


def _split(grid: Grid, steps: int, given: str) -> tuple[Grid, Grid]:
    if not 0 < steps < len(grid.t) - 1:
        empty = "first" if steps < 1 else "second"
        raise InvalidArgumentError(
            f"{given} leaves no step to the {empty} part of this grid of {len(grid.t) - 1} steps: "
            "use the whole grid, another place to split, or more steps"
        )
    return cut(grid, 0, steps), cut(grid, steps)
