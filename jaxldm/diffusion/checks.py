"""What `sample` refuses before anything is compiled, besides wrong types."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.grids import Grid
from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError

# A grid is another path's when a row is off by more than this part of its length, sqrt(alpha^2 + sigma^2).
# Published programs give networks rounded timesteps, and that is well below.
_MOST_OFF_PATH = 0.1


def check_channels_last(shape: tuple[int, ...]) -> None:
    """Raises `InvalidArgumentError` for what looks like [B, C, H, W]."""
    square = len(shape) == 4 and shape[1] in (1, 3, 4, 16) and shape[2] == shape[3] > 16
    oblong = len(shape) == 4 and shape[1] in (3, 4) and min(shape[2:]) > 16
    if square or oblong:
        raise InvalidArgumentError(
            f"images must be [B, H, W, C], got shape {shape}, which looks like [B, C, H, W]: "
            "write jnp.moveaxis(x, 1, -1)"
        )


def check_condition(condition: Any, x: Any, name: str = "condition", x_name: str = "x") -> None:
    """Raises `InvalidArgumentError` unless each array of a condition has a row for each image of x."""
    for leaf in jax.tree.leaves(condition):
        shape = np.shape(leaf)
        if shape and shape[0] != x.shape[0]:
            raise InvalidArgumentError(
                f"{name} has {shape[0]} rows, {x_name} has {x.shape[0]}: give one row for each"
            )


def check_path_of_grid(path: Any, grid: Grid) -> None:
    """Raises `InvalidArgumentError` where the rows can be seen and are not those of the path at their t."""
    columns = grid[:3]
    if not isinstance(path, Path) or traced(columns):
        return
    t, alpha, sigma = (np.asarray(column, np.float64) for column in columns)
    wanted_alpha, wanted_sigma = path.alpha(t), path.sigma(t)
    length = np.maximum(np.hypot(alpha, sigma), np.finfo(np.float64).tiny)
    off = np.hypot(alpha - wanted_alpha, sigma - wanted_sigma) / length
    worst = int(np.argmax(off))
    if off[worst] > _MOST_OFF_PATH:
        row = f"at t = {t[worst]:g} it has alpha, sigma = {alpha[worst]:.3g}, {sigma[worst]:.3g}"
        raise InvalidArgumentError(
            f"the grid must lie on the denoiser's {path.name} path, but {row} where the path has "
            f"{wanted_alpha[worst]:.3g}, {wanted_sigma[worst]:.3g}: write D.make_grid(denoise.path, ...)"
        )
