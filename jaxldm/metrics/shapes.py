"""What pictures of captioned shapes (`jaxldm.data.shapes`) show, read from their pixels.

No network and nothing that was trained: the background is what the rim has, the colour is what differs most
from it, and the shape is the one whose drawing, at the same place and of the same area, fits best. By NumPy
for metrics, by JAX for a verifier of `diffusion.search`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxldm.data.shapes import (
    CENTRES,
    DEGREES,
    HUES,
    KINDS,
    LEVELS,
    RADII,
    Attributes,
    areas,
    coverage,
    polygon,
)
from jaxldm.errors import DataError

UNCLEAR = -1  # the number of an attribute that a picture does not show
MAX_ERROR = 0.45  # of a shape's drawing, relative to the shape: above it the picture shows none of them
MIN_CONTRAST = 0.15  # of a shape against its background
MIN_SATURATION = 0.4
_TURNS = (-DEGREES, -DEGREES / 3, DEGREES / 3, DEGREES)
_CHUNK = 256


def read_shapes(images: UInt8[np.ndarray, "N H W 3"]) -> Attributes:
    """Shape, colour, size, place and background of each picture; `UNCLEAR` where it shows none of the known.

    Args:
        images: square pictures of one shape, of 16 pixels or more.

    Raises:
        DataError: other arrays.
    """
    images = np.asarray(images)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] >= 16 and images.shape[3] == 3
    if not square or images.dtype != np.uint8:
        raise DataError(
            f"images must be uint8 [N, S, S, 3] of 16 pixels or more, got {images.dtype} {list(images.shape)}"
        )
    parts = [
        read_pixels(images[start : start + _CHUNK].astype(np.float64) / 255, np)
        for start in range(0, len(images), _CHUNK)
    ]
    if not parts:
        return Attributes(*(np.zeros(0, np.int32) for _ in KINDS))
    return Attributes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def read_pixels(pixels: Float[Any, "N S S 3"], xp: Any) -> Attributes:
    """As `read_shapes`, of pictures in [0, 1].

    Args:
        pixels: the pictures.
        xp: whose arrays they are, `numpy` or `jax.numpy`.
    """
    (count, side), dtype = pixels.shape[:2], pixels.dtype
    rim = xp.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    back = xp.median(rim, axis=1)
    offset = pixels - back[:, None, None]
    fore = _strongest(offset.reshape(count, -1, 3), xp)
    strength = (fore * fore).sum(-1)
    covered = xp.clip(xp.einsum("nhwc,nc->nhw", offset, fore) / (strength + 1e-9)[:, None, None], 0, 1)
    covered = xp.where(covered < 0.15, 0, covered)  # noise of the background
    mass = covered.sum((1, 2)) + 1e-9
    places = ((np.arange(side) + 0.5) / side).astype(dtype)
    centre = xp.stack([covered.sum(1) @ places, covered.sum(2) @ places], axis=1) / mass[:, None]
    shape, radius, error = _best_shape(covered, centre, mass / side**2, xp)
    clear = (error < MAX_ERROR) & (strength > MIN_CONTRAST**2)
    hue, saturation = _hue(back + fore, xp)
    between = xp.abs((hue[:, None] - np.array(HUES, dtype)[None] + 180) % 360 - 180)
    colour = xp.where(saturation > MIN_SATURATION, between.argmin(1), UNCLEAR)
    size = (radius > sum(RADII) / 2).astype(np.int32)
    place = xp.square(centre[:, None] - np.array(CENTRES, dtype)[None]).sum(-1).argmin(1)
    background = (back.mean(1) > sum(LEVELS) / 2).astype(np.int32)
    shown = (xp.where(clear, values, UNCLEAR) for values in (shape, colour, size, place))
    return Attributes(*(values.astype(np.int32) for values in (*shown, background)))


def _strongest(offset: Float[Any, "N P 3"], xp: Any) -> Float[Any, "N 3"]:
    """The median of the pixels that differ from the background by 0.7 or more of the largest difference."""
    difference = xp.square(offset).sum(-1)
    # The third largest: a single wrong pixel is not the shape.
    most = xp.sort(difference, axis=1)[:, -3:-2]
    return xp.nanmedian(xp.where((difference >= 0.5 * most)[:, :, None], offset, np.nan), axis=1)


def _best_shape(
    covered: Float[Any, "N S S"], centre: Float[Any, "N 2"], area: Float[Any, "N"], xp: Any
) -> tuple[Int[Any, "N"], Float[Any, "N"], Float[Any, "N"]]:
    """(shape, radius, error relative to the shape) of the drawing that fits each picture best."""
    (count, side), drawings, errors, radii = covered.shape[:2], [], [], []
    for kind, of_one in enumerate(areas()):
        turns = (0.0,) if polygon(kind) is None else _TURNS
        radius = xp.repeat(xp.sqrt(area / of_one), len(turns))
        places = xp.repeat(centre, len(turns), axis=0)
        drawn = coverage(kind, places, radius, np.tile(turns, count), side, xp)
        difference = drawn.reshape(count, len(turns), side, side) - covered[:, None]
        errors.append(xp.square(difference).sum((2, 3)))
        radii.append(radius.reshape(count, len(turns)))
        drawings += [kind] * len(turns)
    error = xp.concatenate(errors, axis=1)
    best = error.argmin(1)[:, None]
    error, radius = (
        xp.take_along_axis(values, best, axis=1)[:, 0] for values in (error, xp.concatenate(radii, axis=1))
    )
    shape = xp.asarray(np.array(drawings, np.int32))[best[:, 0]]
    return shape, radius, xp.sqrt(error / (xp.square(covered).sum((1, 2)) + 1e-9))


def _hue(colour: Float[Any, "N 3"], xp: Any) -> tuple[Float[Any, "N"], Float[Any, "N"]]:
    """(hue in degrees, saturation) of RGB."""
    red, green, blue = colour.T
    high, low = colour.max(1), colour.min(1)
    spread = xp.maximum(high - low, 1e-9)
    hue = xp.where(
        high == red,
        (green - blue) / spread % 6,
        xp.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    return 60 * hue, spread / xp.maximum(high, 1e-9)


def shares_as_asked(found: Attributes, asked: Mapping[str, int | Int[np.ndarray, "N"]]) -> dict[str, float]:
    """The share of pictures that show what was asked for: for each attribute, and for all of them together.

    Args:
        found: of `read_shapes`.
        asked: attribute ("shape", "colour", "size", "place", "background") -> number, or one a picture.

    Returns:
        A share for each attribute asked for, "shape and colour" where both are, and "all".
    """
    right: dict[str, Bool[np.ndarray, "N"]] = {
        kind: getattr(found, kind) == np.asarray(number) for kind, number in asked.items()
    }
    result = {kind: float(values.mean()) for kind, values in right.items()}
    if {"shape", "colour"} <= set(right):
        result["shape and colour"] = float((right["shape"] & right["colour"]).mean())
    return result | {"all": float(np.logical_and.reduce(list(right.values())).mean())}


def asked_of(caption: str) -> dict[str, int]:
    """The attributes that a caption in the usual words names.

    >>> asked_of("a large blue ring on the right")
    {'shape': 5, 'colour': 2, 'size': 1, 'place': 1}
    """
    words = caption.lower().replace(",", " ").split()
    return {
        kind: number for kind, names in KINDS.items() for number, name in enumerate(names) if name in words
    }
