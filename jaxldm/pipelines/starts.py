"""Where a run starts: pure noise, latents of the caller's, a noised image, or an image with a mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.image_inputs import as_images, as_masks, check_rows, check_size, repeated
from jaxldm.pipelines.latent_images import encode_images
from jaxldm.pipelines.network import Network

INPAINTING_CHANNELS = 9  # latents, mask, latents of the masked image


class Canvas(NamedTuple):
    """What a start has to fit.

    Attributes:
      default_size: (height, width) in pixels, where nobody says another.
      multiple: what heights and widths are divisible by.
      factor: pixels that a latent is high and wide; not whole in Wuerstchen's prior.
      channels: of the latents; 3 where they are pixels.
      tells_mask: the network was trained for inpainting and is told the mask.
    """

    default_size: tuple[int, int]
    multiple: int
    factor: float
    channels: int
    tells_mask: bool


class Start(NamedTuple):
    """What a call starts from; arrays have a row for each of N images, and None is what is not there.

    Attributes:
      size: (height, width) of the images.
      latents: [N, h, w, c], x at the first row.
      image: [N, h, w, c], latents to be noised.
      known: [N, h, w, c], latents to be kept where `repaint` [N, h, w, 1] is 0.
      channels: [N, h, w, c + 1], what an inpainting network is told besides x.
    """

    size: tuple[int, int]
    latents: Float[np.ndarray, "N h w c"] | None = None
    image: Float[np.ndarray, "N h w c"] | None = None
    known: Float[np.ndarray, "N h w c"] | None = None
    repaint: Float[np.ndarray, "N h w 1"] | None = None
    channels: Float[np.ndarray, "N h w e"] | None = None


def make_start(
    canvas: Canvas,
    vae: Network | None,
    num_images: int,
    height: int | None = None,
    width: int | None = None,
    *,
    image: Any = None,
    strength: float | None = None,
    mask_image: Any = None,
    latents: Any = None,
) -> Start:
    """The start that the arguments of a pipeline's call ask for; `strength` is that of `strength_of`.

    Without an autoencoder pixels are the latents.

    Raises:
      InvalidArgumentError: arguments that exclude or need each other, or a size that does not fit.
      DataError: arrays that are no images, masks or latents.
    """
    _check_together(canvas, image, mask_image, latents)
    factor, channels = canvas.factor, canvas.channels
    masks, given = None, {}
    if image is not None:
        image = _pixels_or_latents(image, channels)
        check_rows(image, num_images, "image")
        by = factor if image.shape[-1] == channels else 1
        given["image"] = tuple(int(n * by) for n in image.shape[1:3])
    if latents is not None:
        latents = four_axes(latents, channels)
        check_rows(latents, num_images, "latents")
        given["latents"] = tuple(int(n * factor) for n in latents.shape[1:3])
        latents = repeated(latents, num_images)
    size = _size(height, width, canvas.default_size, given)
    check_size(*size, canvas.multiple)
    if image is None:
        return Start(size, latents)
    if mask_image is not None:
        masks = as_masks(mask_image, size)
        check_rows(masks, num_images, "mask_image")
    is_latents = image.shape[-1] == channels
    if canvas.tells_mask and is_latents:
        raise InvalidArgumentError("this inpainting network is told the masked pixels: give image as pixels")

    code = repeated(image if is_latents else encode_images(vae, image), num_images)
    if masks is None:
        return Start(size, image=code)
    repaint = repeated(masks[:, ::factor, ::factor], num_images)
    # At strength 1 the start is pure noise, as such networks were trained.
    start = Start(size, latents, code if strength < 1 and latents is None else None)
    if not canvas.tells_mask:
        return start._replace(known=code, repaint=repaint)
    kept = repeated(encode_images(vae, image * (masks < 0.5)), num_images)
    return start._replace(channels=np.concatenate([repaint, kept], axis=-1))


def strength_of(image: Any, strength: float | None, mask_image: Any, default_strength: float) -> float | None:
    """Which part of the grid is walked: as given, or the default; None, all of it, without an image.

    Raises:
      InvalidArgumentError: a strength outside (0, 1], or without an image.
    """
    if image is None:
        if strength is not None:
            raise InvalidArgumentError("strength says how far to leave an image: give image, or leave it out")
        return None
    if strength is None:
        return default_strength if mask_image is None else 1.0
    if not 0 < strength <= 1:
        raise InvalidArgumentError(f"strength must lie in (0, 1], not {strength}")
    return strength


def _check_together(canvas, image, mask_image, latents) -> None:
    if mask_image is not None and image is None:
        raise InvalidArgumentError("mask_image says which part of an image to draw anew: give image, too")
    if latents is not None and image is not None and mask_image is None:
        raise InvalidArgumentError("image and latents are both a start: give one of them")
    if canvas.tells_mask and mask_image is None:
        raise InvalidArgumentError("this network was trained for inpainting: give image and mask_image")


def four_axes(array: Any, channels: int, name: str = "latents") -> Float[np.ndarray, "N h w c"]:
    """Finite numbers [N, h, w, channels] out of these or of [h, w, channels].

    Raises:
      InvalidArgumentError: another shape, NaN or infinity.
    """
    array = np.asarray(array, np.float32)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] != channels or 0 in array.shape:
        raise InvalidArgumentError(
            f"{name} must be [N, h, w, {channels}], channels last, not {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise InvalidArgumentError(f"{name} hold NaN or infinity")
    return array


def _pixels_or_latents(image: Any, channels: int) -> np.ndarray:
    shape = np.shape(image) if not isinstance(image, (list, tuple)) else ()
    if channels != 3 and len(shape) in (3, 4) and shape[-1] == channels:
        return four_axes(image, channels)
    pixels = as_images(image)
    if pixels.shape[-1] != 3:
        raise InvalidArgumentError(f"image must have 3 channels (RGB), it has {pixels.shape[-1]}")
    return pixels


def _size(height, width, trained, given) -> tuple[int, int]:
    """(height, width) that was asked for, or that of what was given, or the one of the training.

    Args:
      given: name -> (height, width) of the arrays that were handed in.
    """
    otherwise = next(iter(given.values()), trained)
    size = tuple(
        known if asked is None else asked for asked, known in zip((height, width), otherwise, strict=True)
    )
    for name, there in given.items():
        if there != size:
            raise InvalidArgumentError(
                f"{name} is {there[0]}x{there[1]} pixels (height x width), not {size[0]}x{size[1]}: resize "
                "it, or leave height and width out"
            )
    return size
