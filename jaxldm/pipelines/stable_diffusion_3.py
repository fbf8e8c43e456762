"""Stable Diffusion 3 and 3.5: three text encoders, any of them left out, and a transformer on a flow."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.prompts import Encoded, check_sequence_length, encode_texts, for_each
from jaxldm.pipelines.schedulers import Plan
from jaxldm.pipelines.text_to_image import TextToImage

CLIP_TOKENS = 77
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableDiffusion3(TextToImage):
    """A transformer that is told the states of two CLIPs, side by side, behind them those of T5.

    Esser et al. 2024, section 5.3 and appendix B.3: in training each encoder's part was zero for 46 % of the
    texts, so that one left out is zeros here, too. T5, with 4.8 B parameters the largest part of the model,
    is the first to go.

    The folder's schedule shifts every t once. Stability's code and diffusers shift the last one twice: add
    `{"_shift_t_min_twice": True}` to `scheduler` to walk their rows.

    Attributes:
      transformer: the denoising network, which predicts the velocity noise - data at 1000 t.
      vae: the autoencoder, of 16 channels as published.
      text_encoder, tokenizer: CLIP, of which the penultimate states and the projected pooled state are told.
      text_encoder_2, tokenizer_2: the larger CLIP, likewise.
      text_encoder_3, tokenizer_3: T5, whose states alone are told.
    """

    transformer: Network
    vae: Network
    text_encoder: Network | None = None
    tokenizer: Any = None
    text_encoder_2: Network | None = None
    tokenizer_2: Any = None
    text_encoder_3: Network | None = None
    tokenizer_3: Any = None

    class_names: ClassVar[tuple[str, ...]] = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    optional: ClassVar[tuple[str, ...]] = (*ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")
    default_guidance_scale: ClassVar[float] = 7.0
    default_strength: ClassVar[float] = 0.6
    rounds_strength_up: ClassVar[bool] = True
    default_num_inference_steps: ClassVar[int] = 28
    shifts_with_size: ClassVar[bool] = True

    def conditions(
        self,
        prompts: list[str],
        negative_prompts: list[str] | None,
        size: tuple[int, int],
        *,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        max_sequence_length: int = 256,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the transformer is told: the states of all encoders, and the pooled states of both CLIPs.

        Args:
          prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other texts for the larger CLIP and T5.
          max_sequence_length: tokens that T5 sees, up to 512; the CLIPs see 77.

        Raises:
          InvalidArgumentError: a number of texts or of tokens that does not fit.
        """
        check_sequence_length(max_sequence_length)
        others = (for_each(prompt_2, prompts, "prompt_2"), for_each(prompt_3, prompts, "prompt_3"))
        negative_others = (
            for_each(negative_prompt_2, prompts, "negative_prompt_2"),
            for_each(negative_prompt_3, prompts, "negative_prompt_3"),
        )
        told = self._encode(prompts, others, max_sequence_length)
        away = self._encode(negative_prompts or [""] * len(prompts), negative_others, max_sequence_length)
        return _arguments(told), _arguments(away)

    @property
    def size_multiple(self) -> int:
        """The pixels that a token covers."""
        return super().size_multiple * self.transformer.config.patch_size

    def make_grid(self, plan: Plan, *arguments: Any, **options: Any) -> D.Grid:
        """The rows that a call walks: even in t to the last that was trained, whatever shifts them."""
        if plan.schedule.dynamic_shift is not None:
            plan = plan._replace(grid_options=plan.grid_options | {"spacing": "linspace"})
        return super().make_grid(plan, *arguments, **options)

    def check_parts(self) -> None:
        """The encoders' states and the latents must be as wide as the transformer takes them.

        Raises:
          CheckpointError: parts of different models, or no text encoder at all.
        """
        config = self.transformer.config
        self.check_latent_channels(config.in_channels)
        if not any(name in self.networks for name in ENCODERS):
            raise CheckpointError(f"without a text encoder: at least one of {', '.join(ENCODERS)} is needed")
        for encoder, tokenizer in zip(ENCODERS, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=True):
            if getattr(self, encoder) is not None and getattr(self, tokenizer) is None:
                raise CheckpointError(f"its {encoder} has no {tokenizer}")
        states, pooled = (sum(widths) for widths in zip(*self._clip_widths(), strict=True))
        if pooled != config.pooled_projection_dim or states > config.joint_attention_dim:
            raise CheckpointError(
                f"its CLIPs give states {states} and a pooled state {pooled} wide, its transformer takes "
                f"up to {config.joint_attention_dim} and {config.pooled_projection_dim}"
            )
        if self.text_encoder_3 is not None:
            self.check_text_width(self.text_encoder_3.config.d_model, config.joint_attention_dim, "T5")

    def _clip_widths(self) -> list[tuple[int, int]]:
        """(states, pooled state) of each CLIP. One that is left out is as wide as the other leaves room."""
        left = self.transformer.config.pooled_projection_dim
        widths: list[tuple[int, int] | None] = []
        for encoder in (self.text_encoder, self.text_encoder_2):
            width = None if encoder is None else (encoder.config.hidden_size, encoder.config.projection_dim)
            widths.append(width)
            left -= width[1] if width else 0
        if widths == [None, None]:
            return [(left, left), (0, 0)]
        return [(left, left) if width is None else width for width in widths]

    def _encode(
        self, texts: list[str], others: tuple[list[str] | None, list[str] | None], max_sequence_length: int
    ) -> Encoded:
        width = self.transformer.config.joint_attention_dim
        parts = []
        clips = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        for (encoder, tokenizer), own, widths in zip(
            clips, (None, others[0]), self._clip_widths(), strict=True
        ):
            if encoder is None:
                shapes = (len(texts), CLIP_TOKENS, widths[0]), (len(texts), widths[1])
                parts.append(Encoded(*(np.zeros(shape, np.float32) for shape in shapes)))
                continue
            # The same text has the same tokens in both: one warning is enough.
            warn = own is not None or encoder is self.text_encoder or self.text_encoder is None
            parts.append(encode_texts(encoder, tokenizer, own or texts, penultimate=True, warn=warn))
        hidden = np.concatenate([part.hidden for part in parts], axis=-1)
        hidden = np.pad(hidden, ((0, 0), (0, 0), (0, width - hidden.shape[-1])))
        if self.text_encoder_3 is None:
            last = np.zeros((len(texts), max_sequence_length, width), np.float32)
        else:
            # T5 looks at what fills a row as well: so the transformer was trained.
            third = (self.text_encoder_3, self.tokenizer_3, others[1] or texts)
            last = encode_texts(*third, max_length=max_sequence_length).hidden
        pooled = np.concatenate([part.pooled for part in parts], axis=-1)
        return Encoded(np.concatenate([hidden, last], axis=1), pooled)


def _arguments(encoded: Encoded) -> dict[str, Any]:
    return {"encoder_hidden_states": encoded.hidden, "pooled_projections": encoded.pooled}
