"""What a solver is, and the two lines that most solvers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxldm.arguments import refuse
from jaxldm.diffusion.grids import Grid
from jaxldm.diffusion.paths import Path
from jaxldm.errors import InvalidArgumentError, shown


class Solver(NamedTuple):
    """How to go from row to row of a grid, as a pair of pure functions.

    Attributes:
        init: x [B, ...] -> state, any pytree with an attribute `x`.
        step: (state, denoise, grid, i, keys) -> (state, x_0), from row i of the grid to row i + 1.
            `denoise(x, t)` gives x_0; `keys` [B] holds one key per image for this step. The x_0 [B, ...]
            returned is the first of the step, at row i: what previews show.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Grid, Any, Any], tuple[Any, Any]]


def A_SOLVER(name: str, value: Any) -> Solver:
    """A solver: a `Solver`, or what has its two functions."""
    if isinstance(value, str):
        raise refuse(name, "a solver such as D.solvers.ddim()", value, f"D.solvers.make({shown(value)})")
    if callable(getattr(value, "init", None)) and callable(getattr(value, "step", None)):
        return value
    made = getattr(value, "__name__", "") if callable(value) else ""
    raise refuse(name, "a solver such as D.solvers.ddim()", value, f"{made}()" if made.isidentifier() else "")


class State(NamedTuple):
    """The state of a solver that remembers nothing but the image."""

    x: Float[Array, "B ..."]


class Row(NamedTuple):
    """One row of a grid, or a point between two."""

    t: Float[Array, ""]
    alpha: Float[Array, ""]
    sigma: Float[Array, ""]


def row(grid: Grid, i: Int[Any, ""] | int) -> Row:
    """Row i of the grid."""
    t, alpha, sigma = cast(tuple[Any, Any, Any], (grid.t, grid.alpha, grid.sigma))
    return Row(t[i], alpha[i], sigma[i])


def move(
    x: Float[Array, "B ..."], x_0: Float[Array, "B ..."], here: Row, there: Row
) -> Float[Array, "B ..."]:
    """alpha_s x_0 + sigma_s eps with eps = (x - alpha_t x_0) / sigma_t: from row t straight to row s.

    This is DDIM (Song et al. 2021, equation 12 with sigma = 0), Euler's method in sigma / alpha on every
    path, and DPM-Solver-1. It needs no logarithm, so it is finite at alpha_t = 0 (pure noise) and at sigma_s
    = 0 (clean).
    """
    ratio = there.sigma / jnp.where(here.sigma == 0, 1, here.sigma)
    return ratio * x + (there.alpha - ratio * here.alpha) * x_0


def noise_like(keys: Key[Array, " B"], x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Standard normal noise of x's shape and type; image k's depends on keys[k] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def add_noise(x: Float[Array, "..."], here: Row, there: Row, z: Float[Array, "..."]) -> Float[Array, "..."]:
    """(alpha_s / alpha_t) x + sqrt(sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2) z: from row t up to row s.

    This is the path's own forward transition to a noisier row.
    """
    q = divide(here.sigma * there.alpha, there.sigma * here.alpha, 0.0)
    std = there.sigma * jnp.sqrt(jnp.maximum((1 - q) * (1 + q), 0))
    return divide(there.alpha, here.alpha, 0.0) * x + std * z


def divide(
    numerator: Float[Array, " ..."] | float, denominator: Float[Array, " *shape"], otherwise: float
) -> Float[Array, " ..."]:
    """numerator / denominator, and `otherwise` where the denominator is 0; gradients stay finite too."""
    empty = denominator == 0
    return jnp.where(empty, otherwise, numerator / jnp.where(empty, 1, denominator))


def is_needed(denoise: Any, condition: Any) -> Any:
    """Whether a step has to compute what only some steps need, such as another evaluation.

    That is the condition itself, or where the denoiser knows of images at other steps (`any_image`) whether
    it holds for any of them: so `vmap` leaves the `cond` a choice, and does not compute both branches always.
    """
    any_image = getattr(denoise, "any_image", None)
    return condition if any_image is None else any_image(condition)


def path_of(denoise: Any, solver: str) -> Path:
    """The path of a denoiser, for solvers that look between the rows of the grid.

    Raises:
        InvalidArgumentError: a plain function, which has no path.
    """
    path = getattr(denoise, "path", None)
    if path is None:
        raise InvalidArgumentError(
            f"{solver} looks between the rows of the grid, so it must know the path: "
            "wrap your function as D.Denoiser(denoise, path)"
        )
    return path
