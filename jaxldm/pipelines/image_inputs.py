"""What a caller hands in: numbers of things, sizes, images and masks, checked and made arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxldm.data.images import check_images, from_uint8
from jaxldm.errors import DataError, InvalidArgumentError


def check_count(number: Any, name: str, lowest: int = 1) -> int:
    """`number`. Raises `InvalidArgumentError` unless it is a whole one of at least `lowest`."""
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < lowest:
        raise InvalidArgumentError(f"{name} must be a whole number of at least {lowest}, not {number!r}")
    return int(number)


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises `InvalidArgumentError`, with the nearest sizes, unless both are multiples of `multiple`.

    >>> check_size(512, 768, 8)
    """
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InvalidArgumentError(f"{name} must be a whole number of pixels, not {size!r}")
        below = size // multiple * multiple
        if below != size:
            nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
            raise InvalidArgumentError(
                f"{name} {size} is not divisible by {multiple}, as this model needs: the nearest is {nearest}"
            )


def as_images(images: Any, name: str = "image") -> Float[np.ndarray, "N H W C"]:
    """Pictures as float32 [N, H, W, C] in [-1, 1].

    Args:
      images: one or several, [H, W, C] or [N, H, W, C]: 8-bit pixels, floats in [-1, 1], or what numpy turns
        into such an array: a PIL image, or a list of arrays or of PIL images.

    Raises:
      DataError: shapes or values that are no images.
    """
    images = _stacked(images, name)
    images = images[None] if images.ndim == 3 else images
    return check_images(from_uint8(images) if images.dtype == np.uint8 else images, name=name)


def as_masks(masks: Any, size: tuple[int, int]) -> Float[np.ndarray, "N H W 1"]:
    """Masks as float32 [N, H, W, 1]: 1 where the mask is white (half or more), 0 elsewhere.

    Args:
      masks: [H, W], [N, H, W] or [N, H, W, 1]: booleans, 8-bit pixels, floats in [0, 1], PIL images.
      size: (H, W), of the image that they belong to.

    Raises:
      DataError: another size, another number of channels, or values out of range.
    """
    masks = _stacked(masks, "mask_image")
    if masks.ndim == 2:
        masks = masks[None]
    if masks.ndim == 3:
        masks = masks[..., None]
    if masks.ndim != 4 or masks.shape[1:] != (*size, 1):
        raise DataError(
            f"mask_image must be {size[0]}x{size[1]} (height x width, as the image) with one channel, "
            f"got shape {list(masks.shape)}"
        )
    masks = masks / np.float32(255) if masks.dtype == np.uint8 else masks.astype(np.float32)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise DataError("mask_image must hold numbers from 0 (kept) to 1 (drawn anew), or 8-bit pixels")
    return (masks >= 0.5).astype(np.float32)


def check_rows(rows: np.ndarray, num_images: int, name: str) -> None:
    """Raises `InvalidArgumentError` unless there is one row for all images, or one for each."""
    if len(rows) not in (1, num_images):
        raise InvalidArgumentError(
            f"{len(rows)} arrays in {name}, but {num_images} images are asked for: give one for all, or one "
            "for each"
        )


def repeated(rows: np.ndarray, num_images: int) -> np.ndarray:
    """`num_images` rows out of one for all, or one for each."""
    return np.broadcast_to(rows, (num_images, *rows.shape[1:]))


def _stacked(images: Any, name: str) -> np.ndarray:
    try:
        several = isinstance(images, (list, tuple))
        array = np.stack([np.asarray(image) for image in images]) if several else np.asarray(images)
    except ValueError as error:
        raise DataError(f"{name} holds pictures of different sizes, or none: {error}") from error
    if array.dtype == object or array.size == 0:
        raise DataError(f"{name} must hold pictures, not {type(images).__name__}")
    return array
