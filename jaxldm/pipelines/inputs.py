"""What a caller hands in besides texts: sizes, images, masks and latents, checked and made arrays."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxldm.arguments import array as numbers
from jaxldm.arguments import checked, count, pair, text
from jaxldm.data.images import check_images, from_uint8
from jaxldm.data.pictures import grey_pixels, is_picture, mask_of, rgb_of, shrink_masks
from jaxldm.errors import DataError, InvalidArgumentError, JaxldmError
from jaxldm.exact import ceil_quotient, floor_product
from jaxldm.memory import check_fits
from jaxldm.pipelines.latents import encode_images
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.resizing import fit_mask, nearest_size, one_by_one, resize_picture, size_of
from jaxldm.reading import shortened, shown

Size = tuple[int, int]  # (height, width)
INPAINTING_CHANNELS = 9  # latents, mask, latents of the masked image
OF_A_START = ("mask_image", "strength")  # options that a network which takes `image` besides x has no use for


class LatentSpec(NamedTuple):
    """The latents that a denoising network draws, and the images that they stand for.

    Attributes:
        default_size: (height, width) in pixels of the images that the model was trained on.
        multiple: what heights and widths are divisible by: the pixels that a token or latent covers.
        factor: pixels that a latent is high and wide; not a whole number in Wuerstchen's prior.
        channels: of the latents; 3 where they are pixels.
        takes_mask: the network was trained for inpainting and takes the mask.
        image_factor: of a network that takes `image` besides x, and does not start from it: how many times
            larger than that picture the images are that it draws; 0 where they may have any size, and there
            may be none.
    """

    default_size: Size
    multiple: int
    factor: float
    channels: int
    takes_mask: bool = False
    image_factor: float | None = None

    def shape(self, size: Size) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of that (height, width)."""
        return ceil_quotient(size[0], self.factor), ceil_quotient(size[1], self.factor), self.channels


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Latents to start from in place of an image: `pipe(key, prompt, image=Latents(z), strength=0.5)`.

    An array given as `image` is pixels, whatever its shape.

    Attributes:
        array: [h, w, c] or [N, h, w, c], scaled as a call with `output="latents"` returns them.
    """

    array: Any


class Inputs(NamedTuple):
    """What a call starts from, checked and not yet encoded; None is what was not given.

    Attributes:
        size: (height, width) of the images.
        image: [N or 1, H, W, 3] in [-1, 1], or latents [N or 1, h, w, c].
        mask: [N or 1, H, W, 1], 1 where the image is drawn again.
        latents: [N, h, w, c], x at the first row; or tokens [N, h, w].
        image_is_latents: whether `image` is.
        further: more pictures that the network takes besides x, each the `image` of one of these.
    """

    size: Size
    image: Float[np.ndarray, "N H W C"] | None = None
    mask: Float[np.ndarray, "N H W 1"] | None = None
    latents: Float[np.ndarray, "N h w c"] | Int[np.ndarray, "N h w"] | None = None
    image_is_latents: bool = False
    further: tuple[Inputs, ...] = ()


class InitialLatents(NamedTuple):
    """Where the sampling loop starts; arrays have a row for each of N images. All None: pure noise.

    Attributes:
        latents: [N, h, w, c], x at the first row.
        image: [N, h, w, c], latents to be noised.
        known: [N, h, w, c], latents to be kept where `repaint` [N, h, w, 1] is 0.
        extra_channels: [N, h, w, e], what the network takes besides x: a mask, a picture.
        uncond_channels: the same of the unconditional branch, where it differs: a branch of the picture
            alone, without the text, then stands between the two.
        reference: [N, h', w', c], latents of a picture of any size that the network takes besides x; or of
            several, each of its own size.
    """

    latents: Float[np.ndarray, "N h w c"] | None = None
    image: Float[np.ndarray, "N h w c"] | None = None
    known: Float[np.ndarray, "N h w c"] | None = None
    repaint: Float[np.ndarray, "N h w 1"] | None = None
    extra_channels: Float[np.ndarray, "N h w e"] | None = None
    uncond_channels: Float[np.ndarray, "N h w e"] | None = None
    reference: Float[np.ndarray, "N h2 w2 c"] | tuple[Float[np.ndarray, "N _ _ c"], ...] | None = None


def read_inputs(
    spec: LatentSpec,
    num_images: int,
    *,
    height: int | None = None,
    width: int | None = None,
    image: Any = None,
    mask_image: Any = None,
    latents: Any = None,
    resize: str | None = None,
) -> Inputs:
    """The inputs of a call, checked against each other and the model.

    Args:
        resize: as in `Call`.

    Raises:
        InvalidArgumentError: arguments that exclude or need each other, or a size that does not fit.
        DataError: arrays that are no images, masks or latents.
    """
    _check_together(spec, image, mask_image, latents)
    if resize is not None:
        height, width, image, mask_image = _resized(spec, resize, height, width, image, mask_image)
    mask, given, image_is_latents = None, {}, isinstance(image, Latents)
    if image is not None:
        image = (
            four_axes(image.array, spec.channels, "image=Latents")
            if image_is_latents
            else rgb_pixels(image, LATENTS)
        )
        check_rows(image, num_images, "image")
        of_latents = spec.factor if image_is_latents else 1
        given["image"] = tuple(floor_product(n, of_latents, spec.image_factor or 1) for n in image.shape[1:3])
    if latents is not None:
        latents = four_axes(latents, spec.channels)
        check_rows(latents, num_images, "latents")
        given["latents"] = tuple(floor_product(n, spec.factor) for n in latents.shape[1:3])
    trained = spec.default_size
    if spec.image_factor == 0 and image is not None:
        trained = given.pop("image")
        check_size(trained[0], trained[1], spec.multiple, name="image")
    size = _size(height, width, trained, given)
    check_size(*size, spec.multiple)
    check_images_fit(num_images, size, spec)
    latents = None if latents is None else repeated(latents, num_images)
    if mask_image is not None:
        mask = as_masks(mask_image, size)
        check_rows(mask, num_images, "mask_image")
    if spec.takes_mask and image_is_latents:
        raise InvalidArgumentError("this inpainting network takes the masked pixels: give image as pixels")
    return Inputs(size, image, mask, latents, image_is_latents)


def initial_latents(
    spec: LatentSpec, vae: Network | None, inputs: Inputs, num_images: int, strength: float | None
) -> InitialLatents:
    """Where N images start. Without an autoencoder pixels are the latents.

    Args:
        strength: from `strength_of`.
    """
    image, mask, latents = inputs.image, inputs.mask, inputs.latents
    if image is None:
        return InitialLatents(latents)
    is_latents = inputs.image_is_latents or vae is None
    code = repeated(image if is_latents else encode_images(cast(Network, vae), image), num_images)
    if mask is None:
        return InitialLatents(image=code)
    repaint = repeated(shrink_masks(mask, int(spec.factor)), num_images)
    # At strength 1 the start is pure noise, as such networks were trained.
    start = InitialLatents(latents, code if cast(float, strength) < 1 and latents is None else None)
    if not spec.takes_mask:
        return start._replace(known=code, repaint=repaint)
    kept = repeated(encode_images(cast(Network, vae), image * (mask < 0.5)), num_images)
    return start._replace(extra_channels=np.concatenate([repaint, kept], axis=-1))


def taken_latents(vae: Network | None, inputs: Inputs, num_images: int) -> Float[np.ndarray, "N h w c"]:
    """The latents of the picture that a network takes besides x, scaled, for each image."""
    image = cast(np.ndarray, inputs.image)
    is_latents = inputs.image_is_latents or vae is None
    return repeated(image if is_latents else encode_images(cast(Network, vae), image), num_images)


def strength_of(image: Any, strength: float | None, mask_image: Any, default_strength: float) -> float | None:
    """Which part of the grid is used: as given, or the default; None, all of it, without an image.

    Raises:
        InvalidArgumentError: a strength outside (0, 1], or without an image.
    """
    if image is None:
        if strength is not None:
            raise InvalidArgumentError(
                "strength is how far to move from an image: give image, or no strength"
            )
        return None
    if strength is None:
        return default_strength if mask_image is None else 1.0
    if not 0 < strength <= 1:
        raise InvalidArgumentError(f"strength must lie in (0, 1], not {strength}")
    return strength


def _check_together(spec: LatentSpec, image: Any, mask_image: Any, latents: Any) -> None:
    if mask_image is not None and image is None:
        raise InvalidArgumentError("mask_image marks the part of image= to draw again: give image, too")
    if spec.image_factor is not None:
        _check_taken(spec, image)
    elif latents is not None and image is not None and mask_image is None:
        raise InvalidArgumentError("image and latents are both a start: give one of them")
    if spec.takes_mask and mask_image is None:
        raise InvalidArgumentError("this network was trained for inpainting: give image and mask_image")


def _check_taken(spec: LatentSpec, image: Any) -> None:
    """Raise `InvalidArgumentError` unless there is the picture that the network needs."""
    if image is None and spec.image_factor != 0:
        raise InvalidArgumentError(
            "this model draws from a picture: give image=, the picture to change (--image FILE)"
        )


def _resized(
    spec: LatentSpec, how: str, height: int | None, width: int | None, image: Any, mask_image: Any
) -> tuple[int, int, Any, Any]:
    """(height, width, image, mask_image), pictures and masks resized to that height and width."""
    if (spec.image_factor or 1) != 1:
        raise InvalidArgumentError(
            f"resize={how!r} is for pictures of the size to draw, and this model enlarges: leave it out"
        )
    if image is None or isinstance(image, Latents):
        raise InvalidArgumentError(f"resize={how!r} is for image= in pixels: give one, or leave resize out")
    pictures = one_by_one(image, 3)
    for each in pictures:
        if not is_picture(each):
            rgb_pixels(each, LATENTS)  # refuses what is none
    sizes = [size_of(each) for each in pictures]
    nearest = nearest_size(sizes[0], spec.multiple)
    target = nearest[0] if height is None else height, nearest[1] if width is None else width
    check_size(*target, spec.multiple)
    check_images_fit(len(pictures), target, spec)
    image = np.stack([resize_picture(each, target, how) for each in pictures])
    if mask_image is None:
        return *target, image, None
    masks = one_by_one(mask_image, 2)
    pairs = zip(masks, sizes if len(sizes) == len(masks) else sizes[:1] * len(masks), strict=True)
    masks = [fit_mask(_without_colours(mask, size), size, target, how) for mask, size in pairs]
    return *target, image, np.stack(masks)


NUMBERS = numbers("real", "[N, h, w, c]", axes=(3, 4))


def four_axes(array: Any, channels: int, name: str = "latents") -> Float[np.ndarray, "N h w c"]:
    """Finite numbers [N, h, w, channels] out of these or of [h, w, channels].

    Raises:
        InvalidArgumentError: another shape, NaN or infinity.
    """
    array = np.asarray(NUMBERS(name, array), np.float32)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] != channels or 0 in array.shape:
        raise InvalidArgumentError(
            f"{name} must be [N, h, w, {channels}], channels last, not {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise InvalidArgumentError(f"{name} hold NaN or infinity")
    return array


LATENTS = ", or if these are latents image=pipelines.Latents(array)"


def rgb_pixels(image: Any, or_else: str = "") -> Float[np.ndarray, "N H W 3"]:
    """`as_images` of pictures of three channels.

    Raises:
        InvalidArgumentError: arrays of another number of channels; `or_else` is what they may be.
        DataError: shapes or values that are no images.
    """
    for each in image if isinstance(image, (list, tuple)) else [image]:
        shape = (3,) if is_picture(each) else np.shape(each)
        if len(shape) in (3, 4) and shape[-1] != 3:
            raise InvalidArgumentError(
                f"image must have 3 channels (RGB), it has {shape[-1]}: give RGB pixels{or_else}"
            )
    return as_images(image)


def _size(height: int | None, width: int | None, trained: Size, given: dict[str, Size]) -> Size:
    """(height, width) as requested, or that of what was given, or the one of the training.

    Args:
        given: name -> (height, width) of the arrays that were handed in.
    """
    otherwise = next(iter(given.values()), trained)
    pairs = zip((height, width), otherwise, strict=True)
    size = cast(Size, tuple(known if wanted is None else wanted for wanted, known in pairs))
    for name, found in given.items():
        if found != size:
            raise InvalidArgumentError(
                f"{name} is {found[0]}x{found[1]} pixels (height x width), not {size[0]}x{size[1]}: resize "
                "it, or leave height and width out"
            )
    return size


@checked(height=count(1), width=count(1), multiple=count(1), name=text)
def check_size(height: int, width: int, multiple: int, name: str = "") -> None:
    """Raises `InvalidArgumentError`, with the nearest sizes, unless both are multiples of `multiple`.

    Args:
        name: of the picture that has this size, for the message.

    >>> check_size(512, 768, 8)
    """
    for side, size in (("height", height), ("width", width)):
        below = size // multiple * multiple
        if below != size:
            nearest = f"{below} and {below + multiple}" if below else f"{multiple}"
            raise InvalidArgumentError(
                f"{name} {side} {size}".lstrip()
                + f" is not divisible by {multiple}, as this model needs: the nearest is {nearest}"
            )


def check_images_fit(num_images: int, size: Size, spec: LatentSpec) -> None:
    """Raises `InvalidArgumentError` where the images and their latents, in float32, are more than memory."""
    channels = spec.channels if spec.factor == 1 else 1  # 3 in most models
    numbers = size[0] * size[1] * channels + math.prod(spec.shape(size))
    check_fits(
        4 * num_images * numbers,
        f"{shown(num_images)} images of {shown(size[0])}x{shown(size[1])} pixels need",
        "draw fewer at a time, or smaller ones",
    )


@checked(name=text)
def as_images(images: Any, name: str = "image") -> Float[np.ndarray, "N H W C"]:
    """Pictures as float32 [N, H, W, C] in [-1, 1].

    Args:
        images: one or several, [H, W, C] or [N, H, W, C]: 8-bit pixels, or floats in [-1, 1]; PIL images,
            which become RGB whatever their mode; or a list of arrays and PIL images.

    Raises:
        DataError: shapes or values that are no images.
    """
    if isinstance(images, (str, os.PathLike)):
        raise InvalidArgumentError(
            f"{name} must be a picture, got the path {shown(images)}: write PIL.Image.open({name})"
        )
    images = _stacked(images, lambda image: _floats(image, name), name)
    images = images[None] if images.ndim == 3 else images
    return check_images(images, name=name)


def _floats(image: Any, name: str) -> np.ndarray:
    """A picture in [-1, 1], where its type says what its numbers mean; else as it is, to be refused."""
    if is_picture(image):
        return rgb_of(image, name=name)
    image = np.asarray(image)
    return from_uint8(image) if image.dtype == np.uint8 else image


@checked(size=pair(1))
def as_masks(masks: Any, size: tuple[int, int]) -> Float[np.ndarray, "N H W 1"]:
    """Masks as float32 [N, H, W, 1]: 1 where the mask is white (half or more), 0 elsewhere.

    Args:
        masks: [H, W], [H, W, 1], [N, H, W] or [N, H, W, 1]: booleans, 0 and 1, 8-bit pixels, floats in
            [0, 1]; with three or four channels where their pixels are grey and opaque; PIL images in black
            and white, of any mode (palette, RGB, RGBA); or a list of these.
        size: (H, W), of the image that they belong to.

    Raises:
        DataError: another size, another number of channels, or values out of range.
    """
    masks = _stacked(masks, lambda mask: mask_of(_without_colours(mask, size)), "mask_image")
    if masks.shape == (*size, 1):
        masks = masks[None]
    if masks.ndim == 2:
        masks = masks[None]
    if masks.ndim == 3:
        masks = masks[..., None]
    if masks.ndim != 4 or masks.shape[1:] != (*size, 1):
        raise DataError(
            f"mask_image must be {size[0]}x{size[1]} (height x width, as the image) with one channel, "
            f"got shape {list(masks.shape)}"
        )
    return masks.astype(np.float32)


def _without_colours(mask: Any, size: Size) -> Any:
    """A mask, or N of them, of RGB or RGBA pixels as levels; everything else as it is."""
    if is_picture(mask) or np.shape(mask)[-3:] not in ((*size, 3), (*size, 4)):
        return mask
    mask = np.asarray(mask)
    levels = [grey_pixels(each) for each in mask.reshape(-1, *mask.shape[-3:])]
    return np.stack(levels).reshape(mask.shape[:-1])


def check_rows(rows: Shaped[np.ndarray, "N ..."] | Sequence[Any], num_images: int, name: str) -> None:
    """Raises `InvalidArgumentError` unless there is one row for all images, or one for each."""
    if len(rows) not in (1, num_images):
        raise InvalidArgumentError(
            f"{len(rows)} arrays in {name}, but {num_images} images to draw: give one for all or one each"
        )


def repeated(rows: Shaped[np.ndarray, "N ..."], num_images: int) -> Shaped[np.ndarray, "{num_images} ..."]:
    """`num_images` rows out of one for all, or one for each."""
    return np.broadcast_to(rows, (num_images, *rows.shape[1:]))


def _stacked(images: Any, read: Callable[[Any], np.ndarray], name: str) -> np.ndarray:
    several = isinstance(images, (list, tuple))
    try:
        arrays = [read(image) for image in images] if several else [read(images)]
    except JaxldmError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} must hold pictures: {error}") from error
    shapes = dict.fromkeys(array.shape for array in arrays)
    if len(shapes) > 1:
        sizes = shortened(", ".join(str(list(shape)) for shape in shapes), 100)
        raise DataError(
            f"{name} holds pictures of different sizes, {sizes}: give them in one size, or give "
            "resize='crop', 'pad' or 'stretch'"
        )
    if not arrays or arrays[0].dtype == object or arrays[0].size == 0:
        raise DataError(f"{name} must hold pictures, not {type(images).__name__}")
    return np.stack(arrays) if several else arrays[0]
