"""Resizing of images and feature maps by interpolation, as two small matrix products."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxldm.arguments import array, checked, pair

IMAGES = array("real", "[B, H, W, C]", axes=4, filled=True)


@checked(x=IMAGES, size=pair(1, 2**16))
def resize_cubic(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """x at another size by antialiased cubic interpolation, float32. `[B, H, W, C]` -> `[B, h, w, C]`.

    It is PyTorch's `interpolate(mode="bicubic", antialias=True, align_corners=True)`, on which Wuerstchen's
    decoder was trained; see `cubic_weights`.
    """
    return _resized(x, *(cubic_weights(x.shape[axis + 1], size[axis]) for axis in (0, 1)))


@checked(x=IMAGES, size=pair(1, 2**16))
def resize_linear(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """x at another size by linear interpolation, float32. `[B, H, W, C]` -> `[B, h, w, C]`.

    The corners keep their values, as in PyTorch's `interpolate(mode="bilinear", align_corners=True)`; not
    antialiased, so only for larger sizes.
    """
    return _resized(x, *(linear_weights(x.shape[axis + 1], size[axis]) for axis in (0, 1)))


@checked(x=IMAGES, size=pair(1, 2**16))
def resize_nearest(x: Shaped[Array, "B H W C"], size: tuple[int, int]) -> Shaped[Array, "B h w C"]:
    """x at another size, each pixel that of its upper left corner. `[B, H, W, C]` -> `[B, h, w, C]`.

    It is PyTorch's `interpolate(mode="nearest")`.
    """
    for axis, wanted in enumerate(size, 1):
        length = x.shape[axis]
        if wanted != length:
            x = jnp.take(x, np.arange(wanted) * length // wanted, axis=axis)
    return x


def _resized(
    x: Float[Array, "B H W C"], rows: Float[np.ndarray, "P H"], columns: Float[np.ndarray, "Q W"]
) -> Float[Array, "B P Q C"]:
    x = jnp.einsum("ph,bhwc->bpwc", jnp.asarray(rows), x.astype(jnp.float32), precision="highest")
    return jnp.einsum("qw,bpwc->bpqc", jnp.asarray(columns), x, precision="highest")


@functools.lru_cache
def linear_weights(length: int, wanted: int) -> Float[np.ndarray, "wanted length"]:
    """Weight of each of `length` samples in each of `wanted` ones, from first to last; float32."""
    places = np.linspace(0, length - 1, wanted)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(length)), 0).astype(np.float32)


@functools.lru_cache
def cubic_weights(length: int, wanted: int) -> Float[np.ndarray, "wanted length"]:
    """Weight of each of `length` samples in each of `wanted` ones; float32, every row sums to 1.

    Keys 1981, with a = -1/2, stretched by the step when downsampling. As in PyTorch, the step is
    (length - 1) / (wanted - 1), as for aligned corners, but samples are counted from the centre of the first
    one, as for corners that are not aligned: both ends of the result are slightly off.
    """
    step = (length - 1) / (wanted - 1) if wanted > 1 else 0.0
    stretch = max(step, 1.0)
    centres = step * (np.arange(wanted) + 0.5)
    weights = np.zeros((wanted, length))
    for row, centre in enumerate(centres):
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), length)
        weights[row, first:last] = _cubic((np.arange(first, last) - centre + 0.5) / stretch)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(x: Float[np.ndarray, " *shape"], a: float = -0.5) -> Float[np.ndarray, " *shape"]:
    """The cubic kernel of Keys 1981, equation 4 with another a: 1 at 0, and 0 from |x| = 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
