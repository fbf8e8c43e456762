"""Data on a plane whose probability-flow ODE is known, and how far a student's map or samples are from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.exact_ode import follow
from jaxldm import diffusion as D

MEAN, STD = np.array([0.7, -0.4]), np.array([0.5, 1.2])
# Three blobs that overlap: the map from noise is curved, and nowhere torn.
WEIGHTS = np.array([0.3, 0.4, 0.3])
MEANS = np.array([[-1.0, -0.4], [0.2, 0.9], [1.0, -0.7]])
STDS = np.array([0.5, 0.4, 0.5])
POINTS = 2048  # where a map is compared
SAMPLES, DIRECTIONS = 32_768, 64  # of the distance between distributions


class Data(NamedTuple):
    """A distribution on the plane.

    Attributes:
        name: in tables.
        draw: (key, count) -> x_0 [count, 2].
        denoiser: path -> E[x_0 | x_t] in closed form.
        solve: (path, x) -> where the ODE takes x, which lie at the noisy end of the path.
    """

    name: str
    draw: Callable[[Any, int], Any]
    denoiser: Callable[[D.Path], D.Denoiser]
    solve: Callable[[D.Path, Any], np.ndarray]


def _draw_gaussian(key, count):
    mean, std = (jnp.asarray(value, jnp.float32)[None] for value in (MEAN, STD))
    return mean + std * jax.random.normal(key, (count, 2))


def _solve_gaussian(path, x):
    with jax.enable_x64(True):
        end = path.t_min if isinstance(path, D.EDM) else 0.0
        return np.asarray(
            D.gaussian_solution(path, MEAN, STD, jnp.asarray(x, jnp.float64), path.t_noisy, end)
        )


GAUSSIAN = Data(
    "Gaussian", _draw_gaussian, lambda path: D.gaussian_denoiser(path, MEAN, STD), _solve_gaussian
)


def _draw_mixture(key, count):
    which_key, key = jax.random.split(key)
    which = jax.random.choice(which_key, len(WEIGHTS), (count,), p=jnp.asarray(WEIGHTS, jnp.float32))
    means, stds = jnp.asarray(MEANS, jnp.float32)[which], jnp.asarray(STDS, jnp.float32)[which]
    return means + stds[:, None] * jax.random.normal(key, (count, 2))


def _mixture_denoiser(path):
    return D.gaussian_mixture_denoiser(path, WEIGHTS, MEANS, STDS)


def _solve_mixture(path, x):
    with jax.enable_x64(True):
        return follow(_mixture_denoiser, path, np.asarray(x, np.float64))


MIXTURE = Data("mixture", _draw_mixture, _mixture_denoiser, _solve_mixture)


def noise_at(path: D.Path, seed: int = 1) -> np.ndarray:
    """Points at the noisy end of a path, [POINTS, 2]."""
    noise = np.random.default_rng(seed).standard_normal((POINTS, 2)).astype(np.float32)
    return noise * np.float32(path.sigma(path.t_noisy))


def map_error(found: Any, exact: Any) -> float:
    """Root mean square of the difference, over that of the exact map about its mean."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    spread = np.sqrt(np.mean((exact - exact.mean(0)) ** 2))
    return float(np.sqrt(np.mean((found - exact) ** 2)) / spread)


def distribution_error(samples: Any, data: Data, seed: int = 2) -> float:
    """Sliced Wasserstein-2 distance from the data, over the data's standard deviation.

    Of each of `DIRECTIONS` evenly spread directions, the sorted projections of as many samples of both.
    """
    drawn = np.asarray(data.draw(jax.random.key(seed), len(samples)), np.float64)
    angles = np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)])
    first, second = (np.sort(np.asarray(x, np.float64) @ directions, axis=0) for x in (samples, drawn))
    spread = np.sqrt(np.mean((drawn - drawn.mean(0)) ** 2))
    return float(np.sqrt(np.mean((first - second) ** 2)) / spread)


def distribution_floor(data: Data) -> float:
    """The distance between two sets of samples of the data itself."""
    return distribution_error(data.draw(jax.random.key(3), SAMPLES), data)
