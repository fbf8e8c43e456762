"""Images as numbers: 8-bit pixels to [-1, 1] and back, and checks of images and labels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxldm.arguments import array, checked, count, optional, several, text
from jaxldm.errors import DataError
from jaxldm.pixels import check_not_pixels

TOLERANCE = 1e-3  # how far a value may be outside [-1, 1], by rounding


@checked(pixels=array("whole", "of 8 bits", axes=(1, 64)))
def from_uint8(pixels: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns pixels / 127.5 - 1: 0 becomes -1, 255 becomes 1 (float32).

    Raises `DataError` for numbers of more bits that are not in 0 to 255.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 and pixels.size and not 0 <= pixels.min() <= pixels.max() <= 255:
        raise DataError(f"pixels must lie in 0 to 255, got {pixels.min()} to {pixels.max()}")
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


@checked(images=array("floating"))
def to_uint8(images: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Returns round(127.5 (images + 1)) cut to [0, 255]: the inverse of `from_uint8`, for images in [-1, 1].

    Raises:
        DataError: NaN, which has no grey level.
        InvalidArgumentError: numbers of 0 to 255, which would all be white.
    """
    images = np.asarray(images, dtype=np.float32)
    check_not_pixels("images", images, drawn=True)
    if np.isnan(images).any():
        raise DataError("images with NaN cannot be converted to 8-bit pixels")
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


@checked(images=array("any"), num_levels=count(2, 2**16))
def to_grey_levels(images: Float[np.ndarray, "B H W 1"], num_levels: int) -> Int[np.ndarray, "B H W"]:
    """Returns the nearest of `num_levels` equally spaced grey levels of each pixel, int32: 0 is black.

    Raises `DataError` for images that `check_images` refuses, or of several channels.

    >>> to_grey_levels(np.array([-1.0, -0.9, 0.0, 1.0]).reshape(1, 2, 2, 1), 16).ravel()
    array([ 0,  1,  8, 15], dtype=int32)
    """
    images = check_images(images)
    if images.shape[-1] != 1:
        raise DataError(f"grey levels are of images of one channel, got {images.shape[-1]} channels")
    return np.clip(np.rint((images[..., 0] + 1) / 2 * (num_levels - 1)), 0, num_levels - 1).astype(np.int32)


@checked(levels=array("any"), num_levels=count(2, 2**16))
def from_grey_levels(levels: Int[np.ndarray, "B H W"], num_levels: int) -> Float[np.ndarray, "B H W 1"]:
    """Returns 2 level / (num_levels - 1) - 1, float32: `to_grey_levels` gives the levels back."""
    return (np.asarray(levels, np.float32) * np.float32(2 / (num_levels - 1)) - 1)[..., None]


@checked(shape=optional(several(count(1))), name=text)
def check_images(
    images: Float[np.ndarray, "B H W C"], shape: tuple[int, int, int] | None = None, name: str = "images"
) -> Float[np.ndarray, "B H W C"]:
    """Returns `images` as float32 if they are [B, H, W, C] in [-1, 1], without NaN.

    Args:
        images: to check.
        shape: the (H, W, C) they must have; None allows any.
        name: of the images, for the message.

    Raises:
        DataError: what is wrong, in which image, and how to fix it.
    """
    images = np.asarray(images if hasattr(images, "dtype") else array("any")(name, images))
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{name} must be [B, H, W, C] and not empty, got shape {images.shape}")
    if shape is not None and images.shape[1:] != tuple(shape):
        raise DataError(
            f"{name} must be {_extents(shape)} (height x width x channels), got {_extents(images.shape[1:])}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        fix = ": use jaxldm.data.from_uint8" if images.dtype == np.uint8 else ""
        raise DataError(f"{name} must be floats in [-1, 1], got {images.dtype}{fix}")
    images = images.astype(np.float32)
    wrong = ~np.isfinite(images).all(axis=(1, 2, 3))
    if wrong.any():
        raise DataError(
            f"{name} have NaN or infinity: {name}[{np.argmax(wrong)}] is the first of {wrong.sum()}"
        )
    outside = np.abs(images).max(axis=(1, 2, 3)) > 1 + TOLERANCE
    if outside.any():
        first = np.argmax(outside)
        low, high = images[first].min(), images[first].max()
        fix = "use jaxldm.data.from_uint8 on the 8-bit pixels" if high > 2 else "rescale or clip them"
        raise DataError(
            f"{name} must be in [-1, 1], but {name}[{first}] is in [{low:.4g}, {high:.4g}]: {fix}"
        )
    return images


@checked(num_images=count(0), num_classes=count(1), name=text)
def check_labels(
    labels: Int[np.ndarray, "B"], num_images: int, num_classes: int, name: str = "labels"
) -> Int[np.ndarray, "B"]:
    """Returns `labels` as int32 [B] if there is one per image and all are in [0, num_classes).

    Raises `DataError` with the first invalid one.
    """
    labels = np.asarray(array("real", axes=(1, 64))(name, labels))
    if labels.shape != (num_images,):
        raise DataError(f"{name} must be one per image, [{num_images}], got shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name} must be whole numbers, got {labels.dtype}")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        first = np.argmax(outside)
        raise DataError(f"{name} must be in [0, {num_classes - 1}], but {name}[{first}] is {labels[first]}")
    return labels.astype(np.int32)


def _extents(shape) -> str:
    return "x".join(str(extent) for extent in shape)
