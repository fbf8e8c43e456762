"""Pictures for people: grids of images and each image next to its nearest neighbour, and PNG files."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxldm.arguments import a_path, array, checked, count, optional, several, text
from jaxldm.data.images import to_uint8
from jaxldm.errors import DataError, InvalidArgumentError
from jaxldm.files import write_atomically
from jaxldm.memory import check_fits
from jaxldm.metrics.scores import nearest_neighbour_distances

BORDER = 32  # the grey between images: neither the black nor the white of a digit


@checked(images=array("real"), columns=optional(count(1)), padding=count(0), scale=count(1, 1000))
def image_grid(
    images: Float[np.ndarray, "B H W C"] | UInt8[np.ndarray, "B H W C"],
    columns: int | None = None,
    *,
    padding: int = 2,
    scale: int = 1,
) -> UInt8[np.ndarray, "height width C"]:
    """Return images side by side, row by row from the top left, as one uint8 picture.

    Args:
        images: [B, H, W, C], floats in [-1, 1] or uint8.
        columns: images in a row; the square root of B, rounded up, if None.
        padding: grey pixels around each image.
        scale: each pixel becomes a square of this side.

    Raises:
        DataError: not [B, H, W, C], or NaN.
        InvalidArgumentError: columns or scale below 1, padding below 0; floats of 0 to 255.

    >>> image_grid(np.zeros([5, 28, 28, 1]), columns=3, padding=2).shape
    (62, 92, 1)
    """
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"images must be [B, H, W, C] and not empty, got shape {images.shape}")
    if images.shape[-1] not in (1, 3, 4):
        hint = ": it looks like [B, C, H, W], move the channels last" if images.shape[1] in (1, 3, 4) else ""
        raise DataError(f"images must be [B, H, W, 1, 3 or 4], got shape {images.shape}{hint}")
    columns = int(np.ceil(np.sqrt(len(images)))) if columns is None else columns
    images = images if images.dtype == np.uint8 else to_uint8(images)
    number, height, width, channels = images.shape
    columns = min(columns, number)
    rows = -(-number // columns)
    size = rows * columns * (height * scale + padding) * (width * scale + padding) * channels
    check_fits(3 * size, "a grid of these images needs", "take fewer of them, or a smaller scale or padding")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    cells = np.full((rows * columns, height + padding, width + padding, channels), BORDER, np.uint8)
    cells[:number, padding:, padding:] = images
    cells = cells.reshape(rows, columns, height + padding, width + padding, channels).transpose(0, 2, 1, 3, 4)
    grid = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels),
        BORDER,
        np.uint8,
    )
    grid[: rows * (height + padding), : columns * (width + padding)] = cells.reshape(
        rows * (height + padding), columns * (width + padding), channels
    )
    return grid


@checked(
    images=array("real"),
    columns=count(1),
    title=text,
    column_labels=several(text),
    row_labels=several(text),
    scale=count(1, 1000),
    font_size=count(1, 1000),
)
def labelled_grid(
    images: Float[np.ndarray, "B H W C"] | UInt8[np.ndarray, "B H W C"],
    columns: int,
    *,
    title: str = "",
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    scale: int = 1,
    font_size: int = 13,
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns `image_grid` on white, with a title, a label above each column and one next to each row.

    The picture is as wide as its longest line, so no text is cut off.

    Args:
        images: [B, H, W, C], floats in [-1, 1] or uint8; C = 1 or 3.
        columns: images in a row.
        title: above everything; lines are separated by newlines.
        column_labels: one for each column, or none.
        row_labels: one for each row, or none.
        scale: each pixel becomes a square of this side.
        font_size: in pixels.

    Raises:
        InvalidArgumentError: more or fewer labels than columns or rows.
    """
    from PIL import Image, ImageDraw, ImageFont

    padding = 2
    grid = image_grid(images, columns, padding=padding, scale=scale)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    for name, labels, number in (("column", column_labels, columns), ("row", row_labels, rows)):
        if len(labels) not in (0, number):
            raise InvalidArgumentError(f"{name}_labels must have {number} entries or none, got {len(labels)}")
    # Names of folders can have any white space; Pillow anchors one line only.
    row_labels, column_labels = (
        [" ".join(str(label).split()) for label in labels] for labels in (row_labels, column_labels)
    )
    font, gap = ImageFont.load_default(size=font_size), font_size // 2
    lines = title.split("\n") if title else []
    left = gap + (max(int(font.getlength(label)) for label in row_labels) + gap if row_labels else 0)
    top = gap + (len(lines) + bool(column_labels)) * (font_size + gap)
    height, width = grid.shape[:2]
    widest = max([left + width, *(gap + int(font.getlength(line)) for line in lines)]) + gap
    picture = Image.new("RGB", (widest, top + height + gap), "white")
    picture.paste(Image.fromarray(np.broadcast_to(grid, (height, width, 3))), (left, top))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((gap, gap + number * (font_size + gap)), line, "black", font)
    cell_height, cell_width = (height - padding) / rows, (width - padding) / columns
    for row, label in enumerate(row_labels):
        draw.text((left - gap, top + (row + 0.5) * cell_height), label, "black", font, anchor="rm")
    longest = max((font.getlength(label) for label in column_labels), default=0)
    if longest > cell_width:  # long names of classes over small images
        font = ImageFont.load_default(size=max(1, int(font_size * cell_width / longest)))
    for column, label in enumerate(column_labels):
        draw.text((left + (column + 0.5) * cell_width, top - gap // 2), label, "black", font, anchor="mb")
    return np.asarray(picture)


@checked(
    images=array("real", "[B, H, W, C]", axes=4, filled=True),
    reference=array("real", "[N, H, W, C]", axes=4, filled=True),
    pairs=count(1),
    scale=count(1, 1000),
)
def nearest_neighbour_panel(
    images: Float[np.ndarray, "B H W C"],
    reference: Float[np.ndarray, "N H W C"],
    pairs: int = 8,
    *,
    scale: int = 2,
) -> UInt8[np.ndarray, "height width C"]:
    """Return pairs of (generated image, its nearest training image) side by side, the closest pairs first.

    If the right one of a pair is the same picture as the left one, the model has copied.
    """
    neighbours = nearest_neighbour_distances(images, reference)
    closest = np.argsort(neighbours.distance, kind="stable")[:pairs]
    together = np.stack([images[closest], reference[neighbours.index[closest]]], axis=1)
    return image_grid(
        together.reshape(-1, *images.shape[1:]), columns=8 if len(closest) >= 4 else 2, scale=scale
    )


@checked(path=a_path, picture=array("real"))
def save_png(path: str | pathlib.Path, picture: UInt8[np.ndarray, "H W C"]) -> None:
    """Write a uint8 picture [H, W, C], C = 1 (grey), 3 or 4, as PNG: whole or not at all.

    Raises `DataError` for another shape or type, `StorageError` if it cannot be written.
    """
    write_atomically(path, png_bytes(picture))


def png_bytes(picture: UInt8[np.ndarray, "H W C"]) -> bytes:
    """Return the content of a PNG file of a uint8 picture, see `save_png`. Raises `DataError`."""
    from PIL import Image

    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
        raise DataError(
            f"a picture must be uint8 [H, W, C] with C = 1, 3 or 4, got {picture.dtype} {picture.shape}"
        )
    content = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(content, format="PNG")
    return content.getvalue()
