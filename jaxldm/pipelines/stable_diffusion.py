"""Stable Diffusion 1.x and 2.x, and latent consistency models distilled from them.

Text-to-image, image-to-image and inpainting are one call; see `TextToImage.__call__` for its arguments.
Rombach et al. 2022; SD 2 predicts v (Salimans and Ho 2022); LCM is Luo et al. 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import encode_texts
from jaxldm.pipelines.text_pipeline import WITHOUT_SAFETY_CHECKER
from jaxldm.pipelines.unet_text_to_image import UNetTextToImage


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableDiffusion(UNetTextToImage):
    """A U-Net that is told the states of one CLIP text encoder.

    Attributes:
      text_encoder: CLIP ViT-L/14 (SD 1.x) or OpenCLIP ViT-H/14 without its last layer (SD 2.x).
      tokenizer: from `checkpoints.load_tokenizer`.

    >>> import jax                                                                       # doctest: +SKIP
    >>> from jaxldm import pipelines                                                     # doctest: +SKIP
    >>> pipe = pipelines.load("stable-diffusion-v1-5", dtype="bfloat16")                 # doctest: +SKIP
    >>> key = jax.random.key(0)                                                          # doctest: +SKIP
    >>> images = pipe(key, ["a cat in the snow"], num_inference_steps=30, solver="dpmpp_2m")  # doctest: +SKIP
    >>> images.shape                                                                     # doctest: +SKIP
    (1, 512, 512, 3)
    >>> again = pipe(key, "an oil painting of a cat", image=images, strength=0.6)        # doctest: +SKIP
    """

    text_encoder: Network
    tokenizer: Any

    family: ClassVar[str] = "StableDiffusion"
    saved_options: ClassVar[Mapping[str, bool]] = WITHOUT_SAFETY_CHECKER
    class_names: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    )

    @property
    def default_guidance_scale(self) -> float:
        """7.5; 8.5 is told to a latent consistency model."""
        return 8.5 if self.knows_guidance else 7.5

    def conditions(
        self, prompts: list[str], negative_prompts: list[str] | None, size: tuple[int, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The states behind the encoder's last layer; where there is no negative prompt, of the empty one."""
        negatives = negative_prompts or [""] * len(prompts)
        told, away = (
            {"encoder_hidden_states": encode_texts(self.text_encoder, self.tokenizer, texts).hidden}
            for texts in (prompts, negatives)
        )
        return told, away
