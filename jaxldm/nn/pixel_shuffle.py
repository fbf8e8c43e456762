"""Space to depth and back in the order of PyTorch: the channels of one pixel lie together."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxldm.errors import InvalidArgumentError


def pixel_unshuffle(
    images: Float[Array, "B H W C"], factor: int
) -> Float[Array, "B h w C*{factor}*{factor}"]:
    """Squares of pixels -> channels: pixel (i, j) of a square, channel c, becomes channel (c f + i) f + j.

    It is `torch.nn.PixelUnshuffle`; `patchify` puts the channel last instead. The inverse is `pixel_shuffle`.

    Raises:
        InvalidArgumentError: H or W is not a multiple of the factor.
    """
    batch, height, width, channels = images.shape
    f = factor
    if height % f or width % f:
        raise InvalidArgumentError(f"images of {height}x{width} cannot be cut into whole {f}x{f} squares")
    x = images.reshape(batch, height // f, f, width // f, f, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // f, width // f, channels * f * f)


def pixel_shuffle(images: Float[Array, "B h w D"], factor: int) -> Float[Array, "B H W C"]:
    """Channels -> squares of pixels: the inverse of `pixel_unshuffle` (Shi et al. 2016, equation 4).

    Raises:
        InvalidArgumentError: the channels cannot be split into squares.
    """
    batch, height, width, channels = images.shape
    f = factor
    if channels % (f * f):
        raise InvalidArgumentError(f"{channels} channels cannot be laid out as {f}x{f} squares")
    x = images.reshape(batch, height, width, channels // (f * f), f, f).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height * f, width * f, channels // (f * f))
