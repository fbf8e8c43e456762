"""What pictures of captioned shapes (`jaxldm.data.shapes`) show, read from their pixels.

No network and nothing that was trained: the background is what the rim has, the colour is what differs most
from it, and the shape is the one whose drawing, at the same place and of the same area, fits best.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    parts = [_read(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
    if not parts:
        return Attributes(*(np.zeros(0, np.int32) for _ in KINDS))
    return Attributes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _read(images: UInt8[np.ndarray, "N H W 3"]) -> Attributes:
    pixels, side = images.astype(np.float64) / 255, images.shape[1]
    rim = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    back = np.median(rim, axis=1)
    offset = pixels - back[:, None, None]
    fore = _strongest(offset.reshape(len(images), -1, 3))
    strength = (fore * fore).sum(-1)
    covered = np.clip(np.einsum("nhwc,nc->nhw", offset, fore) / (strength + 1e-9)[:, None, None], 0, 1)
    covered = np.where(covered < 0.15, 0, covered)  # noise of the background
    mass = covered.sum((1, 2)) + 1e-9
    places = (np.arange(side) + 0.5) / side
    centre = np.stack([covered.sum(1) @ places, covered.sum(2) @ places], axis=1) / mass[:, None]
    shape, radius, error = _best_shape(covered, centre, mass / side**2)
    clear = (error < MAX_ERROR) & (strength > MIN_CONTRAST**2)
    hue, saturation = _hue(back + fore)
    between = np.abs((hue[:, None] - np.array(HUES) + 180) % 360 - 180)
    colour = np.where(saturation > MIN_SATURATION, between.argmin(1), UNCLEAR)
    size = (radius > sum(RADII) / 2).astype(np.int32)
    place = np.square(centre[:, None] - np.array(CENTRES)).sum(-1).argmin(1)
    background = (back.mean(1) > sum(LEVELS) / 2).astype(np.int32)
    shown = (np.where(clear, values, UNCLEAR) for values in (shape, colour, size, place))
    return Attributes(*(values.astype(np.int32) for values in (*shown, background)))


def _strongest(offset: Float[np.ndarray, "N P 3"]) -> Float[np.ndarray, "N 3"]:
    """The median of the pixels that differ from the background by 0.7 or more of the largest difference."""
    difference = np.square(offset).sum(-1)
    # The third largest: a single wrong pixel is not the shape.
    most = np.sort(difference, axis=1)[:, -3:-2]
    return np.stack(
        [
            np.median(one[distance >= 0.5 * limit], axis=0)
            for one, distance, limit in zip(offset, difference, most, strict=True)
        ]
    )


def _best_shape(
    covered: Float[np.ndarray, "N H W"], centre: Float[np.ndarray, "N 2"], area: Float[np.ndarray, "N"]
) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """(shape, radius, error relative to the shape) of the drawing that fits each picture best."""
    best = np.full(len(covered), np.inf)
    shape, radius = np.zeros(len(covered), np.int32), np.zeros(len(covered))
    for kind, of_one in enumerate(areas()):
        own_radius = np.sqrt(area / of_one)
        for turn in (0.0,) if polygon(kind) is None else _TURNS:
            drawn = coverage(kind, centre, own_radius, np.full(len(covered), turn), covered.shape[1])
            error = np.square(drawn - covered).sum((1, 2))
            better = error < best
            best, shape = np.where(better, error, best), np.where(better, kind, shape).astype(np.int32)
            radius = np.where(better, own_radius, radius)
    return shape, radius, np.sqrt(best / (np.square(covered).sum((1, 2)) + 1e-9))


def _hue(colour: Float[np.ndarray, "N 3"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """(hue in degrees, saturation) of RGB."""
    red, green, blue = colour.T
    high, low = colour.max(1), colour.min(1)
    spread = np.maximum(high - low, 1e-9)
    hue = np.where(
        high == red,
        (green - blue) / spread % 6,
        np.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4),
    )
    return 60 * hue, spread / np.maximum(high, 1e-9)


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
