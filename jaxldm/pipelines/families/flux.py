"""FLUX.1 dev and schnell (Black Forest Labs 2024): a transformer on a flow, with T5's states and CLIP's
pooled state.

FLUX.1-dev takes its guidance scale as an input, as it was distilled; `true_cfg_scale` steers away from a
negative prompt on top of that, at twice the time. FLUX.1-schnell is distilled to four steps and takes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import (
    Family,
    Folder,
    check_latent_channels,
    check_text_width,
    class_name_by_control,
    default_latent_spec,
    states_width,
)
from jaxldm.pipelines.generate import grid, read_scheduler
from jaxldm.pipelines.inputs import LatentSpec, Size
from jaxldm.pipelines.latents import scale_factor
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts, for_each


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    prompt_2: str | list[str] | None = None,
    negative_prompt_2: str | list[str] | None = None,
    max_sequence_length: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """T5's states and CLIP's pooled state, which is the one before the projection.

    Args:
        prompt_2, negative_prompt_2: other texts for T5.
        max_sequence_length: tokens that T5 sees, up to 512; None: as many as in training, 512 in dev and 256
            in schnell (with `reference_quirks` 512 in both, as in diffusers), or fewer where the tokenizer
            has fewer. CLIP sees 77.

    Raises:
        InvalidArgumentError: a number of texts or of tokens that does not fit.
    """
    if max_sequence_length is None:
        published = 512 if pipe.is_guidance_distilled or pipe.reference_quirks else 256
        max_sequence_length = min(published, pipe.tokenizer_2.max_length)
    check_sequence_length(max_sequence_length)
    prompts, negatives = request.prompts, request.negatives or [""] * len(request.prompts)
    second = for_each(prompt_2, prompts, "prompt_2")
    negative_second = for_each(negative_prompt_2, prompts, "negative_prompt_2")

    def both(texts: Sequence[str], second_texts: list[str] | None) -> dict[str, Any]:
        pooled = encode_texts(pipe.text_encoder, pipe.tokenizer, texts).pooled
        # T5 looks at what fills a row as well: so the transformer was trained.
        t5 = (pipe.text_encoder_2, pipe.tokenizer_2, second_texts or texts)
        states = encode_texts(*t5, max_length=max_sequence_length).hidden
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    return both(prompts, second), both(negatives, negative_second)


def text_widths(pipe: Pipeline) -> TextWidths:
    """T5's states, and CLIP's pooled one."""
    config = pipe.transformer.config
    return TextWidths(config.joint_attention_dim, config.pooled_projection_dim)


def latent_spec(pipe: Pipeline, besides: int = 0) -> LatentSpec:
    """The transformer packs 2x2 latents into a token; 1024x1024 pixels at the published factor of 8.

    Args:
        besides: input channels of the transformer that are not x.
    """
    side = 128 * scale_factor(pipe.vae)
    in_channels = pipe.transformer.config.latent_channels - besides
    return default_latent_spec(pipe, patch=2, in_channels=in_channels, default_size=(side, side))


def even_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """Evenly from pure noise, also where the scheduler does not shift by the size."""
    scheduler = read_scheduler(pipe, call)
    if isinstance(scheduler.path, D.Flow) and scheduler.grid.spacing == "linspace":
        scheduler = scheduler.with_grid(spacing="trailing")
    return grid(pipe, call, size, scheduler)


def is_guidance_distilled(pipe: Pipeline) -> bool:
    """Whether the transformer takes the guidance scale: dev does, schnell does not."""
    return pipe.transformer.config.guidance_embeds


def guidance_condition(pipe: Pipeline, scale: float, count: int) -> dict[str, Any]:
    """The scale itself."""
    return {"guidance": np.full(count, scale, np.float32)}


def check_guidance(pipe: Pipeline, call: Call) -> None:
    """Raise `InvalidArgumentError` for a guidance scale that schnell has no input for; 0 and 1 are none."""
    if not pipe.is_guidance_distilled and call.guidance_scale not in (None, 0, 1):
        raise InvalidArgumentError(
            "this transformer takes no guidance (FLUX.1-schnell): leave out guidance_scale, which is "
            f"{call.guidance_scale}; true_cfg_scale steers away from a negative prompt"
        )


def defaults(pipe: Pipeline) -> Defaults:
    """28 steps, or 4 for schnell."""
    steps = 28 if pipe.is_guidance_distilled else 4
    return Defaults(guidance_scale=3.5, num_inference_steps=steps, strength=0.6, round_up=True)


def check(pipe: Pipeline, besides: int = 0) -> None:
    """The encoders' states and the latents must be as wide as the transformer takes them.

    Args:
        besides: input channels of the transformer that are not x.

    Raises:
        CheckpointError: parts of different models.
    """
    config = pipe.transformer.config
    check_text_width(pipe, states_width(pipe.text_encoder_2), config.joint_attention_dim, "T5")
    given, taken = pipe.text_encoder.config.hidden_size, config.pooled_projection_dim
    if given != taken:
        raise CheckpointError(f"its CLIP gives a pooled state {given} wide, its transformer takes {taken}")
    check_latent_channels(pipe, config.latent_channels - besides)


FLUX = Family(
    name="Flux",
    folder=Folder(
        class_names=(
            *("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"),
            *("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
        ),
        # CLIP ViT-L/14, and T5 v1.1 XXL.
        parts=(
            *("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
            "scheduler",
        ),
        control=("controlnet",),
        check=check,
        class_name=class_name_by_control,
    ),
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    grid=even_grid,
    is_guidance_distilled=is_guidance_distilled,
    guidance_condition=guidance_condition,
    true_cfg=True,
    check_guidance=check_guidance,
    text_widths=text_widths,
)
