"""The vector-quantised autoencoder of VQ-GAN, latent diffusion and aMUSEd: `VQModel` of diffusers."""

from __future__ import annotations

import dataclasses
from typing import cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxldm.arguments import a_params, array, checked, instance
from jaxldm.errors import one_of
from jaxldm.models.autoencoder import IMAGES
from jaxldm.models.autoencoder_kl import Decoder, Encoder, ImageAutoencoderConfig
from jaxldm.models.config import check, check_groups
from jaxldm.models.inputs import fitting, image_shape
from jaxldm.nn.convolution import Conv2d
from jaxldm.nn.initialization import fan_in_uniform
from jaxldm.nn.linear import Embedding

SPATIAL_GROUPS = 32  # of spatial norms, whatever the config says of the others


@dataclasses.dataclass(frozen=True)
class VQModelConfig(ImageAutoencoderConfig):
    """Config of `VQModel`; names and defaults are those of diffusers.

    Attributes:
        num_vq_embeddings, vq_embed_dim: entries of the codebook and their width; None: `latent_channels`.
        lookup_from_codebook: the generative model predicts indices (aMUSEd), not latents (latent diffusion).
        norm_type: of the decoder, "group", or "spatial" for normalisation by the latents, as in Kandinsky 2.
    """

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    lookup_from_codebook: bool = False
    norm_type: str = "group"

    def check_values(self) -> None:
        super().check_values()
        if one_of("norm_type", self.norm_type, ("group", "spatial")) == "spatial":
            check_groups(self.block_out_channels, SPATIAL_GROUPS)
        check(self.num_vq_embeddings > 0, "the codebook needs entries: num_vq_embeddings must be positive")

    @property
    def codebook_width(self) -> int:
        """Width of the codebook's entries."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


def nearest_entries(z: Float[Array, "*rows c"], table: Float[Array, "K c"]) -> Int[Array, "*rows"]:
    """The index of the entry nearest to each z, from |e|^2 - 2 z e; |z|^2 is the same for all entries."""
    table = table.astype(jnp.float32)
    products = jnp.einsum("...c,kc->...k", z.astype(jnp.float32), table, precision="highest")
    lengths = jnp.square(table).sum(-1).reshape((1,) * (z.ndim - 1) + (-1,))
    return jnp.argmin(lengths - 2.0 * products, axis=-1).astype(jnp.int32)


class VectorQuantizer(nn.Module):
    """A codebook `[num_embeddings, features]` in float32, parameter `embedding`, initialised as in diffusers.

    van den Oord et al. 2017, eq. 1-2: the index of z is argmin_k |z - e_k|.
    """

    num_embeddings: int
    features: int

    def setup(self):
        init = fan_in_uniform(self.num_embeddings**2)  # U(-1/K, 1/K)
        self.embedding = Embedding(self.num_embeddings, self.features, embedding_init=init)

    def indices(self, z: Float[Array, "B h w c"]) -> Int[Array, "B h w"]:
        """The nearest entry of each z."""
        return nearest_entries(z, self.embedding(jnp.arange(self.num_embeddings)))

    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """The nearest entries; gradients pass straight through to z."""
        nearest = self.embedding(self.indices(z)).astype(z.dtype)
        return z + jax.lax.stop_gradient(nearest - z)


class VQModel(nn.Module):
    """Convolutional autoencoder whose latents are entries of a codebook. Esser et al. 2021, section 3.1.

    `encode`: images `[B, H, W, in_channels]` in [-1, 1] -> latents `[B, h, w, codebook width]` before the
    codebook, not scaled, h = H / 2^(levels - 1). `decode`: such latents -> nearest entries -> images, about
    [-1, 1]; with `quantize=False` the latents themselves, as Kandinsky 2 does. `encode_indices` and
    `decode_indices` are the same with indices, int32 `[B, h, w]`. The call is decode(encode(x)), to
    initialise parameters.
    """

    config: VQModelConfig

    def setup(self):
        config = self.config.upcast()
        one_by_one = {"kernel_size": 1, "padding": 0, "dtype": config.dtype}
        self.encoder = Encoder(config, config.latent_channels)
        self.quant_conv = Conv2d(config.codebook_width, **one_by_one)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.codebook_width)
        self.post_quant_conv = Conv2d(config.latent_channels, **one_by_one)
        self.decoder = Decoder(config)

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return self.quant_conv(self.encoder(x)).astype(x.dtype)

    def decode(self, z: Float[Array, "B h w c"], quantize: bool = True) -> Float[Array, "B H W C"]:
        chex.assert_shape(z, (None, None, None, self.config.codebook_width))
        return self._decode(self.quantize(z) if quantize else z).astype(z.dtype)

    def _decode(self, entries: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        latents = entries if self.config.norm_type == "spatial" else None
        return self.decoder(self.post_quant_conv(entries), latents)

    def encode_indices(self, x: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
        chex.assert_shape(x, (None, None, None, self.config.in_channels))
        return self.quantize.indices(self.quant_conv(self.encoder(x)))

    def decode_indices(self, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
        chex.assert_rank(indices, 3)
        entries = self.quantize.embedding(indices)
        return self._decode(entries).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W out"]:
        return self.decode(self.encode(x))

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shape of the images that `init` traces the model with."""
        return image_shape(self.config)


A_VQ_MODEL = instance(VQModel, "a module such as models.build('ldm-vq-f4')")


@checked(module=A_VQ_MODEL, params=a_params, images=IMAGES)
def encode_indices(module: VQModel, params: dict, images: Float[Array, "B H W C"]) -> Int[Array, "B h w"]:
    """Images in [-1, 1] -> the index of each latent's nearest codebook entry, in [0, num_vq_embeddings)."""
    with fitting(module):
        return cast(Array, module.apply({"params": params}, images, method="encode_indices"))


@checked(module=A_VQ_MODEL, params=a_params, indices=array("whole", "[B, h, w]", axes=3, filled=True))
def decode_indices(module: VQModel, params: dict, indices: Int[Array, "B h w"]) -> Float[Array, "B H W C"]:
    """The codebook's entries at `indices` -> images, about [-1, 1], float32.

    Raises:
        InvalidArgumentError: an index outside the codebook, such as aMUSEd's mask token; inside of jit it
            cannot be seen, and gives the nearest entry.
    """
    with fitting(module):
        return cast(Array, module.apply({"params": params}, indices, method="decode_indices"))


_LDM = VQModelConfig(sample_size=256, layers_per_block=2, scaling_factor=1.0)

PRESETS = {
    # First stages of the model zoo of latent diffusion, trained without a scaling factor.
    "ldm-vq-f4": dataclasses.replace(
        _LDM,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        num_vq_embeddings=8192,
    ),
    "ldm-vq-f8": dataclasses.replace(
        _LDM,
        block_out_channels=(128, 256, 256, 512),
        down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        latent_channels=4,
        num_vq_embeddings=16384,
    ),
    "kandinsky2-movq": VQModelConfig(
        block_out_channels=(128, 256, 256, 512),
        down_block_types=(*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16384,
        vq_embed_dim=4,
        norm_type="spatial",
    ),
    "amused-vq": VQModelConfig(
        block_out_channels=(128, 256, 256, 512, 768),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=2,
        latent_channels=64,
        num_vq_embeddings=8192,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        force_upcast=True,
    ),
}
