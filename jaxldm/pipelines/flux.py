"""FLUX.1 dev and schnell: a transformer on a flow, told T5's states and CLIP's pooled state."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.latent_images import scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts, for_each
from jaxldm.pipelines.schedulers import Plan
from jaxldm.pipelines.text_to_image import TextToImage


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Flux(TextToImage):
    """A transformer of text and image tokens; Black Forest Labs 2024.

    FLUX.1-dev is told its guidance scale, as it was distilled; `true_cfg_scale` steers away from a negative
    prompt on top of that, at twice the time. FLUX.1-schnell is distilled to four steps and is told none.

    Attributes:
      transformer: the denoising network, which predicts the velocity noise - data at t in [0, 1].
      vae: the autoencoder, of 16 channels as published.
      text_encoder, tokenizer: CLIP ViT-L/14, of which the pooled state is told, not the projected one.
      text_encoder_2, tokenizer_2: T5 v1.1 XXL.
    """

    transformer: Network
    vae: Network
    text_encoder: Network
    tokenizer: Any
    text_encoder_2: Network
    tokenizer_2: Any

    class_names: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    default_guidance_scale: ClassVar[float] = 3.5
    default_strength: ClassVar[float] = 0.6
    rounds_strength_up: ClassVar[bool] = True
    has_true_cfg: ClassVar[bool] = True
    shifts_with_size: ClassVar[bool] = True

    @property
    def default_num_inference_steps(self) -> int:
        """28, or 4 for schnell."""
        return 28 if self.knows_guidance else 4

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: tuple[int, int],
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the transformer is told: T5's states and CLIP's pooled state.

        Args:
          prompt_2, negative_prompt_2: other texts for T5.
          max_sequence_length: tokens that T5 sees, up to 512; None: as many as in training, 512 in dev and
            256 in schnell. CLIP sees 77.

        Raises:
          InvalidArgumentError: a number of texts or of tokens that does not fit.
        """
        if max_sequence_length is None:
            max_sequence_length = 512 if self.knows_guidance else 256
        check_sequence_length(max_sequence_length)
        second = for_each(prompt_2, prompts, "prompt_2")
        negative_second = for_each(negative_prompt_2, prompts, "negative_prompt_2")
        told = self._encode(prompts, second, max_sequence_length)
        negatives = negative_prompts or [""] * len(prompts)
        return told, self._encode(negatives, negative_second, max_sequence_length)

    def make_grid(self, plan: Plan, *call: Any, **options: Any) -> D.Grid:
        """As for every family; evenly from pure noise also where the scheduler does not shift by the size."""
        if plan.schedule.path == "flow" and plan.grid_options.get("spacing") == "linspace":
            plan = plan._replace(grid_options=plan.grid_options | {"spacing": "trailing"})
        return super().make_grid(plan, *call, **options)

    @property
    def network_channels(self) -> int:
        """Of the latents, before the transformer packs 2x2 of them into a token."""
        return self.transformer.config.latent_channels

    @property
    def size_multiple(self) -> int:
        """The pixels that a token covers."""
        return 2 * super().size_multiple

    @property
    def default_size(self) -> tuple[int, int]:
        """1024x1024 pixels, at the published autoencoder's factor of 8."""
        side = 128 * scale_factor(self.vae)
        return side, side

    @property
    def knows_guidance(self) -> bool:
        """Whether the transformer is told the guidance scale: dev is, schnell is not."""
        return self.transformer.config.guidance_embeds

    def guidance_told(self, scale: float, count: int) -> dict[str, Any]:
        """The scale itself."""
        return {"guidance": np.full(count, scale, np.float32)}

    def check_parts(self) -> None:
        """The encoders' states and the latents must be as wide as the transformer takes them.

        Raises:
          CheckpointError: parts of different models.
        """
        config = self.transformer.config
        self.check_text_width(self.text_encoder_2.config.d_model, config.joint_attention_dim, "T5")
        given, taken = self.text_encoder.config.hidden_size, config.pooled_projection_dim
        if given != taken:
            raise CheckpointError(
                f"its CLIP gives a pooled state {given} wide, its transformer takes {taken}"
            )
        self.check_latent_channels(config.latent_channels)

    def _encode(
        self, texts: list[str], second_texts: list[str] | None, max_sequence_length: int
    ) -> dict[str, Any]:
        pooled = encode_texts(self.text_encoder, self.tokenizer, texts).pooled
        # T5 looks at what fills a row as well: so the transformer was trained.
        second = (self.text_encoder_2, self.tokenizer_2, second_texts or texts)
        states = encode_texts(*second, max_length=max_sequence_length).hidden
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def _guidance_scales(
        self, guidance_scale: float | None, true_cfg_scale: float
    ) -> tuple[float | None, float]:
        """What the network is told, and what classifier-free guidance takes.

        Raises:
          InvalidArgumentError: a guidance_scale for schnell, which is told none: 0 and 1 say so, too.
        """
        if not self.knows_guidance and guidance_scale not in (None, 0, 1):
            raise InvalidArgumentError(
                "this transformer is told no guidance (FLUX.1-schnell): leave out guidance_scale, which is "
                f"{guidance_scale}; true_cfg_scale steers away from a negative prompt"
            )
        return super()._guidance_scales(guidance_scale, true_cfg_scale)
