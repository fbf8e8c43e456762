"""Images in [-1, 1], distinguished from pixels of 0 to 255 by their numbers.

A network's own images go a little beyond [-1, 1], and noise may go far beyond, on both sides of 0. Pixels of
0 to 255 that lost their dtype are far above 1 and never far below 0.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from jaxldm.arguments import Check, is_tracer
from jaxldm.errors import InvalidArgumentError

MOST_OF_IMAGES = 20.0  # above what networks draw, below the brightest pixel of nearly all pictures
_UNDERSHOOT = 0.1  # of the largest number: what resizing with Lanczos adds below 0


def check_not_pixels(name: str, images: Any, *, drawn: bool = False) -> None:
    """Raises `InvalidArgumentError` for pixels of 0 to 255 in place of images in [-1, 1].

    Args:
        name: of the images, for the message.
        images: an array. The numbers of tracers cannot be seen.
        drawn: whether they are only looked at or drawn, as noise may be: then numbers far above 1 are right
            where others are as far below.

    >>> check_not_pixels("images", np.array([-1.3, 1.2]))
    """
    if is_tracer(images):
        return
    images = np.asarray(images)
    largest = float(images.max(initial=0))
    if not largest > MOST_OF_IMAGES or (drawn and images.min() < -_UNDERSHOOT * largest):
        return
    raise InvalidArgumentError(
        f"{name} must lie in [-1, 1], got numbers up to {largest:g}: write x / 127.5 - 1 of 8-bit pixels"
    )


def in_unit_range(check: Check, *, drawn: bool = False) -> Check:
    """What the check allows, unless these are pixels of 0 to 255: see `check_not_pixels`.

    A device is waited for only where images are `drawn`, which the host does.
    """

    def check_images(name: str, value: Any) -> Any:
        value = check(name, value)
        if drawn or not isinstance(value, jax.Array):
            check_not_pixels(name, value, drawn=drawn)
        return value

    return check_images


def as_pixels(images: Any) -> UInt8[np.ndarray, "B H W 3"]:
    """The images. Raises `InvalidArgumentError` unless they are uint8 `[B, H, W, 3]`, one at least."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise InvalidArgumentError(
            f"images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}: "
            "for x in [-1, 1] give ((x + 1) * 127.5).round().astype('uint8')"
        )
    return images
