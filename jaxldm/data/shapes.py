"""Captioned shapes: pictures of one coloured shape on a plain background, drawn from a seed and a number.

Picture n of a seed is the same to the last bit on every machine and with every version of NumPy: its random
numbers are integer hashes (SplitMix64, Steele et al. 2014) of (seed, n, purpose), and its pixels come from
additions, multiplications, divisions, square roots and comparisons, which IEEE 754 rounds in one way only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt64

from jaxldm.arguments import checked, count
from jaxldm.errors import DataError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS = ("dark", "light")
KINDS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES, "background": BACKGROUNDS}
# Pairs of a shape and a colour that no training picture has: two of each shape and two of each colour.
HELD_OUT = frozenset((shape, (shape + step) % 6) for shape in range(6) for step in (1, 3))
SEEN = tuple((shape, colour) for shape in range(6) for colour in range(6) if (shape, colour) not in HELD_OUT)

# In sides of the picture: the radius of a shape, the places of its centre, and how far they vary.
RADII, RADIUS_JITTER = (0.13, 0.22), (0.01, 0.015)
CENTRES = ((0.28, 0.5), (0.72, 0.5), (0.5, 0.28), (0.5, 0.72), (0.5, 0.5))  # (x, y)
PLACE_JITTER, DEGREES = 0.02, 10.0
HUES, HUE_JITTER = (0.0, 120.0, 225.0, 56.0, 285.0, 28.0), 5.0  # degrees
LEVELS, LEVEL_JITTER = (0.12, 0.88), 0.05  # of the grey backgrounds
_RING = 0.55  # inner radius
_CHUNK = 256  # pictures drawn at once: their numbers fit into the cache of a processor


class Attributes(NamedTuple):
    """What pictures show: int32 [N] numbers into `SHAPES`, `COLOURS`, `SIZES`, `PLACES`, `BACKGROUNDS`."""

    shape: Int[np.ndarray, "N"]
    colour: Int[np.ndarray, "N"]
    size: Int[np.ndarray, "N"]
    place: Int[np.ndarray, "N"]
    background: Int[np.ndarray, "N"]


def _mix(x: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    """SplitMix64's step and output function."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bits(seed: int, numbers: Int[np.ndarray, "N"], purpose: str) -> UInt64[np.ndarray, "N"]:
    name = np.uint64(zlib.crc32(purpose.encode()))
    return _mix(_mix(_mix(np.array([seed], np.uint64)) + numbers.astype(np.uint64)) + name)


def _below(most: int, seed: int, numbers: Int[np.ndarray, "N"], purpose: str) -> Int[np.ndarray, "N"]:
    """Whole numbers in [0, most)."""
    return ((_bits(seed, numbers, purpose) >> np.uint64(32)) * np.uint64(most) >> np.uint64(32)).astype(
        np.int32
    )


def _spread(
    width: Float[np.ndarray, "..."] | float, seed: int, numbers: Int[np.ndarray, "N"], purpose: str
) -> Float[np.ndarray, "N"]:
    """Uniform float64 numbers in [-width, width)."""
    unit = (_bits(seed, numbers, purpose) >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
    return unit * width


@checked(seed=count(0))
def draw_attributes(
    seed: int, numbers: Int[np.ndarray, "N"], pairs: Sequence[tuple[int, int]] = SEEN
) -> Attributes:
    """What the pictures of these numbers show, each attribute uniform and independent of the others.

    Args:
        seed: whole number from 0.
        numbers: of the pictures.
        pairs: (shape, colour) to choose from; `sorted(HELD_OUT)` for those that training never sees.
    """
    shape, colour = np.asarray(pairs, np.int32)[_below(len(pairs), seed, numbers, "pair")].T
    rest = (_below(len(KINDS[kind]), seed, numbers, kind) for kind in ("size", "place", "background"))
    return Attributes(shape, colour, *rest)


def polygon(shape: int) -> Float[np.ndarray, "K 2"] | None:
    """The corners (x, y) of a shape of radius 1, None for a circle and a ring."""

    def corner(radius: float, degrees: float) -> tuple[float, float]:
        # Rounded, because sines differ in their last bit from one machine to the next.
        angle = math.radians(degrees)
        return round(radius * math.sin(angle), 9), round(-radius * math.cos(angle), 9)

    if SHAPES[shape] == "square":
        return np.array([corner(0.82 * math.sqrt(2), 45 + 90 * k) for k in range(4)])
    if SHAPES[shape] == "triangle":
        return np.array([corner(1.1, 120 * k) for k in range(3)])
    if SHAPES[shape] == "star":
        return np.array([corner(0.5 if k % 2 else 1.12, 36 * k) for k in range(10)])
    if SHAPES[shape] == "cross":
        a, b = 0.31, 0.97
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return np.array([*right, *((-x, -y) for x, y in right)])
    return None


def areas() -> Float[np.ndarray, "6"]:
    """The areas of the shapes of radius 1."""
    result = [math.pi] * len(SHAPES)
    result[SHAPES.index("ring")] = math.pi * (1 - _RING**2)
    for shape in range(len(SHAPES)):
        corners = polygon(shape)
        if corners is not None:
            (x, y), (u, v) = corners.T, np.roll(corners, -1, axis=0).T
            result[shape] = float(abs((x * v - u * y).sum()) / 2)
    return np.array(result)


def coverage(
    shape: int,
    centre: Float[Any, "N 2"],
    radius: Float[Any, "N"],
    degrees: Float[np.ndarray, "N"],
    image_size: int,
    xp: Any = np,
) -> Float[Any, "N H W"]:
    """How much of each pixel a shape covers, in [0, 1]: 0.5 minus its signed distance, cut to that.

    Args:
        shape: number into `SHAPES`.
        centre: (x, y) in sides of the picture.
        radius: in sides of the picture.
        degrees: by which it is turned clockwise.
        image_size: pixels of a side.
        xp: `numpy`, whose pixels are the same everywhere, or `jax.numpy`.
    """
    places = (np.arange(image_size, dtype=np.float32) + np.float32(0.5)).reshape(1, -1)
    left, top = (centre.T * image_size).astype(np.float32)
    x, y = (places - left[:, None])[:, None, :], (places - top[:, None])[:, :, None]
    radius = (radius * image_size).astype(np.float32)[:, None, None]
    corners = polygon(shape)
    if corners is None:
        distance = xp.sqrt(x * x + y * y) - radius
        if SHAPES[shape] == "ring":
            distance = xp.maximum(distance, np.float32(_RING - 1) * radius - distance)
    else:
        angles = np.radians(degrees)
        cosine, sine = np.round(np.cos(angles), 9)[:, None], np.round(np.sin(angles), 9)[:, None]
        turned = corners[:, 0] * cosine - corners[:, 1] * sine, corners[:, 0] * sine + corners[:, 1] * cosine
        corners = (part.astype(np.float32) * radius[:, :, 0] for part in turned)
        distance = _distance_to_polygon(xp, x, y, *corners)
    return xp.clip(np.float32(0.5) - distance, 0, 1)


def _distance_to_polygon(xp, x, y, corners_x, corners_y) -> Float[Any, "N H W"]:
    """Signed distances, negative inside: the nearest edge, and the parity of edges crossed to the right."""
    nearest, inside = np.float32(np.inf), np.zeros((1, 1, 1), bool)
    for k in range(corners_x.shape[1]):
        u, v = corners_x[:, k - 1, None, None], corners_y[:, k - 1, None, None]
        along_x, along_y = corners_x[:, k, None, None] - u, corners_y[:, k, None, None] - v
        from_x, from_y = x - u, y - v
        length = along_x * along_x + along_y * along_y
        share = xp.clip((from_x * along_x + from_y * along_y) / length, 0, 1)
        away_x, away_y = from_x - share * along_x, from_y - share * along_y
        nearest = xp.minimum(nearest, away_x * away_x + away_y * away_y)
        crosses = (from_y >= 0) != (from_y >= along_y)
        right = from_x * xp.abs(along_y) < from_y * along_x * xp.sign(along_y)
        inside = inside ^ (crosses & right)
    distance = xp.sqrt(nearest)
    return xp.where(inside, -distance, distance)


def _rgb(hue, saturation, value) -> Float[np.ndarray, "N 3"]:
    """HSV with the hue in degrees -> RGB in [0, 1]."""
    k = np.mod(hue[:, None] / 60 + np.array([5.0, 3.0, 1.0]), 6)
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


@checked(seed=count(0), image_size=count(8, 1024))
def render(
    seed: int, numbers: Int[np.ndarray, "N"], attributes: Attributes, image_size: int = 32
) -> UInt8[np.ndarray, "N H W 3"]:
    """The pictures of these numbers, anti-aliased, with small random changes of place, size, angle and hue.

    Args:
        seed, numbers: what the changes are drawn from.
        attributes: what the pictures show.
        image_size: pixels of a side.

    Raises:
        DataError: another number of attributes than of pictures.
    """
    if {len(values) for values in attributes} != {len(numbers)}:
        raise DataError(f"attributes must be one for each of the {len(numbers)} pictures")
    shape, colour, size, place, background = attributes
    centre = np.array(CENTRES)[place] + np.stack(
        [_spread(PLACE_JITTER, seed, numbers, purpose) for purpose in ("x", "y")], axis=1
    )
    radius = np.array(RADII)[size] + _spread(np.array(RADIUS_JITTER)[size], seed, numbers, "radius")
    degrees = _spread(DEGREES, seed, numbers, "degrees")
    hue = np.array(HUES)[colour] + _spread(HUE_JITTER, seed, numbers, "hue")
    saturation = 0.92 + _spread(0.08, seed, numbers, "saturation")
    value = 0.92 + _spread(0.08, seed, numbers, "value")
    fore = 255 * _rgb(hue, saturation, value)
    back = 255 * (np.array(LEVELS)[background] + _spread(LEVEL_JITTER, seed, numbers, "level"))
    fore, back = fore.astype(np.float32)[:, None, None], back.astype(np.float32)[:, None, None, None]
    images = np.empty((len(numbers), image_size, image_size, 3), np.uint8)
    for kind in range(len(SHAPES)):
        rows = np.flatnonzero(shape == kind)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            covered = coverage(kind, centre[part], radius[part], degrees[part], image_size)[..., None]
            images[part] = (back[part] + covered * (fore[part] - back[part]) + np.float32(0.5)).astype(
                np.uint8
            )
    return images


# Words of the four ways to say the same; the first is the usual one.
_STYLES = (
    "a {size} {colour} {shape} {place} on a {background} background",
    "{background} background, a {size} {colour} {shape} {place}",
    "{place} there is a {size} {colour} {shape}, the background is {background}",
    "a {colour} {shape} that is {size}, {place}, on a {background} background",
)
_IN_PLACE = ("on the left", "on the right", "at the top", "at the bottom", "in the centre")
_SYNONYMS = {
    1: {"large": "big", "small": "little", "in the centre": "in the middle"},
    2: {"large": "big", "dark": "black", "light": "white"},
    3: {"small": "tiny", "large": "huge"},
}


def caption(attributes: Sequence[int], style: int = 0, left_out: Sequence[str] = ()) -> str:
    """The caption of one picture.

    Args:
        attributes: its shape, colour, size, place and background, as numbers.
        style: 0 is "a large blue ring on the right on a light background"; 1 to 3 are paraphrases.
        left_out: attributes that it does not tell, such as "size".

    >>> caption((5, 2, 1, 1, 1))
    'a large blue ring on the right on a light background'
    >>> caption((5, 2, 1, 4, 1), style=1, left_out=["colour"])
    'light background, a big ring in the middle'
    """
    words = {kind: KINDS[kind][number] for kind, number in zip(KINDS, attributes, strict=True)}
    words["place"] = _IN_PLACE[attributes[3]]
    words |= {kind: _SYNONYMS.get(style, {}).get(word, word) for kind, word in words.items()}
    if "shape" in left_out:
        words["shape"] = "shape"
    text = _STYLES[style]
    if "background" in left_out:
        for phrase in (" on a {background} background", "{background} background, "):
            text = text.replace(phrase, "")
        text = text.replace(", the background is {background}", "")
    if "size" in left_out:
        text = text.replace(" that is {size}", "")
    for kind in ("size", "colour", "place"):
        if kind in left_out:
            text = text.replace(f"{{{kind}}}", "")
    text = " ".join(text.format(**words).split()).replace(" ,", ",").removeprefix("there is ")
    return text.strip(", ").replace("a orange", "an orange")


@checked(seed=count(0))
def captions(seed: int, numbers: Int[np.ndarray, "N"], attributes: Attributes) -> list[str]:
    """A caption for each picture, half of them in the usual words.

    Size, place and background are each left out in a quarter of them, shape and colour in a twentieth.
    """
    style = np.maximum(_below(6, seed, numbers, "style") - 2, 0)
    shares = {"shape": 20, "colour": 20, "size": 4, "place": 4, "background": 4}
    missing = {kind: _below(one_in, seed, numbers, f"no {kind}") == 0 for kind, one_in in shares.items()}
    rows = np.stack(attributes, axis=1).tolist()
    return [
        caption(row, int(style[n]), [kind for kind, absent in missing.items() if absent[n]])
        for n, row in enumerate(rows)
    ]
