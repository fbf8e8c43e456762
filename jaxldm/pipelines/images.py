"""From arrays to files: a grid, one PNG per image and an .npz, all of them or none."""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import a_path, array, checked, count, number, optional
from jaxldm.data import to_uint8
from jaxldm.errors import DataError, StorageError
from jaxldm.exact import LARGEST_INT32
from jaxldm.files import Content, write_together
from jaxldm.metrics import Finding, health, image_grid
from jaxldm.metrics.pictures import png_bytes

MAX_NAME = 255  # bytes of a file's name, on all usual systems
_OURS = re.compile(r"image-\d{5,}(-class-\d+)?\.png|grid\.png|samples\.npz")


def as_output_type(images: Float[np.ndarray, "*N H W C"] | None, output_type: str) -> Any:
    """Images in [-1, 1] as "np", in [0, 1], or "pil", lists of PIL images; None stays."""
    if images is None:
        return None
    if output_type == "np":
        return (np.asarray(images, np.float32) + np.float32(1)) / np.float32(2)
    if images.ndim > 4:
        return [as_output_type(each, output_type) for each in images]
    from PIL import Image

    pixels = to_uint8(images)
    return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in pixels]


@checked(num_images=count(1), num_labels=count(0))
def columns_for(num_images: int, num_labels: int = 1) -> int:
    """Columns of a nearly square grid; a multiple of `num_labels` where that fits, so that a column is one
    class.

    >>> columns_for(64, 2), columns_for(40, 10), columns_for(5, 1), columns_for(20, 1000)
    (8, 10, 3, 5)
    """
    square = math.ceil(math.sqrt(num_images))
    if 1 < num_labels <= min(2 * square, num_images):
        return max(1, round(square / num_labels)) * num_labels
    return square


@checked(images=array("floating", "[N, ...]", axes=(2, 64), filled=True), guidance_scale=number())
def check_drawn(images: Float[np.ndarray, "N H W C"], guidance_scale: float = 1.0) -> list[Finding]:
    """Looks for NaN, and for blank (black, white, grey) images, among those drawn at a guidance scale.

    Raises `DataError`, with the likely cause and what to do, when there is NaN: that is no picture to save.
    """
    nan, *_ = findings = [*health.check_guided(images, guidance_scale), *health.check_blank(images)]
    if not nan.ok:
        raise DataError(f"{nan.seen}: {nan.likely_cause}; {nan.fix}")
    return findings


@checked(folder=a_path)
def check_output_folder(folder: str | Path) -> Path:
    """Raises `StorageError` when `folder` cannot become a folder to write to; writes nothing itself."""
    folder = Path(folder)
    existing = folder.absolute()
    longest = max(len(os.fsencode(part)) for part in existing.parts)
    if longest > MAX_NAME:
        raise StorageError(
            f"a name of {longest} bytes is too long for a folder: choose another output folder"
        )
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise StorageError(f"{existing} is a file, not a folder: choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"no permission to write in {existing}: choose another output folder")
    return folder


@checked(
    folder=a_path,
    images=array("floating", "[N, H, W, C]", axes=4, filled=True),
    labels=optional(array("whole", "[N]", axes=1, low=0, high=LARGEST_INT32)),
    columns=optional(count(1)),
)
def save_samples(
    folder: str | Path,
    images: Float[np.ndarray, "N H W C"],
    labels: Int[np.ndarray, " N"] | None = None,
    columns: int | None = None,
) -> None:
    """Writes `grid.png`, `image-00000-class-3.png`, ... and `samples.npz` into `folder`.

    `samples.npz` holds `images` uint8 [N, H, W, C] and `labels` int32 [N] (-1 where the model knows no
    classes). Those of an earlier call in the same folder are replaced all at once, when the new ones are on
    the disk; other files stay.

    Args:
        images: in [-1, 1].
        labels: the class of each image, or None.
        columns: of the grid; None for a square.

    Raises:
        DataError: NaN, or images that are no pictures, such as latents of four channels; another number of
            labels.
        InvalidArgumentError: numbers of 0 to 255.
        StorageError: the disk is full, ...; what lay in the folder is then as it was.
    """
    folder = check_output_folder(folder)
    if np.shape(images)[-1] not in (1, 3):
        raise DataError(
            f"images must be [N, H, W, 3 or 1], got {list(np.shape(images))}: latents are decoded first, by "
            "pipelines.decode_images"
        )
    pictures = to_uint8(images)
    if labels is not None and len(labels) != len(pictures):
        raise DataError(f"labels must be one for each of {len(pictures)} images, got {len(labels)}")
    names = [
        f"image-{k:05d}.png" if labels is None else f"image-{k:05d}-class-{labels[k]}.png"
        for k in range(len(pictures))
    ]
    numbers = np.full(len(pictures), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
    arrays = io.BytesIO()
    np.savez(arrays, images=pictures, labels=numbers)
    contents: dict[str, Content] = {
        name: (png_bytes(picture) for picture in [picture])  # made when it is written
        for name, picture in zip(names, pictures, strict=True)
    }
    contents |= {"grid.png": png_bytes(image_grid(pictures, columns)), "samples.npz": arrays.getvalue()}
    write_together(folder, contents, lambda name: _OURS.fullmatch(name) is not None)
