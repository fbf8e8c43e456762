"""Sets of images on disk, read batch by batch: folders of pictures and .npz files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxldm.arguments import a_path, array, checked, instance, text
from jaxldm.data.batches import Rows
from jaxldm.data.images import to_uint8
from jaxldm.data.pictures import open_picture, rgb_of
from jaxldm.errors import DataError
from jaxldm.reading import check_regular, reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
AT_ONCE = 256  # images of rows in memory
_GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I;16N", "LA")


class ImageSet(NamedTuple):
    """Images of one size.

    Attributes:
        name: of the folder or file.
        count: number of images.
        size: height and width.
        batches: batch size -> the images as uint8 [B, H, W, 3], in a fixed order; grey ones three times.
        digest: SHA-256 of the contents of the files in that order.
        lossy: whether some are JPEG files, which changes every distance.
    """

    name: str
    count: int
    size: tuple[int, int]
    batches: Callable[[int], Iterator[UInt8[np.ndarray, "B H W 3"]]]
    digest: str
    lossy: bool = False


AN_IMAGE_SET = instance(ImageSet, "images from metrics.open_image_set(path) or array_set(images, name)")


@checked(path=a_path)
def open_image_set(path: Path | str) -> ImageSet:
    """Return the images of a folder (also in folders within it, by path) or of an .npz file.

    Raises:
        DataError: nothing there, no images, another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise DataError(f"there are no images at {path}: give a folder of pictures or an .npz file")
    if path.suffix == ".npz":
        check_regular(path, "file of images", DataError)
        return _npz(path)
    raise DataError(f"{path} is neither a folder of pictures nor an .npz file")


@checked(images=array("any"), name=text)
def array_set(images: UInt8[np.ndarray, "N H W C"], name: str) -> ImageSet:
    """Return images in memory as a set. Raises `DataError` unless they are uint8 [N, H, W, 1 or 3]."""
    images = np.asarray(images)
    _check_array(images.shape, images.dtype, name)

    def batches(size: int) -> Iterator[np.ndarray]:
        return (_rgb(images[start : start + size]) for start in range(0, len(images), size))

    digest = hashlib.sha256(repr(images.shape).encode() + np.ascontiguousarray(images).tobytes()).hexdigest()
    return ImageSet(name, len(images), images.shape[1:3], batches, digest)


def rows_set(rows: Rows, shape: Sequence[int], name: str) -> ImageSet:
    """The images [H, W, C] of rows as `array_set` has them, read from the rows batch by batch.

    Raises `DataError` as `array_set`.
    """
    height, width, channels = shape
    whole = (len(rows), height, width, channels)
    _check_array(whole, np.dtype(np.uint8), name)

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), size):
            yield to_uint8(rows.take(np.arange(start, min(start + size, len(rows))))["image"])

    total = hashlib.sha256(repr(whole).encode())
    for some in read(AT_ONCE):
        total.update(some.tobytes())
    batches = lambda size: map(_rgb, read(size))  # noqa: E731
    return ImageSet(name, len(rows), (height, width), batches, total.hexdigest())


def _check_array(shape: tuple[int, ...], dtype: Any, name: str) -> None:
    if len(shape) != 4 or shape[-1] not in (1, 3) or min(shape) < 1:
        raise DataError(f"{name} must hold images [N, H, W, 3 or 1] and at least one, got shape {shape}")
    if dtype != np.uint8:
        raise DataError(f"{name} must hold 8-bit images (uint8), got {dtype}: use jaxldm.data.to_uint8")


def _rgb(images: np.ndarray) -> UInt8[np.ndarray, "B H W 3"]:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _folder(folder: Path) -> ImageSet:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder} has no pictures ({', '.join(SUFFIXES)})")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    first, grey = _picture(files[0])

    def read(file: Path) -> np.ndarray:
        pixels, is_grey = _picture(file)
        if pixels.shape != first.shape:
            raise DataError(
                f"{folder} has pictures of several sizes, {files[0].name} of {_extents(first)} and "
                f"{file.name} of {_extents(pixels)}: crop and resize them all alike first"
            )
        if is_grey != grey:
            kinds = ("grey", "coloured") if grey else ("coloured", "grey")
            raise DataError(
                f"{folder} mixes grey and coloured pictures, {files[0].name} is {kinds[0]} and {file.name} "
                f"{kinds[1]}: take them apart, or save them all as RGB"
            )
        return pixels

    def batches(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), size):
            yield np.stack([read(file) for file in files[start : start + size]])

    lossy = any(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    height, width = first.shape[:2]
    return ImageSet(str(folder), len(files), (height, width), batches, total.hexdigest(), lossy)


def _extents(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _picture(file: Path) -> tuple[UInt8[np.ndarray, "H W 3"], bool]:
    picture = open_picture(file)
    grey = picture.mode in _GREY_MODES
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return np.asarray(picture), grey
    return to_uint8(rgb_of(picture, name=str(file))), grey


def _npz(path: Path) -> ImageSet:
    """The only array of images in the file, read as a stream."""
    with reading(path, DataError):
        with zipfile.ZipFile(path) as archive:
            heads = {name: _header(archive, name) for name in archive.namelist() if name.endswith(".npy")}
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    found = {name: head for name, head in heads.items() if len(head[0]) == 4}
    if len(found) != 1:
        arrays = ", ".join(f"{name.removesuffix('.npy')} {list(head[0])}" for name, head in heads.items())
        raise DataError(f"{path} must hold one array of images [N, H, W, 3], has {arrays or 'nothing'}"[:380])
    [(entry, (shape, fortran, dtype))] = found.items()
    _check_array(shape, dtype, str(path))
    if fortran:
        raise DataError(f"{path} holds its images in Fortran's order: save np.ascontiguousarray(images)")

    def batches(size: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as content:
            _read_header(content)
            image = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                number = min(size, shape[0] - start)
                with reading(path, DataError):
                    numbers = content.read(number * image)
                if len(numbers) != number * image:
                    raise DataError(f"{path} is cut off: copy or download it again")
                yield _rgb(np.frombuffer(numbers, np.uint8).reshape(number, *shape[1:]))

    return ImageSet(str(path), shape[0], (shape[1], shape[2]), batches, digest)


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    with archive.open(name) as content:
        return _read_header(content)


def _read_header(content: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(content)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(content)
    return np.lib.format.read_array_header_2_0(content)
