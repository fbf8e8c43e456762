"""How images get to the 299 x 299 pixels of FID's network: three ways, and so three metrics.

| variant | of | resizing | numbers |
|---|---|---|---|
| `tf1` | TensorFlow, torch-fidelity, ADM | bilinear from the corner, not antialiased | (x - 128) / 128 |
| `pytorch` | pytorch-fid | bilinear from the centre, not antialiased | x / 127.5 - 1 |
| `clean` | clean-fid | Pillow's bicubic, antialiased, in floats | (x - 128) / 128 |

The same images have another FID in each. Parmar et al. 2022, "On Aliased Resizing".
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxldm.arguments import array, checked, choice
from jaxldm.pixels import as_pixels

VARIANTS = ("tf1", "pytorch", "clean")
SIDE = 299


@checked(images=array("any", "[B, H, W, 3]", axes=4, filled=True), variant=choice("resize variant", VARIANTS))
def inception_inputs(
    images: UInt8[np.ndarray, "B H W 3"], variant: str = "tf1"
) -> Float[Array, "B 299 299 3"]:
    """Return 8-bit images resized and scaled for FID's network, as the named program does it.

    Args:
        images: red, green, blue.
        variant: a name in `VARIANTS`.

    Raises:
        UnknownNameError: another variant.
        InvalidArgumentError: images of another dtype or shape.
    """
    images = as_pixels(images)
    if variant == "clean":
        return (jnp.asarray(_bicubic(images)) - 128) / 128
    x = jnp.asarray(images).astype(jnp.float32)
    rows, columns = (bilinear_weights(length, SIDE, variant == "pytorch") for length in images.shape[1:3])
    # Rows first: then the second product is the larger one, with many columns.
    x = jnp.einsum("ph,bhwc->bpwc", jnp.asarray(rows), x, precision="highest")
    x = jnp.einsum("qw,bpwc->bpqc", jnp.asarray(columns), x, precision="highest")
    return x / 127.5 - 1 if variant == "pytorch" else (x - 128) / 128


@functools.lru_cache
def bilinear_weights(length: int, wanted: int, half_pixel: bool) -> Float[np.ndarray, "wanted length"]:
    """Return the weight of each of `length` pixels in each of `wanted` ones, float32; rows add up to 1.

    Pixel i lies at i s, s = length / wanted, as in TensorFlow 1's resize_bilinear, or with `half_pixel` at
    (i + 1/2) s - 1/2, as in PyTorch's interpolate(align_corners=False).
    """
    step = np.float32(length) / np.float32(wanted)
    places = np.arange(wanted, dtype=np.float32) * step
    if half_pixel:
        # One rounding, as that of the multiply-and-add which PyTorch is compiled to.
        places = np.maximum((np.arange(wanted) + 0.5) * float(step) - 0.5, 0).astype(np.float32)
    low = np.minimum(places.astype(np.int64), length - 1)
    share = places - low.astype(np.float32)
    weights = np.zeros((wanted, length), np.float32)
    np.add.at(weights, (np.arange(wanted), low), 1 - share)
    np.add.at(weights, (np.arange(wanted), np.minimum(low + 1, length - 1)), share)
    return weights


def _bicubic(images: np.ndarray) -> Float[np.ndarray, "B 299 299 3"]:
    """Return each channel resized by Pillow as floats, cut to [0, 255]."""
    from PIL import Image

    def resized(channel: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(channel, np.float32))
        return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255)

    return np.stack([np.stack([resized(image[..., c]) for c in range(3)], axis=-1) for image in images])
