"""Random rotations, scalings and shifts of images, on the device."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxldm.arguments import array, checked, instance, number, one_key


class Augmentation(NamedTuple):
    """Largest random change of an image: rotation in degrees, share of its size, shift in pixels."""

    degrees: float = 10.0
    scale: float = 0.1
    shift: float = 2.0


LIGHT = Augmentation()


AN_AUGMENTATION = instance(Augmentation, "a data.Augmentation(degrees, scale, shift)")


@checked(
    key=one_key,
    images=array("floating", "[B, H, W, C]", axes=4, filled=True),
    strength=AN_AUGMENTATION,
    fill=number(),
)
def augment(
    key: Key[Array, ""], images: Float[Array, "B H W C"], strength: Augmentation = LIGHT, fill: float = -1.0
) -> Float[Array, "B H W C"]:
    """Rotate, scale and shift each image by its own random amounts, with bilinear interpolation.

    Output pixel p reads the input at s R(angle) (p - centre) + centre + shift; angle, s - 1 and the two
    shifts are uniform in plus or minus `strength`. What lies outside the image is `fill`, the background.
    """
    batch, height, width, channels = images.shape
    angle, scale, down, right = jax.random.uniform(key, (4 * batch,), minval=-1.0, maxval=1.0).reshape(
        4, batch, 1, 1
    )
    angle, scale = jnp.deg2rad(strength.degrees) * angle, 1 + strength.scale * scale
    cosine, sine = scale * jnp.cos(angle), scale * jnp.sin(angle)
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32).reshape(1, height, 1) - centre_y
    x = jnp.arange(width, dtype=jnp.float32).reshape(1, 1, width) - centre_x
    # A border of one pixel of `fill` on each side: clipping to it reads background, wherever the point lies.
    rows = jnp.clip(cosine * y - sine * x + strength.shift * down + centre_y + 1, 0, height + 1)
    columns = jnp.clip(sine * y + cosine * x + strength.shift * right + centre_x + 1, 0, width + 1)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    padded = padded.reshape(batch, (height + 2) * (width + 2), channels)
    top, left = jnp.clip(jnp.floor(rows), 0, height), jnp.clip(jnp.floor(columns), 0, width)
    lower, righter = (rows - top)[..., None], (columns - left)[..., None]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)

    def pixel(row, column):
        index = (row * (width + 2) + column).reshape(batch, height * width, 1)
        return jnp.take_along_axis(padded, index, axis=1).reshape(batch, height, width, channels)

    upper_row = (1 - righter) * pixel(top, left) + righter * pixel(top, left + 1)
    lower_row = (1 - righter) * pixel(top + 1, left) + righter * pixel(top + 1, left + 1)
    return (1 - lower) * upper_row + lower * lower_row
