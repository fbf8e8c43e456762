"""Pictures as bytes, and quick previews of latents."""

from __future__ import annotations

import base64
import binascii
import io
import re
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxldm.data.images import to_uint8
from jaxldm.data.pictures import decode_picture
from jaxldm.errors import InvalidArgumentError

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}  # as requests name them, and as Pillow does
MAX_PIXELS = 2**24  # of a picture in a request
# A few bytes make Pillow read a part, and all pixels again for a scan: pictures of cameras have some dozens.
MAX_PARTS = 2000  # chunks of PNG, markers of JPEG
MAX_SCANS = 100  # of a progressive JPEG
MAX_EXIF = 2**16  # bytes
MOST_SAMPLES = 4096  # latents that a preview's map is fitted to


def picture_bytes(image: Float[np.ndarray, "H W C"], format: str = "png") -> bytes:
    """An image in [-1, 1] as the bytes of a file.

    Args:
        image: of 1 or 3 channels.
        format: a name of `FORMATS`.
    """
    from PIL import Image

    pixels: UInt8[np.ndarray, "H W C"] = to_uint8(image)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    stream = io.BytesIO()
    picture.save(stream, FORMATS[format], **({"quality": 95} if format != "png" else {}))
    return stream.getvalue()


def read_picture(name: str, value: Any) -> bytes:
    """The file of a picture in a request, of which the head alone is looked at.

    Args:
        name: of the field.
        value: PNG, JPEG or WebP in base64, perhaps as a data URL.

    Raises:
        InvalidArgumentError: anything else, or more than `MAX_PIXELS`, `MAX_PARTS` or `MAX_SCANS`.
    """
    kinds = ", ".join(FORMATS.values())
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a picture ({kinds}) in base64, got no text")
    text = value.partition(",")[2] if value[:5].lower() == "data:" else value
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgumentError(
            f"{name} must be a picture ({kinds}) in base64: letters, digits, + and / in one line, with = "
            "up to a multiple of 4 characters"
        ) from None
    parts, scans = _parts_of(content)
    if parts > MAX_PARTS or scans > MAX_SCANS:
        raise InvalidArgumentError(
            f"{name} is a file of {parts} parts and {scans} scans, at most {MAX_PARTS} and {MAX_SCANS} may "
            "be sent: save it again, not progressive and without metadata"
        )
    width, height = _size_of(name, content)
    if width * height > MAX_PIXELS:
        raise InvalidArgumentError(
            f"{name} has {width}x{height} pixels, at most {MAX_PIXELS:,} may be sent: make it smaller first"
        )
    return content


_OPENING = threading.Lock()  # Python has one list of warnings for all threads


def _size_of(name: str, content: bytes) -> tuple[int, int]:
    """(width, height) of a picture, as its head says. Raises `InvalidArgumentError` where it is none."""
    from PIL import Image

    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are refused next
            with Image.open(io.BytesIO(content), formats=[*FORMATS.values()]) as picture:
                return picture.size
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (damaged heads raise errors of every type)
        kinds = ", ".join(FORMATS.values())
        raise InvalidArgumentError(
            f"{name} must be a picture ({kinds}) in base64, and this is none, or damaged"
        ) from None


def _parts_of(content: bytes) -> tuple[int, int]:
    r"""(chunks or markers, scans of JPEG) of a file, without reading them.

    What looks like a marker inside of a part of JPEG counts, too: in random bytes one in a thousand.

    >>> _parts_of(b"\xff\xd8\xff\xda..\xff\x00..\xff\xd9"), _parts_of(b"RIFF")
    ((3, 1), (0, 0))
    """
    if content.startswith(b"\xff\xd8"):
        return len(re.findall(rb"\xff[\xc0-\xcf\xd8-\xfe]", content)), content.count(b"\xff\xda")
    parts, place = 0, 8
    while content.startswith(b"\x89PNG") and place < len(content) and parts <= MAX_PARTS:
        place += 12 + int.from_bytes(content[place : place + 4], "big")
        parts += 1
    return parts, 0


def with_picture(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call with the picture of a request decoded.

    Raises:
        DataError: a damaged one, one of several frames, or of more than `MAX_EXIF`.
    """
    content = options.get("image")
    if content is None:
        return {**options}
    picture = decode_picture(content, "image", MAX_EXIF)
    # It stands upright, and what else is said of it is read by nobody, and not to be read once more.
    picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
    return {**options, "image": picture}


def is_previewed(done: int, total: int, previews: int) -> bool:
    """Whether a step is one of `previews` at equal distances, before the last of `total`.

    >>> [done for done in range(1, 10) if is_previewed(done, 10, 2)]
    [4, 7]
    """
    parts = previews + 1
    return done < total and done * parts // total > (done - 1) * parts // total


class Preview(NamedTuple):
    """A linear map from latents to colours: a small picture without the autoencoder.

    Attributes:
        weights: [c, C].
        bias: [C].
    """

    weights: Float[np.ndarray, "c C"]
    bias: Float[np.ndarray, " C"]

    def __call__(self, latents: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h w C"]:
        """A picture [h, w, C] in [-1, 1]."""
        return np.clip(latents @ self.weights + self.bias, -1, 1).astype(np.float32)


def fit_preview(latents: Float[np.ndarray, "h w c"], image: Float[np.ndarray, "H W C"]) -> Preview:
    """The map that fits one image best: least squares on the means of the pixels that each latent covers."""
    height, width, channels = latents.shape
    tall, wide = image.shape[0] // height, image.shape[1] // width
    pixels = image[: tall * height, : wide * width].reshape(height, tall, width, wide, -1).mean((1, 3))
    inputs = np.concatenate([latents, np.ones((height, width, 1), latents.dtype)], -1)
    inputs, pixels = inputs.reshape(-1, channels + 1), pixels.reshape(-1, image.shape[-1])
    every = -(-len(inputs) // MOST_SAMPLES)
    solution = np.linalg.lstsq(inputs[::every], pixels[::every], rcond=1e-3)[0]
    return Preview(solution[:-1], solution[-1])
