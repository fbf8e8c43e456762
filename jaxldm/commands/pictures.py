"""Picture files that `jaxldm sample` starts from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxldm.errors import InvalidArgumentError


class Start(NamedTuple):
    """The picture of --image.

    Attributes:
        file: its path.
        size: (height, width) in the file.
        image: what is drawn from: [H, W, 3] in [-1, 1], perhaps of another size; with --resize the picture.
    """

    file: str
    size: tuple[int, int]
    image: Any


def read_start(path: str | None, height: int | None, width: int | None, *, as_it_is: bool) -> Start | None:
    """The picture of --image, None where there is none.

    Args:
        path: the file.
        height, width: see `pixels_of`.
        as_it_is: it is not resized here (--resize).

    Raises:
        DataError: no such file, or not a picture.
        InvalidArgumentError: sides below 1.
    """
    from jaxldm.data.pictures import open_picture
    from jaxldm.pipelines.resizing import size_of

    if path is None:
        return None
    picture = open_picture(path)
    image = picture if as_it_is else pixels_of(picture, path, height, width)
    return Start(path, size_of(picture), image)


def pixels_of(
    picture: Any, path: str, height: int | None = None, width: int | None = None
) -> Float[np.ndarray, "H W 3"]:
    """A picture as RGB in [-1, 1].

    Args:
        picture: of Pillow, of any mode whose numbers have a known meaning.
        path: its file, for messages.
        height: to resize to, in pixels; None keeps that of the file.
        width: the same.

    Raises:
        DataError: numbers of which nobody knows the meaning.
        InvalidArgumentError: sides below 1.
    """
    from jaxldm.data.pictures import rgb_of

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


def read_mask(path: str, start: Start) -> Bool[np.ndarray, "H W"]:
    """A mask file in the size of the image that it belongs to; its thinnest lines stay.

    Args:
        path: of the mask.
        start: the picture of --image.

    Raises:
        DataError: no such file, or no mask.
        InvalidArgumentError: a mask of other proportions than the picture's, which would be stretched.
    """
    from jaxldm.data.pictures import mask_of, open_picture, resize_mask
    from jaxldm.pipelines.resizing import size_of

    mask = open_picture(path)
    check_proportions(f"--mask {path}", size_of(mask), start)
    return resize_mask(mask_of(mask, name=path), size_of(start.image))


def check_proportions(option: str, size: tuple[int, int], start: Start) -> None:
    """Raise `InvalidArgumentError` unless a file is of the proportions of --image, or as large as is drawn.

    Args:
        option: that names the file, and the file.
        size: its (height, width).
        start: the picture of --image.
    """
    from jaxldm.pipelines.resizing import alike, size_of

    whole = start.size
    if not (alike(size, whole) or size == size_of(start.image)):
        raise InvalidArgumentError(
            f"{option} is {size[0]}x{size[1]} pixels (height x width), and --image {whole[0]}x{whole[1]}: "
            "one of them would be stretched; cut one of them to the proportions of the other"
        )
