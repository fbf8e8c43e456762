"""Jumps: one step of a solver along a teacher's probability-flow ODE, from any t to any s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from jaxldm.arguments import array, checked, shapes_differ
from jaxldm.diffusion.denoiser import A_DENOISER, Denoiser
from jaxldm.diffusion.paths import A_PATH, Path, per_image
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.errors import InvalidArgumentError

# (x_t [B, ...], t [B], s [B]) -> x_s [B, ...]
Jump: TypeAlias = Callable[[Any, Any, Any], Any]
A_LATENT = array("floating", "[B, ...]", axes=(2, 64))
TIMES = array("floating", "[B]", axes=1)


def check_batch(**arrays: Any) -> None:
    """Raises `InvalidArgumentError` unless each is None, a number, [B], or of the first's shape [B, ...]."""
    (first, x), *others = ((name, value) for name, value in arrays.items() if value is not None)
    for name, value in others:
        if value.shape not in (x.shape, x.shape[:1], ()):
            each = f"one number for each example, [{len(x)}]" if value.ndim == 1 else f"as {first} is"
            raise shapes_differ({first: x, name: value}, f": {name} must be {each}")


@checked(path=A_PATH, x_0=A_LATENT, epsilon=A_LATENT, t=TIMES)
def noised(
    path: Path, x_0: Float[Array, "B ..."], epsilon: Float[Array, "B ..."], t: Real[Array, " B"]
) -> Float[Array, "B ..."]:
    """x_t = alpha(t) x_0 + sigma(t) eps, with one t per example."""
    check_batch(x_0=x_0, epsilon=epsilon, t=t)
    return per_image(path.alpha(t), x_0) * x_0 + per_image(path.sigma(t), x_0) * epsilon


def the_path(denoise: Any, name: str) -> Path:
    """The path of a denoiser. Raises `InvalidArgumentError` for a plain function."""
    if isinstance(denoise, Denoiser):
        return denoise.path
    raise InvalidArgumentError(
        f"{name} needs to know the path: give D.denoiser(network, prediction), not a plain function"
    )


@checked(denoise=A_DENOISER)
def ddim_jump(denoise: Denoiser) -> Jump:
    """x_s = alpha_s x_0 + sigma_s eps, x_0 = denoise(x_t, t): DDIM's step (Song et al. 2021, eq. 12).

    Raises:
        InvalidArgumentError: a plain function, whose path is not known.
    """
    path = the_path(denoise, "ddim_jump")

    def jump(x_t, t, s):
        x_0 = denoise(x_t, t)
        return noised(path, x_0, implied_noise(x_0, x_t, path.alpha(t), path.sigma(t)), s)

    return jump


@checked(denoise=A_DENOISER)
def heun_jump(denoise: Denoiser) -> Jump:
    """Heun's step in sigma / alpha, second order: the slope is the mean of eps at t and at the DDIM step's s.

    Where s is the clean end, eps is not defined there, and the step is DDIM's. Source: Karras et al. 2022,
    Algorithm 1, which is the case alpha = 1.

    Raises:
        InvalidArgumentError: a plain function; a path that ends in pure noise, where sigma / alpha is
            infinite.
    """
    path = the_path(denoise, "heun_jump")
    if path.zero_terminal_snr:
        raise InvalidArgumentError(
            f"heun_jump steps in sigma / alpha, which is infinite at the noisy end of this {path.name} path: "
            "use ddim_jump"
        )

    def jump(x_t, t, s):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((path.alpha(u), path.sigma(u)) for u in (t, s))
        x_0 = denoise(x_t, t)
        epsilon = implied_noise(x_0, x_t, alpha_t, sigma_t)
        x_s = noised(path, x_0, epsilon, s)
        second = implied_noise(denoise(x_s, s), x_s, alpha_s, sigma_s)
        slope = jnp.where(per_image(sigma_s, x_t) == 0, epsilon, (epsilon + second) / 2)
        ratio = alpha_s / alpha_t
        return per_image(ratio, x_t) * x_t + per_image(sigma_s - ratio * sigma_t, x_t) * slope

    return jump


def stopped(tree: Any) -> Any:
    """The same numbers as constants: no gradient flows through them."""
    return jax.lax.stop_gradient(tree)


@checked(error=A_LATENT)
def squares_of(error: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """|error|^2 of each example, a sum over its pixels."""
    return jnp.sum(error**2, axis=tuple(range(1, error.ndim)))


@checked(error=A_LATENT)
def means_of(error: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """The mean square of each example's pixels."""
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
