"""Optimization of the initial noise, through all steps of the sampling loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

from jaxldm.arguments import a_key, array, checked, count
from jaxldm.diffusion.compiling import traced
from jaxldm.diffusion.denoiser import A_DENOISER, Denoiser
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.guidance import check_scale
from jaxldm.diffusion.paths import per_image
from jaxldm.diffusion.sampling import Keys, begin, image_keys, sample
from jaxldm.diffusion.search.candidates import IMAGES, FoundNoise, run, seen
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver
from jaxldm.errors import InvalidArgumentError


@checked(
    key=a_key,
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=IMAGES,
    verifier=A_VERIFIER,
    num_updates=count(1),
    learning_rate=array(axes=0),
    regularization=array(axes=0),
    max_gradient=array(axes=0),
)
def optimize_noise(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Any, "B ..."],
    verifier: Callable[[Any], Any],
    *,
    num_updates: int,
    learning_rate: ScalarLike = 0.1,
    regularization: ScalarLike = 0.0,
    max_gradient: ScalarLike = 10.0,
) -> FoundNoise:
    """Gradient ascent on the initial noise (direct noise optimization, Tang et al. 2024).

    With z = x_T / sigma_T it climbs

        Quality(x_0(z)) + gamma ((d - 1) log |z| - |z|^2 / 2),

    where the second term is the log-density of the length of Gaussian noise of d numbers (Samuel et al. 2023;
    Eyring et al. 2024, ReNO): it keeps z close to the sphere that denoisers know. The noise of the highest
    objective on the way is returned. An update costs the steps of a run, each with its gradient and computed
    twice, so that memory holds one step at a time; one run more is added at the end.

    Args:
        key: one key, or one per image [B]; every update draws the same noise of steps.
        denoise: (x, t) -> x_0 for B images, differentiable.
        solver: from `jaxldm.diffusion.solvers`; deterministic in the paper.
        grid: from `make_grid`; few steps suffice.
        x_T: [B, H, W, C], from `initial_noise`.
        verifier: Quality, x_0 [B, H, W, C] -> [B], differentiable. An image's score must depend on that image
            alone.
        num_updates: how often z moves.
        learning_rate: of plain gradient ascent on z; may be traced.
        regularization: gamma, not negative; may be traced.
        max_gradient: a longer gradient of an image is cut to this length; may be traced.

    Returns:
        x_0 and score are those of the noise of the highest objective; `history` is the score at each update.

    Raises:
        InvalidArgumentError: a verifier that gives another shape, or NaN alone; numbers out of range; a grid
            whose first row has no noise.
    """
    given = {
        "learning_rate": learning_rate,
        "regularization": regularization,
        "max_gradient": max_gradient,
    }
    for name, value in given.items():
        check_scale(name, value, np.inf)
    grid, x_T = begin(denoise, grid, x_T, axes=1)
    check_verifier(verifier, x_T)
    checkpointed = _checkpointed(denoise)

    def objective(z, keys, grid, gamma):
        x_0 = sample(keys, checkpointed, solver, grid, grid.sigma[0] * z)
        score = verifier(x_0).astype(z.dtype)
        total = score + gamma * log_density_of_length(z)
        return jnp.sum(total), (total, score, x_0)

    def search(keys, grid, x_T, rate, gamma, longest):
        def better(best, new):
            wins = ~(new[0] <= best[0]) & ~jnp.isnan(new[0])
            return jax.tree.map(lambda a, b: jnp.where(per_image(wins, a), a, b), new, best)

        def update(carry, _):
            z, best = carry
            gradient, (total, score, x_0) = jax.grad(objective, has_aux=True)(z, keys, grid, gamma)
            best = better(best, (total, score, x_0, z))
            return (z + rate * shorten(gradient, longest), best), score

        z = x_T / grid.sigma[0]
        nothing = jnp.full(z.shape[:1], jnp.nan, z.dtype)
        (z, best), history = jax.lax.scan(update, (z, (nothing, nothing, z, z)), length=num_updates)
        _, (total, score, x_0) = objective(z, keys, grid, gamma)
        _, found, x_0, z = better(best, (total, score, x_0, z))
        return FoundNoise(x_0, found, grid.sigma[0] * z, jnp.concatenate([history, score[None]]))

    _check_noisy(grid)
    numbers = [jnp.asarray(value, x_T.dtype) for value in given.values()]
    found = run(search, image_keys(key, x_T.shape[0]), grid, x_T, *numbers)
    return seen(found, found.history)


def log_density_of_length(z: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """(d - 1) log |z| - |z|^2 / 2: the log-density of |z| for Gaussian z of d numbers, up to a constant."""
    square = jnp.sum(z.reshape(z.shape[0], -1) ** 2, axis=1)
    return 0.5 * (z[0].size - 1) * jnp.log(square) - 0.5 * square


def shorten(gradient: Float[Array, "B ..."], longest: Float[Array, ""]) -> Float[Array, "B ..."]:
    """Each image's gradient, at most so long."""
    length = jnp.sqrt(jnp.sum(gradient.reshape(gradient.shape[0], -1) ** 2, axis=1))
    return per_image(jnp.minimum(1, longest / jnp.maximum(length, 1e-20)), gradient) * gradient


def _checkpointed(denoise: Any) -> Any:
    """The denoiser that is computed again in the backward pass, instead of kept for all steps."""
    if isinstance(denoise, Denoiser):
        return dataclasses.replace(denoise, function=jax.checkpoint(denoise.function))
    return jax.checkpoint(denoise)


def _check_noisy(grid: Grid) -> None:
    if not traced(grid.sigma) and not np.asarray(grid.sigma)[0] > 0:
        raise InvalidArgumentError("the first row of the grid must have noise, sigma > 0, to optimize it")
