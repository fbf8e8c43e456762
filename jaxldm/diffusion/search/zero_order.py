"""Zero-order search: the best neighbour of a noise on its sphere is the next centre (Ma et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from jaxldm.arguments import a_key, array, check_shapes, checked, count
from jaxldm.diffusion.denoiser import A_DENOISER
from jaxldm.diffusion.grids import A_GRID, Grid
from jaxldm.diffusion.guidance import check_scale
from jaxldm.diffusion.sampling import Keys, a_shape, begin, image_keys, sample
from jaxldm.diffusion.search.candidates import (
    IMAGES,
    FoundNoise,
    candidate_keys,
    pick,
    rank,
    round_keys,
    run,
    seen,
)
from jaxldm.diffusion.search.verifiers import A_VERIFIER, check_verifier
from jaxldm.diffusion.solvers.solver import A_SOLVER, Solver, divide, noise_like


@checked(
    direction=array("floating", axes=(1, 64)), pivot=array("floating", axes=(1, 64)), radius=array(axes=0)
)
def sphere_neighbour(
    direction: Float[Any, "B ..."], pivot: Float[Any, "B ..."], radius: ScalarLike
) -> Float[Array, "B ..."]:
    """|n| (sqrt(1 - lambda^2) n/|n| + lambda v): as far from 0 as n, at an angle of arcsin(lambda) to it.

    v is the direction's part at right angles to n, of length 1. High-dimensional Gaussian noise lies close to
    a sphere, and what denoisers were trained on lies nowhere else.

    Args:
        direction: [B, H, W, C], any noise.
        pivot: n, [B, H, W, C].
        radius: lambda in [0, 1]; 0 stays where it is, 1 is at right angles.
    """
    check_shapes(direction=direction, pivot=pivot)
    check_scale("radius", radius, 1.0)
    pivot, direction = jnp.asarray(pivot), jnp.asarray(direction)
    axes = tuple(range(1, pivot.ndim))

    def length(x):
        return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))

    radius = jnp.asarray(radius, pivot.dtype)
    unit = divide(pivot, length(pivot) + jnp.zeros_like(pivot), 0.0)
    across = direction - jnp.sum(direction * unit, axes, keepdims=True) * unit
    across = divide(across, length(across) + jnp.zeros_like(pivot), 0.0)
    return jnp.sqrt((1 - radius) * (1 + radius)) * pivot + radius * length(pivot) * across


@checked(
    key=a_key,
    denoise=A_DENOISER,
    solver=A_SOLVER,
    grid=A_GRID,
    x_T=IMAGES,
    verifier=A_VERIFIER,
    num_neighbours=count(1),
    num_rounds=count(1),
    radius=array(axes=0),
)
def zero_order_search(
    key: Keys,
    denoise: Callable[[Any, Any], Any],
    solver: Solver,
    grid: Grid,
    x_T: Float[Any, "B ..."],
    verifier: Callable[[Any], Any],
    *,
    num_neighbours: int,
    num_rounds: int,
    radius: ScalarLike = 0.3,
) -> FoundNoise:
    """Climbs in the initial noise without gradients (Ma et al. 2025, zero-order search).

    In each round N neighbours of the noise are drawn on its sphere (`sphere_neighbour`), and the noise moves
    to the best of them if that is better than its own image, so that scores never fall. It costs
    1 + rounds * N runs of the network. Every run draws the same noise of steps, so x_0 is `D.sample` of the
    x_T returned.

    Args:
        key: one key, or one per image [B].
        denoise: (x, t) -> x_0 for B images.
        solver: from `jaxldm.diffusion.solvers`; the paper's are deterministic.
        grid: from `make_grid`.
        x_T: [B, H, W, C], from `initial_noise`.
        verifier: x_0 [B, H, W, C] -> scores [B].
        num_neighbours: N.
        num_rounds: how often the noise may move.
        radius: lambda in [0, 1], the sine of the angle between the noise and its neighbours; may be traced.

    Raises:
        InvalidArgumentError: a verifier that gives another shape, or NaN alone; a radius outside [0, 1].
    """
    grid, x_T = begin(denoise, grid, x_T, axes=1)
    check_verifier(verifier, x_T)
    check_scale("radius", radius, 1.0)
    a_shape("num_neighbours and x_T", (num_neighbours, *x_T.shape))

    def search(keys, grid, x_T, radius):
        def draw(x):
            x_0 = sample(keys, denoise, solver, grid, x)
            return x, x_0, verifier(x_0)

        def advance(best, j):
            own = candidate_keys(round_keys(keys, j), num_neighbours, x_T.shape[0])
            directions = jax.vmap(noise_like, (0, None))(own, best[0])
            neighbours = jax.vmap(sphere_neighbour, (0, None, None))(directions, best[0], radius)
            drawn = jax.vmap(draw)(neighbours)
            every = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), best, drawn)
            best = jax.tree.map(lambda x: x[0], pick(every, rank(every[2], 1), every[2].shape))
            return best, best[2]

        first = draw(x_T)
        (x, x_0, score), history = jax.lax.scan(advance, first, jnp.arange(num_rounds, dtype=jnp.int32))
        return FoundNoise(x_0, score, x, jnp.concatenate([first[2][None], history]))

    keys = image_keys(key, x_T.shape[0])
    found = run(search, keys, grid, x_T, jnp.asarray(radius, x_T.dtype))
    return seen(found, found.history)
