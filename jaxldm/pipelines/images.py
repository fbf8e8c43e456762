"""From arrays to picture files: uint8 images, a grid, one PNG per image and an .npz.

Everything is written under a temporary name first and then renamed, so that a full disk or a kill leaves either the
old files or the new ones, whole.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxldm.checkpoints.storage import storage_errors
from jaxldm.data.images import to_uint8
from jaxldm.errors import InvalidArgumentError, StorageError

_PICTURE = re.compile(r"image-\d{5,}(-class-\d+)?\.png")


def columns_for(num_images: int, num_labels: int = 1) -> int:
    """Columns of a nearly square grid; a multiple of `num_labels` where that fits, so that a column is one class.

    >>> columns_for(64, 2), columns_for(40, 10), columns_for(5, 1), columns_for(20, 1000)
    (8, 10, 3, 5)
    """
    square = math.ceil(math.sqrt(num_images))
    if 1 < num_labels <= min(2 * square, num_images):
        return max(1, round(square / num_labels)) * num_labels
    return square


def make_grid_image(images: UInt8[np.ndarray, "N H W C"], columns: int | None = None,
                    margin: int = 2) -> UInt8[np.ndarray, "height width C"]:
    """The images side by side, row by row, `margin` grey pixels between them and around."""
    count, height, width, channels = images.shape
    columns = columns or columns_for(count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 128, np.uint8)
    for k, image in enumerate(images):
        top = margin + (k // columns) * (height + margin)
        left = margin + (k % columns) * (width + margin)
        canvas[top:top + height, left:left + width] = image
    return canvas


def save_png(path: str | Path, image: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes one picture: one channel as grey, three as RGB, four as RGBA."""
    from PIL import Image

    if image.shape[-1] not in (1, 3, 4):
        raise InvalidArgumentError(f"a PNG has 1, 3 or 4 channels, these images have {image.shape[-1]}")
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")


def check_output_folder(folder: str | Path) -> Path:
    """Raises `StorageError` when `folder` cannot become a folder to write to; writes nothing itself."""
    folder = Path(folder)
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise StorageError(f"{existing} is a file, not a folder: choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"no permission to write in {existing}: choose another output folder")
    return folder


def save_samples(folder: str | Path, images: Float[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"] | None = None,
                 columns: int | None = None) -> Path:
    """Writes `grid.png`, `image-00000-class-3.png`, ... and `samples.npz` into `folder` and returns it.

    `samples.npz` holds `images` uint8 [N, H, W, C] and `labels` int32 [N] (-1 where the model knows no classes).
    Pictures of an earlier call in the same folder are replaced once all the new ones are on the disk.
    Raises `DataError` for NaN and `StorageError` when the disk is full; what lay in the folder stays as it was.
    """
    folder = check_output_folder(folder)
    pictures = to_uint8(images)
    names = [f"image-{k:05d}.png" if labels is None else f"image-{k:05d}-class-{labels[k]}.png"
             for k in range(len(pictures))]
    numbers = np.full(len(pictures), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            for name, picture in zip(names, pictures, strict=True):
                save_png(Path(partial, name), picture)
            save_png(Path(partial, "grid.png"), make_grid_image(pictures, columns))
            np.savez(Path(partial, "samples.npz"), images=pictures, labels=numbers)
            for name in (*names, "grid.png", "samples.npz"):
                os.replace(Path(partial, name), folder / name)
        for old in folder.iterdir():
            if _PICTURE.fullmatch(old.name) and old.name not in names:
                old.unlink()
    return folder
