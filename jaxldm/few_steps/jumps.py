"""Jumps: one step of a solver along a teacher's probability-flow ODE, from any t to any s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from jaxldm.arguments import array, checked, shapes_differ
from jaxldm.diffusion.denoiser import A_DENOISER, Denoiser
from jaxldm.diffusion.paths import A_PATH, Path, per_image, wide_type
from jaxldm.diffusion.predictions import implied_noise
from jaxldm.errors import InvalidArgumentError

# (x_t [B, ...], t [B], s [B]) -> x_s [B, ...]
Jump: TypeAlias = Callable[[Any, Any, Any], Any]
A_LATENT = array("floating", "[B, ...]", axes=(2, 64))
TIMES = array("floating", "[B]", axes=1)
TIMESTEPS = array("real", "[B]", axes=1)  # times of a path that may have timesteps: see `times_on`
ONE_EACH = array("real", "[B]", axes=1)


def check_batch(**arrays: Any) -> None:
    """Raises `InvalidArgumentError` unless each is None, a number, [B], or of the first's shape [B, ...]."""
    (first, x), *others = ((name, value) for name, value in arrays.items() if value is not None)
    for name, value in others:
        if value.shape not in (x.shape, x.shape[:1], ()):
            each = f"one number for each example, [{len(x)}]" if value.ndim == 1 else f"as {first} is"
            raise shapes_differ({first: x, name: value}, f": {name} must be {each}")


def times_on(path: Path | None, x: Any, **times: Any) -> tuple[Any, ...]:
    """The times as floating-point numbers, in order; whole ones are timesteps.

    Args:
        path: None where it is not known.
        x: [B, ...], next to which they are used.
        times: by name, [B].

    Raises:
        InvalidArgumentError: whole numbers on a path without timesteps.
    """
    found = []
    for name, t in times.items():
        if path is not None and path.num_train_timesteps is None:
            array("floating", f"[B], as the {path.name} path has no timesteps", axes=1)(name, t)
        found.append(t if jnp.issubdtype(t.dtype, jnp.floating) else jnp.asarray(t, wide_type(x)))
    return tuple(found)


@checked(path=A_PATH, x_0=A_LATENT, epsilon=A_LATENT, t=TIMESTEPS)
def noised(
    path: Path, x_0: Float[Array, "B ..."], epsilon: Float[Array, "B ..."], t: Real[Array, " B"]
) -> Float[Array, "B ..."]:
    """x_t = alpha(t) x_0 + sigma(t) eps, with one t per example."""
    check_batch(x_0=x_0, epsilon=epsilon, t=t)
    (t,) = times_on(path, x_0, t=t)
    return per_image(path.alpha(t), x_0) * x_0 + per_image(path.sigma(t), x_0) * epsilon


def the_path(denoise: Any, name: str) -> Path:
    """The path of a denoiser. Raises `InvalidArgumentError` for a plain function."""
    if isinstance(denoise, Denoiser):
        return denoise.path
    raise InvalidArgumentError(
        f"{name} needs to know the path: give D.denoiser(network, prediction), not a plain function"
    )


_CHECKED_JUMP = checked(x_t=A_LATENT, t=TIMESTEPS, s=TIMESTEPS)


@checked(denoise=A_DENOISER)
def ddim_jump(denoise: Denoiser) -> Jump:
    """x_s = alpha_s x_0 + sigma_s eps, x_0 = denoise(x_t, t): DDIM's step (Song et al. 2021, eq. 12).

    Raises:
        InvalidArgumentError: a plain function, whose path is not known.
    """
    path = the_path(denoise, "ddim_jump")

    @_CHECKED_JUMP
    def jump(x_t, t, s):
        t, s = times_on(path, x_t, t=t, s=s)
        x_0 = denoise(x_t, t)
        return noised(path, x_0, implied_noise(x_0, x_t, path.alpha(t), path.sigma(t)), s)

    return jump


@checked(denoise=A_DENOISER)
def heun_jump(denoise: Denoiser) -> Jump:
    """Heun's step in sigma / alpha, second order: the slope is the mean of eps at t and at the DDIM step's s.

    Where s is the clean end, eps is not defined there; where t is pure noise, sigma / alpha is infinite: the
    step is DDIM's. Just before pure noise a step to several times less sigma / alpha is worse than DDIM's,
    whose eps is that of nearly all of its length. Source: Karras et al. 2022, Algorithm 1, which is the case
    alpha = 1.

    Raises:
        InvalidArgumentError: a plain function, whose path is not known.
    """
    path = the_path(denoise, "heun_jump")

    @_CHECKED_JUMP
    def jump(x_t, t, s):
        t, s = times_on(path, x_t, t=t, s=s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((path.alpha(u), path.sigma(u)) for u in (t, s))
        x_0 = denoise(x_t, t)
        epsilon = implied_noise(x_0, x_t, alpha_t, sigma_t)
        x_s = noised(path, x_0, epsilon, s)
        second = implied_noise(denoise(x_s, s), x_s, alpha_s, sigma_s)
        inside = (alpha_t > 0) & (sigma_s > 0)
        length = sigma_s - alpha_s / jnp.where(inside, alpha_t, 1) * sigma_t
        return x_s + jnp.where(per_image(inside, x_t), per_image(length / 2, x_t) * (second - epsilon), 0)

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
