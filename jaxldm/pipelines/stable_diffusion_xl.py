"""Stable Diffusion XL: base, refiner, and the hand-over from the one to the other (Podell et al. 2023).

    base, refiner = pipelines.load("sdxl-base"), pipelines.load("sdxl-refiner")
    steps = dict(num_inference_steps=40, solver="euler")
    latents = base(key, prompt, denoising_end=0.8, output="latents", **steps)
    images = refiner(key, prompt, latents=latents, denoising_start=0.8, **steps)

Both walk one grid, cut in two (`D.hand_over`). Playground v2.5 is an SDXL base on EDM's path.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import Encoded, encode_texts, for_each
from jaxldm.pipelines.unet_text_to_image import UNetTextToImage

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableDiffusionXL(UNetTextToImage):
    """A U-Net that is told the penultimate states of two text encoders, a pooled one, and a few numbers.

    Attributes:
      text_encoder, tokenizer: CLIP ViT-L/14; None in the refiner.
      text_encoder_2, tokenizer_2: OpenCLIP ViT-bigG/14 with its projection.
      force_zeros_for_empty_prompt: without a negative prompt the other branch is told zeros, not the empty
        text.
      requires_aesthetics_score: the refiner is told a score in place of the target size.
    """

    text_encoder: Network | None
    tokenizer: Any
    text_encoder_2: Network
    tokenizer_2: Any
    force_zeros_for_empty_prompt: bool = True
    requires_aesthetics_score: bool = False

    family: ClassVar[str] = "StableDiffusionXL"
    class_names: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    optional: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")  # the refiner has the second alone
    flags: ClassVar[tuple[str, ...]] = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
    default_strength: ClassVar[float] = 0.3

    @property
    def default_guidance_scale(self) -> float:
        """5; 8.5 is told to a latent consistency model."""
        return 8.5 if self.knows_guidance else 5.0

    @property
    def saved_class_name(self) -> str:
        """The refiner is an image-to-image pipeline there."""
        refines = self.text_encoder is None and not self.canvas.tells_mask
        return f"{self.family}Img2ImgPipeline" if refines else super().saved_class_name

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: Size,
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size | None = None,
        negative_target_size: Size | None = None,
        negative_aesthetic_score: float = 2.5,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the U-Net is told: states, the pooled state, and the micro-conditioning.

        Args:
          prompt_2, negative_prompt_2: other texts for the second encoder.
          original_size, crops_coords_top_left, target_size: (height, width) of a training picture as it was,
            (top, left) where it was cut, and the (height, width) to draw; default the size drawn, and (0, 0).
          aesthetic_score: of the refiner, in place of target_size.
          negative_...: the same for the branch to steer away from; default as for the other one.

        Raises:
          InvalidArgumentError: a number of texts that does not fit.
        """
        second = for_each(prompt_2, prompts, "prompt_2")
        negative_second = for_each(negative_prompt_2, prompts, "negative_prompt_2")
        told = self._encode(prompts, second)
        if negative_prompts is None and negative_second is None and self.force_zeros_for_empty_prompt:
            away = Encoded(*(np.zeros_like(part) for part in told))
        else:
            away = self._encode(negative_prompts or [""] * len(prompts), negative_second)
        original, target = original_size or size, target_size or size
        numbers = (*original, *crops_coords_top_left)
        negative_numbers = (
            *(negative_original_size or original),
            *(negative_crops_coords_top_left or crops_coords_top_left),
        )
        if self.requires_aesthetics_score:
            numbers += (aesthetic_score,)
            negative_numbers += (negative_aesthetic_score,)
        else:
            numbers += tuple(target)
            negative_numbers += tuple(negative_target_size or target)
        return _arguments(told, numbers), _arguments(away, negative_numbers)

    def _encode(self, texts: list[str], second_texts: list[str] | None) -> Encoded:
        """Penultimate states, side by side, and the pooled state of the second encoder."""
        with_first = self.text_encoder is not None
        second = encode_texts(
            self.text_encoder_2,
            self.tokenizer_2,
            second_texts or texts,
            penultimate=True,
            warn=second_texts is not None or not with_first,  # the same text has the same tokens in both
        )
        if not with_first:
            return second
        first = encode_texts(self.text_encoder, self.tokenizer, texts, penultimate=True)
        return Encoded(np.concatenate([first.hidden, second.hidden], axis=-1), second.pooled)


def _arguments(encoded: Encoded, numbers: tuple[float, ...]) -> dict[str, Any]:
    time_ids = np.tile(np.asarray(numbers, np.float32), (len(encoded.hidden), 1))
    return {
        "encoder_hidden_states": encoded.hidden,
        "text_embeds": encoded.pooled,
        "time_ids": time_ids,
    }
