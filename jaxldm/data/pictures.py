"""Pictures and masks of files, PIL images and arrays as numbers: by their mode and range, never by a guess.

A picture that cannot be read without guessing what its numbers mean, or which of several pictures of its file
is meant, is refused. EXIF orientation is honoured.
"""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxldm.data.images import from_uint8
from jaxldm.errors import DataError
from jaxldm.reading import reading

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow's own conversion to RGB reads rightly; the others have transparency, 16 bits, or no known range.
_CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_FULL_SCALES = (1, 255, 65535)  # of whole numbers in masks
_GREY = 32  # how far apart R, G and B of grey pixels may be: JPEG changes them by a few levels
_FIRST_IS_WHOLE = ("MPO", "PSD")  # formats of which the first picture is the whole one: cameras' JPEG, layers
_EXIF = ("exif", "Raw profile type exif")  # in Pillow's `info`
_REDUCED = 254  # the tag of TIFF whose first bit says that a page is a small copy of another
_MOST_COPIES = 32  # with more pages they are taken for pictures without looking at them
TAKE_FRAME = "give one of them as a picture, with Pillow  picture.seek(0); picture.copy().save('frame.png')"
SAVE_MASK = "save it in black and white, white where the image is drawn again"


def open_picture(path: str | Path, name: str = "picture") -> Image:
    """A picture file, decoded, and turned as its EXIF orientation says.

    Raises:
        DataError: no such file, not a picture, a damaged one, one of several frames or pages, or one of more
            pixels than Pillow takes to be safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not Path(path).is_file():
        raise DataError(f"there is no {name} {path}")
    return decode_picture(path, path)


def decode_picture(source: str | Path | bytes, path: str | Path, max_exif: int | None = None) -> Image:
    """A picture of a file or of its content, as `open_picture`; `path` names it in messages.

    One with EXIF of more than `max_exif` bytes, where that is given, is refused before it is read: its
    entries may all be of the same bytes, and as long as all of it.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                _check_single(opened, path)
                opened.load()
                exif = max(len(opened.info.get(key, "")) for key in _EXIF)
                if max_exif is not None and exif > max_exif:
                    raise DataError(
                        f"{path} has {exif:,} bytes of EXIF, at most {max_exif:,} are read: save it without"
                    )
                return ImageOps.exif_transpose(opened)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be meant to fill the memory: "
            "make it smaller first"
        ) from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be read as a picture: it is none, or of an unknown format") from error
    except Exception as error:  # decoders of damaged files raise errors of every type
        raise DataError(f"{path} cannot be read as a picture: {error}") from error


def is_picture(value: Any) -> bool:
    """Whether it is an image of Pillow, which is not imported for it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def upright(picture: Image, name: str = "picture") -> Image:
    """The picture, decoded, and turned as its EXIF orientation says.

    Raises `DataError` for a damaged one, and for an opened file of several frames or pages.
    """
    from PIL import ImageOps

    with reading(name, DataError):  # a file that was opened is decoded now
        _check_single(picture, name)
        picture.load()
        return ImageOps.exif_transpose(picture)


def _check_single(picture: Image, name: str | Path) -> None:
    """Raises `DataError` for an animation, or pages of which none is known to be the one that is meant."""
    if not getattr(picture, "is_animated", False) or picture.format in _FIRST_IS_WHOLE:
        return
    if picture.format == "TIFF" and _has_small_copies(picture):
        return
    raise DataError(f"{name} holds several frames or pages, and one picture is wanted: {TAKE_FRAME}")


def _has_small_copies(picture: Any) -> bool:
    """Whether all pages of a TIFF behind the first are smaller copies of it, by their own tag."""
    if picture.n_frames > _MOST_COPIES or picture.tell() != 0:
        return False
    copies = []
    for page in range(1, picture.n_frames):
        picture.seek(page)
        copies.append(picture.tag_v2.get(_REDUCED, 0) & 1)
    picture.seek(0)
    return all(copies)


def rgb_of(
    picture: Image,
    size: tuple[int, int] | None = None,
    name: str = "image",
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Float[np.ndarray, "H W 3"]:
    """A picture as RGB in [-1, 1], resized to (height, width) where that is given (Lanczos).

    Args:
        box: (left, top, right, bottom) of the part that is resized, in pixels; None: all of it.

    Grey, palette, CMYK, YCbCr and HSV become RGB; what is transparent lies on white; 16 bits stay 16 bits.

    Raises:
        DataError: 32 bits or floats, whose range is not known, and other modes.
    """
    from PIL import Image

    picture = upright(picture, name)
    shape = picture.size if size is None else (size[1], size[0])
    resized, lanczos = size is not None and (shape, box) != (picture.size, None), Image.Resampling.LANCZOS
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture, np.float32) / np.float32(32767.5) - np.float32(1)
        levels[_transparent(picture)] = 1
        if resized:
            levels = np.clip(np.asarray(Image.fromarray(levels).resize(shape, lanczos, box)), -1, 1)
        return np.repeat(levels[..., None], 3, axis=-1)
    if picture.has_transparency_data and picture.mode != "La":
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, with_alpha).convert("RGB")
    elif picture.mode in _CONVERTED:
        picture = picture.convert("RGB")
    else:
        raise DataError(
            f"{name} has Pillow's mode {picture.mode!r}, in which black and white are not known: give it as "
            'RGB, picture.convert("RGB") if that looks right'
        )
    if resized:
        picture = picture.resize(shape, lanczos, box)
    return from_uint8(np.asarray(picture))


def mask_of(mask: Any, name: str = "mask_image") -> Bool[np.ndarray, "*N"]:
    """True where a mask is white (half of its full scale or more).

    Args:
        mask: an image of Pillow or an array: booleans, whole numbers of which the full scale is 1, 255 or
            65535 (the smallest that none exceeds), or floats in [0, 1].
        name: for messages.

    Raises:
        DataError: colours, transparency, or numbers of another range.
    """
    mask = _grey_levels(upright(mask, name), name) if is_picture(mask) else np.asarray(mask)
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind in "iu":
        lowest, highest = (int(bound) for bound in (mask.min(), mask.max())) if mask.size else (0, 0)
        if lowest >= 0 and highest <= _FULL_SCALES[-1]:
            return mask >= next(scale for scale in _FULL_SCALES if highest <= scale) / 2
        raise DataError(f"{name} must hold 0 and 1, or 0 to 255, it holds {lowest} to {highest}")
    if jnp.issubdtype(mask.dtype, jnp.floating):
        mask = mask.astype(np.float32)
        if ((mask >= 0) & (mask <= 1)).all():
            return mask >= 0.5
        raise DataError(f"{name} must hold numbers from 0 (kept) to 1 (drawn again), or 8-bit pixels")
    raise DataError(f"{name} must hold booleans or numbers, got {mask.dtype}")


def _grey_levels(mask: Image, name: str) -> np.ndarray:
    """The numbers of a mask in a picture. Raises `DataError` where it is not in black and white."""
    if mask.has_transparency_data:
        if mask.mode == "La" or _transparent(mask).any():
            raise DataError(f"{name} is partly transparent, which may mean either: {SAVE_MASK}")
        mask = mask if mask.mode.startswith("I;16") else mask.convert("RGB")
    if mask.mode in ("1", "L") or mask.mode.startswith("I;16") or mask.mode in ("I", "F"):
        return np.asarray(mask)
    if mask.mode not in _CONVERTED:
        raise DataError(f"{name} has Pillow's mode {mask.mode!r}: {SAVE_MASK}")
    colours = np.asarray(mask.convert("RGB"))
    if (np.ptp(colours, axis=-1) <= _GREY).all():
        return np.asarray(mask.convert("L"))
    several = np.unique(colours.reshape(-1, 3), axis=0)
    if len(several) == 2 and not several[0].any():  # black and one colour, as label files have it
        return np.any(colours > 0, axis=-1, keepdims=True)[..., 0]
    raise DataError(f"{name} has colours: {SAVE_MASK}")


def grey_pixels(pixels: np.ndarray, name: str = "mask_image") -> np.ndarray:
    """A mask [H, W, 3 or 4] of RGB or RGBA pixels as its levels [H, W], read as a picture of Pillow is.

    Args:
        pixels: booleans, 8-bit pixels, or floats in [0, 1].
        name: for messages.

    Raises:
        DataError: colours, transparency, or numbers of another range.
    """
    from PIL import Image

    if pixels.dtype != np.uint8:
        if pixels.dtype != bool and not (jnp.issubdtype(pixels.dtype, jnp.floating) and _in_unit(pixels)):
            raise DataError(f"{name} of colours must be booleans, 8-bit pixels, or floats from 0 to 1")
        pixels = np.rint(np.asarray(pixels, np.float32) * 255).astype(np.uint8)
    return _grey_levels(Image.fromarray(pixels), name)


def _in_unit(numbers: np.ndarray) -> bool:
    """Whether all numbers are in [0, 1]."""
    return bool(((numbers >= 0) & (numbers <= 1)).all())


def _transparent(picture: Image) -> Bool[np.ndarray, "H W"]:
    """Where a picture is not opaque. One of 16 bits has a single transparent level, or none."""
    if picture.mode.startswith("I;16"):
        return np.asarray(picture) == picture.info.get("transparency", -1)
    return np.asarray(picture.convert("RGBA"))[..., 3] < 255


def resize_mask(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A mask in another (height, width): True where any pixel below is, so that no line is lost.

    >>> import numpy as np
    >>> resize_mask(np.eye(4, dtype=bool)[:, :3], (2, 3)).astype(int)
    array([[1, 1, 0],
           [0, 0, 1]])
    """
    for axis, length in enumerate(size):
        old = mask.shape[axis]
        places = np.arange(length, dtype=np.int64)
        if length >= old:
            mask = np.take(mask, (2 * places + 1) * old // (2 * length), axis)
            continue
        first, last = places * old // length, -(-(places + 1) * old // length)
        total = np.cumsum(mask, axis, dtype=np.int64)
        total = np.concatenate([np.zeros_like(np.take(total, [0], axis)), total], axis)
        mask = np.take(total, last, axis) > np.take(total, first, axis)
    return mask


def shrink_masks(masks: Float[np.ndarray, "N H W 1"], factor: int) -> Float[np.ndarray, "N h w 1"]:
    """Masks for squares of `factor` pixels: the largest number in each, so that a single pixel counts."""
    count, height, width, _ = masks.shape
    squares = masks.reshape(count, height // factor, factor, width // factor, factor, 1)
    return squares.max(axis=(2, 4))
