"""PixArt-Sigma and PixArt-Alpha (Chen et al. 2024, arXiv:2403.04692; 2023, arXiv:2310.00426).

pipe = pipelines.load("PixArt-Sigma-XL-2-1024-MS", dtype="bfloat16")
height, width = pipe.nearest_size(1080, 1920)   # (768, 1344), which the model was trained on
images = pipe(key, "a small cactus with a happy face", height=height, width=width)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.latent_images import scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import encode_texts
from jaxldm.pipelines.text_to_image import TextToImage

Size = tuple[int, int]

# (height, width) of the pictures that the published models were trained on, in 1/32 of the model's side.
TRAINED_SIZES: tuple[Size, ...] = (
    *((16, 64), (16, 58), (18, 56), (18, 54), (18, 52), (20, 50), (20, 48), (22, 46), (22, 44), (22, 42)),
    *((24, 42), (24, 40), (26, 38), (26, 36), (28, 36), (28, 34), (30, 34), (30, 32), (32, 32), (32, 30)),
    *((34, 30), (34, 28), (36, 28), (36, 26), (38, 26), (40, 24), (42, 24), (44, 22), (46, 22), (48, 20)),
    *((50, 20), (54, 18), (64, 16)),
)
# Those that the model for 2048x2048 pixels has besides.
MORE_TRAINED_SIZES = ((16, 62), (16, 60), (52, 18), (56, 18), (58, 16), (60, 16), (62, 16))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PixArtSigma(TextToImage):
    """A transformer on latents that looks at the states of T5; the variance that it learned is not used.

    Pictures are drawn at exactly the height and width of the call, multiples of 16. The pipeline of diffusers
    draws at the nearest size of the training and then scales and cuts the picture; here that size is
    `nearest_size`, and the caller's choice.

    Attributes:
      transformer: the denoising network.
      vae: the autoencoder, SDXL's in the published models.
      text_encoder, tokenizer: T5-XXL's encoder.
    """

    transformer: Network
    vae: Network
    text_encoder: Network
    tokenizer: Any

    class_names: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    default_guidance_scale: ClassVar[float] = 4.5
    default_num_inference_steps: ClassVar[int] = 20
    max_sequence_length: ClassVar[int] = 300

    @property
    def size_multiple(self) -> int:
        """Pixels that a token is high and wide."""
        return scale_factor(self.vae) * self.transformer.config.patch_size

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: Size,
        *,
        max_sequence_length: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """T5's states and their mask; where there is no negative prompt, those of the empty text.

        The model was trained on texts in small letters, so they are made small. URLs, HTML and the like,
        which diffusers takes out where two more packages are installed, stay.

        Args:
          max_sequence_length: tokens of a text; default 300 for PixArt-Sigma, 120 for PixArt-Alpha.

        Raises:
          InvalidArgumentError: no room for a token.
        """
        length = self.max_sequence_length if max_sequence_length is None else max_sequence_length
        if length < 2:
            raise InvalidArgumentError(
                f"max_sequence_length must be 2 or more, not {length}: {self.max_sequence_length} is the "
                "model's own"
            )
        told = self._encode(prompts, length) | self._sizes(size, len(prompts))
        away = self._encode(negative_prompts or [""] * len(prompts), length)
        return told, away | self._sizes(size, len(prompts))

    def _encode(self, texts: list[str], length: int) -> dict[str, Any]:
        texts = [text.lower().strip() for text in texts]
        encoded = encode_texts(self.text_encoder, self.tokenizer, texts, max_length=length, mask=True)
        return {"encoder_hidden_states": encoded.hidden, "encoder_attention_mask": encoded.mask}

    def _sizes(self, size: Size, count: int) -> dict[str, Any]:
        """What PixArt-Alpha's network for 1024x1024 pixels is told besides."""
        if not self.transformer.config.has_additional_conditions:
            return {}
        resolution = np.tile(np.asarray(size, np.float32), (count, 1))
        return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}

    def nearest_size(self, height: int, width: int) -> Size:
        """(height, width) of the training pictures whose ratio is nearest to the one given.

        Raises:
          InvalidArgumentError: a height or a width of 0 or less.
        """
        if height <= 0 or width <= 0:
            raise InvalidArgumentError(f"height and width must be above 0, not {height} and {width}")
        side = self.default_size[0]
        sizes = TRAINED_SIZES if side < 2048 else (*TRAINED_SIZES, *MORE_TRAINED_SIZES)
        nearest = min(sizes, key=lambda pair: abs(pair[0] / pair[1] - height / width))
        return nearest[0] * side // 32, nearest[1] * side // 32

    def check_parts(self) -> None:
        """The texts' states and the latents must be as wide as the transformer takes them.

        Raises:
          CheckpointError: parts of different models.
        """
        config = self.transformer.config
        self.check_text_width(self.text_encoder.config.d_model, config.text_width)
        channels, out = self.latent_channels, config.out_channels or config.in_channels
        if config.in_channels != channels or out not in (channels, 2 * channels):
            raise CheckpointError(
                f"its autoencoder has {channels} latent channels, its transformer takes "
                f"{config.in_channels} and draws {out}"
            )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PixArtAlpha(PixArtSigma):
    """The first PixArt: 120 tokens, the autoencoder of SD 1.5, and a network that may be told the size."""

    class_names: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline",)
    max_sequence_length: ClassVar[int] = 120
