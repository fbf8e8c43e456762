"""SiT (Ma et al. 2024): DiT's network, trained to predict the velocity of a stochastic interpolant."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float, Int, Num

from jaxldm.models.denoising_network import FROM_NOISE_TO_DATA, Convention
from jaxldm.models.dit import PATCH_SIZES, SIZES, DiT, DiTConfig
from jaxldm.nn.token_merging import TokenMerging


@dataclasses.dataclass(frozen=True)
class SiTConfig(DiTConfig):
    """Config of `SiT`: that of `DiT`, and the same parameters.

    Attributes:
        learn_sigma: the last layer has 2 x in_channels outputs, as published; the second half is ignored.
    """

    @property
    def out_channels(self) -> int:
        """Channels of the output: those of the velocity."""
        return self.in_channels


class SiT(DiT):
    """The velocity of an interpolant by a diffusion transformer. Ma et al. 2024, section 2.1 and 3.

    Parameters and inputs are those of `DiT`, but t and sign are as published: t `[B]` in [0, 1] is 0 at noise
    and 1 at data, and the output `[B, H, W, in_channels]` points from noise to data. `models.network` has the
    t and sign of this library's paths.

    >>> import jax, jax.numpy as jnp
    >>> from jaxldm import models
    >>> sit = models.build("sit-xl-2")
    >>> x, t, labels = jnp.zeros((2, 32, 32, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    >>> jax.eval_shape(sit.apply, {"params": models.shapes(sit)}, x, t, labels).shape
    (2, 32, 32, 4)
    """

    config: SiTConfig
    token_merging: TokenMerging | None = None

    convention: ClassVar[Convention] = FROM_NOISE_TO_DATA

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        guidance_scale: Num[Array, " B"] | None = None,
        step_size: Num[Array, " B"] | None = None,
        train: bool = False,
        kept: Int[Array, "B k"] | None = None,
    ) -> Float[Array, "B H W C"]:
        output = super().__call__(x, t, labels, guidance_scale, step_size, train, kept)
        return output[..., : x.shape[-1]]


PRESETS = {
    f"sit-{size}-{patch}": SiTConfig(patch_size=patch, scan=True, **widths)
    for size, widths in SIZES.items()
    for patch in PATCH_SIZES
}
