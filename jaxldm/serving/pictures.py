"""Pictures as bytes, and quick previews of latents."""

from __future__ import annotations

import base64
import binascii
import io
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
        InvalidArgumentError: anything else, or more than `MAX_PIXELS`.
    """
    from PIL import Image

    kinds = ", ".join(FORMATS.values())
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a picture ({kinds}) in base64, got no text")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        content = base64.b64decode(text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are refused next
            with Image.open(io.BytesIO(content), formats=[*FORMATS.values()]) as picture:
                width, height = picture.size
    except (binascii.Error, ValueError, OSError, Image.DecompressionBombError):
        raise InvalidArgumentError(
            f"{name} must be a picture ({kinds}) in base64, and this is none, or damaged"
        ) from None
    if width * height > MAX_PIXELS:
        raise InvalidArgumentError(
            f"{name} has {width}x{height} pixels, at most {MAX_PIXELS:,} may be sent: make it smaller first"
        )
    return content


def with_picture(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call with the picture of a request decoded.

    Raises:
        DataError: a damaged one, or one of several frames.
    """
    content = options.get("image")
    return {**options} if content is None else {**options, "image": decode_picture(content, "image")}


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
