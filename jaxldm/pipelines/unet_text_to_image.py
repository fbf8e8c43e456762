"""What the U-Nets of Stable Diffusion share beside `TextToImage`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxldm.errors import CheckpointError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.starts import INPAINTING_CHANNELS
from jaxldm.pipelines.text_to_image import TextToImage


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UNetTextToImage(TextToImage):
    """A U-Net on the latents of an autoencoder.

    Attributes:
      unet: the denoising network.
      vae: the autoencoder.
    """

    unet: Network
    vae: Network

    denoiser_name: ClassVar[str] = "unet"
    family: ClassVar[str] = ""

    @property
    def saved_class_name(self) -> str:
        """Inpainting networks have a class of their own there, and so have those that know guidance."""
        if self.network_channels == INPAINTING_CHANNELS:
            return f"{self.family}InpaintPipeline"
        return "LatentConsistencyModelPipeline" if self.knows_guidance else f"{self.family}Pipeline"

    def check_parts(self) -> None:
        """The texts' states and the latents must be as wide as the U-Net takes them.

        Raises:
          CheckpointError: parts of different models.
        """
        unet = self.unet.config
        encoders = [part for name, part in self.networks.items() if name.startswith("text_encoder")]
        width = sum(encoder.config.hidden_size for encoder in encoders)
        if width != unet.cross_attention_dim:
            raise CheckpointError(
                f"its text encoders give states {width} wide, its U-Net takes {unet.cross_attention_dim}"
            )
        if unet.out_channels != self.latent_channels:
            raise CheckpointError(
                f"its autoencoder has {self.latent_channels} latent channels, its U-Net draws "
                f"{unet.out_channels}"
            )
