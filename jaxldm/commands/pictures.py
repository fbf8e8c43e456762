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


def read_mask(path: str, picture: str, image: Any) -> Bool[np.ndarray, "H W"]:
    """A mask file in the size of the image that it belongs to; its thinnest lines stay.

    Args:
        path: of the mask.
        picture: the file of --image.
        image: what was read of that, perhaps in another size.

    Raises:
        DataError: no such file, or no mask.
        InvalidArgumentError: a mask of other proportions than the picture's, which would be stretched.
    """
    from jaxldm.data.pictures import mask_of, open_picture, resize_mask
    from jaxldm.pipelines.resizing import size_of

    mask = open_picture(path)
    check_proportions(f"--mask {path}", size_of(mask), picture, image)
    return resize_mask(mask_of(mask, name=path), size_of(image))


def check_proportions(option: str, size: tuple[int, int], picture: str, image: Any) -> None:
    """Raise `InvalidArgumentError` unless a file is of the proportions of --image, or as large as is drawn.

    Args:
        option: that names the file, and the file.
        size: its (height, width).
        picture: the file of --image.
        image: what was read of that, perhaps in another size.
    """
    from jaxldm.data.pictures import open_picture
    from jaxldm.pipelines.resizing import alike, size_of

    whole, drawn = size_of(open_picture(picture)), size_of(image)
    if not (alike(size, whole) or size == drawn):
        raise InvalidArgumentError(
            f"{option} is {size[0]}x{size[1]} pixels (height x width), and --image {whole[0]}x{whole[1]}: "
            "one of them would be stretched; cut one of them to the proportions of the other"
        )
