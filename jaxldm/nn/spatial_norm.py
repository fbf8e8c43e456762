"""Normalisation that latents scale and shift pixel by pixel, as in MoVQ."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.normalization import GroupNorm
from jaxldm.nn.resizing import resize_nearest


class SpatialNorm(nn.Module):
    """group_norm(x) conv_y(z) + conv_b(z), with latents z at the size of x by nearest neighbour.

    Zheng et al. 2022 (MoVQ, arXiv:2209.09002), eq. 3. x `[B, H, W, C]`, z `[B, h, w, c]` -> the shape of x.
    """

    num_groups: int = 32
    eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        normal = GroupNorm(self.num_groups, self.eps, self.dtype, name="norm_layer")(x)
        _, height, width, channels = x.shape
        scale, shift = (
            resize_nearest(Conv2d(channels, 1, padding=0, dtype=self.dtype, name=name)(z), (height, width))
            for name in ("conv_y", "conv_b")
        )
        return normal * scale + shift
