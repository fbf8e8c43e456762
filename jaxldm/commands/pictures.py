"""Picture files that `jaxldm sample` starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxldm.errors import InvalidArgumentError


def read_picture(
    path: str, height: int | None = None, width: int | None = None
) -> Float[np.ndarray, "H W 3"]:
    """A picture file as RGB in [-1, 1].

    Args:
        path: the file, of any mode whose numbers have a known meaning.
        height: to resize to, in pixels; None keeps that of the file.
        width: the same.

    Raises:
        DataError: no such file, or not a picture.
        InvalidArgumentError: sides below 1.
    """
    from jaxldm.data.pictures import open_picture, rgb_of

    picture = open_picture(path)
    size = (picture.height if height is None else height, picture.width if width is None else width)
    if min(size) < 1:
        raise InvalidArgumentError(f"height and width must be 1 or more, got {size[0]} and {size[1]}")
    check_picture_size(*size)
    return rgb_of(picture, size, name=path)


def check_picture_size(height: int, width: int) -> None:
    """Raises `InvalidArgumentError` for more pixels than a picture file may have."""
    from PIL import Image

    most = Image.MAX_IMAGE_PIXELS
    if most is not None and height * width > most:
        raise InvalidArgumentError(
            f"--image would be resized to {height}x{width} pixels, more than {most:,}: give a smaller "
            "--height and --width"
        )


def read_mask(path: str, image: Any) -> Bool[np.ndarray, "H W"]:
    """A mask file in the size of the image that it belongs to; its thinnest lines stay."""
    from jaxldm.data.pictures import mask_of, open_picture, resize_mask
    from jaxldm.pipelines.resizing import size_of

    if image is None:
        raise InvalidArgumentError("--mask selects the part of --image to draw again: give --image, too")
    return resize_mask(mask_of(open_picture(path), name=path), size_of(image))
