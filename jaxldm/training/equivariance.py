"""EQ regularisation: what is done to latents should be done to the images they decode to.

Kouzelis et al. 2025 (EQ-VAE), equation 6: for rotations by right angles and smaller scales tau,
D(tau(z)) should be tau(x). Latents become smoother, and diffusion models learn them faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxldm.arguments import array, checked, function, one_key, refuse
from jaxldm.errors import InvalidArgumentError
from jaxldm.functions import returned
from jaxldm.pixels import in_unit_range

DEFAULT_SCALES = (0.5, 0.75)


def some_scales(name: str, value: Any) -> tuple[float, ...]:
    """Numbers in (0, 1], at least one."""
    fits = isinstance(value, (tuple, list)) and len(value) > 0
    if not fits or not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in value):
        raise refuse(name, "numbers in (0, 1] such as (0.5, 0.75)", value)
    if not all(0 < s <= 1 for s in value):
        raise refuse(name, "numbers in (0, 1] such as (0.5, 0.75)", value)
    return tuple(float(s) for s in value)


@checked(
    key=one_key,
    decode=function("z -> images"),
    z=array("floating", "[B, h, w, c]", axes=4, filled=True),
    images=in_unit_range(array("floating", "[B, H, W, C]", axes=4, filled=True)),
    distance=function("(decoded, images) -> number"),
    scales=some_scales,
)
def equivariance_loss(
    key: PRNGKeyArray,
    decode: Callable[[Any], Any],
    z: Float[Array, "B h w c"],
    images: Float[Array, "B H W C"],
    distance: Callable[[Any, Any], Any],
    scales: Sequence[float] = DEFAULT_SCALES,
) -> Float[Array, ""]:
    """distance(decode(tau(z)), tau(images)) for one drawn tau: a scale, then a rotation by a right angle.

    Args:
        key: draws tau, the same for the whole batch.
        decode: latents of any height and width -> images.
        z: latents; images: what they should decode to, larger by a whole factor.
        distance: of two batches of one shape.
        scales: one is drawn. Each is a further decoder in the compiled program, and several are a
            conditional, for which XLA's CPU backend has one thread: there give one. Sides become
            round(scale x side) of the latents, at least 1.

    Raises:
        InvalidArgumentError: images that are no multiple of the latents.
    """
    factors = [side % small for side, small in zip(images.shape[1:3], z.shape[1:3], strict=True)]
    if any(factors):
        raise InvalidArgumentError(
            f"images must be a multiple of the latents {z.shape[1]}x{z.shape[2]}, got "
            f"{images.shape[1]}x{images.shape[2]}"
        )
    scale_key, turn_key = jax.random.split(key)
    square = z.shape[1] == z.shape[2]
    turns = jax.random.randint(turn_key, (), 0, 4) * (1 if square else 2) % 4

    def at(scale: float) -> Callable[[Any, Any], Any]:
        def branch(z: Any, images: Any) -> Any:
            small, wanted = rescaled(z, scale, z.shape[1:3]), rescaled(images, scale, z.shape[1:3])
            aim = turned(wanted, turns)
            decoded = returned("decode", decode(turned(small, turns)), aim.shape)
            return jnp.float32(returned("distance", distance(decoded, aim), ()))

        return branch

    number = jax.random.randint(scale_key, (), 0, len(scales))
    return jax.lax.switch(number, [at(scale) for scale in scales], z, images)


def rescaled(x: Float[Array, "B H W C"], scale: float, latents: tuple[int, ...]) -> Float[Array, "B h w C"]:
    """x made smaller, by as much as latents of that height and width are with whole sides."""
    sides = [max(1, round(scale * side)) for side in latents]
    shape = [side * length // small for side, length, small in zip(sides, x.shape[1:3], latents, strict=True)]
    if tuple(shape) == x.shape[1:3]:
        return x
    return jax.image.resize(x, (x.shape[0], *shape, x.shape[3]), "linear", antialias=True)


def turned(x: Float[Array, "B H W C"], turns: Any) -> Float[Array, "B H W C"]:
    """x rotated by a traced number of right angles; by 0 and 2 alone where it is not square."""
    ways = [lambda x, k=k: jnp.rot90(x, k, axes=(1, 2)) for k in ((0, 1, 2, 3) if _square(x) else (0, 2))]
    return jax.lax.switch(turns if _square(x) else turns // 2, ways, x)


def _square(x: Array) -> bool:
    return x.shape[1] == x.shape[2]
