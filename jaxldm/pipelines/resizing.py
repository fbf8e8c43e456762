"""Pictures and masks of any size, made to fit: cropped, padded or stretched to a size that a model draws.

The size is the height and width of the call, or else those of the first picture, each at the nearest multiple
that the model needs (half-way is up).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from jaxldm.data.pictures import is_picture, mask_of, resize_mask, rgb_of, upright
from jaxldm.errors import DataError

RESIZES = ("crop", "pad", "stretch")
Size = tuple[int, int]


def nearest_size(size: Size, multiple: int) -> Size:
    """(height, width), each at the nearest multiple, of which there is at least one.

    >>> nearest_size((500, 3), 8), nearest_size((12, 11), 8)
    ((504, 8), (16, 8))
    """
    return cast(Size, tuple(max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in size))


def alike(size: Size, other: Size) -> bool:
    """Whether two sizes are of one proportion, up to the rounding of the smaller one to whole pixels.

    >>> alike((20, 24), (10, 12)), alike((512, 910), (1080, 1920)), alike((16, 16), (20, 24))
    (True, True, False)
    >>> alike((33, 50), (100, 150))
    True
    """
    (height, width), (h, w) = sorted((size, other), reverse=True)
    return abs(h * width - w * height) <= max(height, width)


def scaled_size(size: Size, target: Size, how: str) -> Size:
    """The (height, width) that a picture is scaled to, before it is cropped or padded to `target`.

    >>> scaled_size((20, 40), (16, 16), "crop"), scaled_size((20, 40), (16, 16), "pad")
    ((16, 32), (8, 16))
    """
    if how == "stretch":
        return target
    choose = max if how == "crop" else min
    factor = choose(Fraction(wanted, side) for wanted, side in zip(target, size, strict=True))
    sides = [max(1, round(side * factor)) for side in size]
    return cast(Size, tuple(choose(side, wanted) for side, wanted in zip(sides, target, strict=True)))


def _centred(array: np.ndarray, target: Size) -> np.ndarray:
    """The middle of an array [H, W, ...], or the array in the middle, its edge repeated around it."""
    for axis, wanted in enumerate(target):
        side = array.shape[axis]
        if side >= wanted:
            first = side // 2 - wanted // 2
            array = np.take(array, np.arange(first, first + wanted), axis)
        else:
            before = wanted // 2 - side // 2
            widths = [(0, 0)] * array.ndim
            widths[axis] = (before, wanted - side - before)
            array = np.pad(array, widths, mode="edge")
    return array


def resize_picture(picture: Any, target: Size, how: str) -> Float[np.ndarray, "H W 3"]:
    """One picture in [-1, 1], of that (height, width); Lanczos.

    Args:
        picture: of Pillow, 8-bit pixels, or floats in [-1, 1], [H, W, 3].
        target: (height, width).
        how: "crop" cuts off what stands out, "pad" repeats the edges, "stretch" changes the proportions.
    """
    from PIL import Image

    size = size_of(picture)
    scaled = scaled_size(size, target, how)
    kept = cast(Size, tuple(map(min, scaled, target)))
    box = None if kept == scaled else _box(size, scaled, kept)
    if not is_picture(picture):
        picture = np.asarray(picture)
        if picture.dtype != np.uint8:
            planes = [Image.fromarray(plane) for plane in np.moveaxis(picture.astype(np.float32), -1, 0)]
            shape, lanczos = (kept[1], kept[0]), Image.Resampling.LANCZOS
            levels = [np.asarray(plane.resize(shape, lanczos, box)) for plane in planes]
            return _centred(np.clip(np.stack(levels, axis=-1), -1, 1), target)
        picture = Image.fromarray(picture)
    return _centred(rgb_of(picture, kept, box=box), target)


def _box(size: Size, scaled: Size, kept: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what is kept of a scaled picture, in pixels of the picture itself.

    What stands out is not computed: of a picture a hundred times as wide as high that would be a hundred
    times what is kept.
    """
    first = [side // 2 - wanted // 2 for side, wanted in zip(scaled, kept, strict=True)]
    last = [start + wanted for start, wanted in zip(first, kept, strict=True)]
    (top, left), (bottom, right) = (
        [place * side / whole for place, side, whole in zip(places, size, scaled, strict=True)]
        for places in (first, last)
    )
    return left, top, right, bottom


def fit_mask(mask: Any, size: Size, target: Size, how: str) -> Bool[np.ndarray, "H W"]:
    """One mask, treated as its picture of that `size` is. No thin line is lost: see `resize_mask`."""
    values = mask_of(mask)
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.shape != size:
        raise DataError(
            f"mask_image must be {size[0]}x{size[1]} (height x width, as the image) with one channel, "
            f"got shape {list(values.shape)}"
        )
    return _centred(resize_mask(values, scaled_size(size, target, how)), target)


def size_of(picture: Any) -> Size:
    """(height, width) of a picture of Pillow, as it stands upright, or of an array."""
    if is_picture(picture):
        standing = upright(picture)
        return standing.height, standing.width
    shape = np.shape(picture)
    if len(shape) != 3 or 0 in shape:
        raise DataError(f"image must be [H, W, 3] or [N, H, W, 3], got shape {list(shape)}")
    return shape[0], shape[1]


def one_by_one(given: Any, axes: int) -> Sequence[Any]:
    """The pictures (3 axes) or masks (2) of an array of several, of a list, or the single one."""
    if isinstance(given, (list, tuple)):
        return given
    if not is_picture(given) and np.ndim(given) > axes:
        return list(np.asarray(given))
    return [given]
