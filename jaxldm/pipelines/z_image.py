"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, arXiv:2511.22699).

pipe = pipelines.load("Z-Image-Turbo", dtype="bfloat16")
images = pipe(key, "a red fox in the snow", num_inference_steps=8, guidance_scale=1)

Scales of guidance count from 1 here, as for all models: what is 0 on a model card of Z-Image is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts
from jaxldm.pipelines.schedulers import Plan
from jaxldm.pipelines.text_to_image import TextToImage
from jaxldm.pipelines.walking import Settings

# What Qwen3's chat template comes to for one question, its answer about to begin.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ZImage(TextToImage):
    """A transformer through which text and latents go as one row of tokens.

    Text-to-image, image-to-image and inpainting are one call; see `TextToImage.__call__`. Z-Image-Turbo was
    distilled with its guidance: 8 steps, `guidance_scale=1`.

    Attributes:
      transformer: the denoising network.
      vae: the autoencoder, of 16 channels as published.
      text_encoder, tokenizer: Qwen3-4B, of which the states before the last layer are told.
    """

    transformer: Network
    vae: Network
    text_encoder: Network
    tokenizer: Any

    class_names: ClassVar[tuple[str, ...]] = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
    )
    default_guidance_scale: ClassVar[float] = 6.0  # 5 as diffusers counts it
    default_strength: ClassVar[float] = 0.6
    rounds_strength_up: ClassVar[bool] = True
    shifts_with_size: ClassVar[bool] = True

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: tuple[int, int],
        *,
        max_sequence_length: int | None = None,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The text encoder's states and which of them are there; without a negative prompt the empty text's.

        Texts are put to the encoder as a question in a chat, as the model was trained.

        Args:
          max_sequence_length: tokens of a text, the chat's own 8 or so among them; default 512, or as many as
            the transformer has places for. Each length compiles anew, so it is the same for all texts.
          cfg_normalization: the guided velocity is at most this many times as long as that of the prompt
            alone; 0: any length.
          cfg_truncation: no guidance behind this part of the way from noise to data, by t.

        Raises:
          InvalidArgumentError: no room for a token, or more than the transformer has places for; a negative
            cfg_normalization.
        """
        most = self.transformer.config.longest_text
        length = min(512, most) if max_sequence_length is None else max_sequence_length
        check_sequence_length(length, most)
        if not cfg_normalization >= 0:
            raise InvalidArgumentError(f"cfg_normalization must be 0 or more, not {cfg_normalization}")
        encoded = (
            encode_texts(
                self.text_encoder,
                self.tokenizer,
                texts,
                penultimate=True,
                max_length=length,
                mask=True,
                template=TEMPLATE,
            )
            for texts in (prompts, negative_prompts or [""] * len(prompts))
        )
        guidance = {
            "longest": np.full(len(prompts), float(cfg_normalization) or np.inf, np.float32),
            "guided_until": np.full(len(prompts), cfg_truncation, np.float32),
        }
        told, away = (
            {"encoder_hidden_states": part.hidden, "encoder_attention_mask": part.mask, **guidance}
            for part in encoded
        )
        return told, away

    @staticmethod
    def ask(
        network: Network,
        x: Float[Array, "N h w c"],
        t: Float[Array, " N"],
        *,
        longest: Any = None,
        guided_until: Any = None,
        **condition: Any,
    ) -> Float[Array, "N h w c"]:
        """The velocity, without what guidance alone uses of the condition."""
        return TextToImage.ask(network, x, t, **condition)

    @staticmethod
    def mix(
        negative: Float[Array, "N h w c"],
        positive: Float[Array, "N h w c"],
        t: Float[Array, ...],
        condition: Mapping[str, Any],
        settings: Settings,
    ) -> Float[Array, "N h w c"]:
        """Classifier-free guidance up to a length and up to a part of the way, see `conditions`."""
        off = 1.0 - jnp.broadcast_to(t, positive.shape[:1]) > condition["guided_until"]
        mixed = D.guide(negative, positive, jnp.where(off, 1.0, settings.guidance_scale))
        there, wanted = (jnp.sqrt(jnp.square(part).sum((1, 2, 3))) for part in (mixed, positive))
        wanted = wanted * condition["longest"]
        shorter = jnp.where((there > wanted) & ~off, wanted / jnp.where(there == 0, 1.0, there), 1.0)
        return D.rescale_guidance(mixed * shorter[:, None, None, None], positive, settings.guidance_rescale)

    def make_grid(self, plan: Plan, *args: Any, **options: Any) -> D.Grid:
        """As in `TextToImage`, from even values 1 to 1/N before the shift, whatever the shift.

        The folder's scheduler, left alone, would go down to its smallest t.
        """
        spacing = {"spacing": self.scheduler.get("_spacing", "trailing")}
        return super().make_grid(plan._replace(grid_options=plan.grid_options | spacing), *args, **options)

    @property
    def size_multiple(self) -> int:
        """Pixels that a token is high and wide."""
        return super().size_multiple * self.transformer.config.patch_size

    @property
    def default_size(self) -> tuple[int, int]:
        """1024x1024; the config says nothing of it."""
        return 1024, 1024

    def check_parts(self) -> None:
        """The texts' states and the latents must be as wide as the transformer takes them.

        Raises:
          CheckpointError: parts of different models.
        """
        config = self.transformer.config
        self.check_text_width(self.text_encoder.config.hidden_size, config.cap_feat_dim)
        self.check_latent_channels(config.in_channels)

    def _guidance_scales(
        self, guidance_scale: float | None, true_cfg_scale: float
    ) -> tuple[float | None, float]:
        """Refuses what would steer towards the negative prompt, and was meant as on a model card."""
        if guidance_scale is not None and 0 <= guidance_scale < 1:
            raise InvalidArgumentError(
                f"guidance_scale counts from 1, the model as trained: for the {guidance_scale:g} of a model "
                f"card of Z-Image write {guidance_scale + 1:g}"
            )
        return super()._guidance_scales(guidance_scale, true_cfg_scale)
