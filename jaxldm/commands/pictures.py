"""Picture files that `jaxldm sample` starts from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxldm.errors import DataError, InvalidArgumentError


def read_picture(
    path: str, height: int | None = None, width: int | None = None, mode: str = "RGB"
) -> UInt8[np.ndarray, "H W ..."]:
    """A picture file as 8-bit pixels, [H, W, 3] for mode "RGB" or [H, W] for "L".

    Args:
        path: the file.
        height: to resize to, in pixels; None keeps that of the file.
        width: the same.
        mode: "RGB" or "L".

    Raises:
        DataError: no such file, or not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise DataError(f"there is no picture {path}")
    try:
        with Image.open(path) as opened:
            picture = opened.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}") from error
    size = (width or picture.width, height or picture.height)
    if min(size) < 1:
        raise InvalidArgumentError(f"height and width must be 1 or more, got {size[1]} and {size[0]}")
    if size != picture.size:
        resampling = Image.Resampling.NEAREST if mode == "L" else Image.Resampling.LANCZOS
        picture = picture.resize(size, resampling)
    return np.asarray(picture)


def read_mask(path: str, image: np.ndarray | None) -> UInt8[np.ndarray, "H W"]:
    """A mask file in the size of the image that it belongs to."""
    if image is None:
        raise InvalidArgumentError("--mask selects the part of --image to draw again: give --image, too")
    return read_picture(path, image.shape[0], image.shape[1], mode="L")
