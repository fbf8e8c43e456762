"""Stable Diffusion 3 and 3.5: three text encoders, any of them left out, and a transformer on a flow.

Esser et al. 2024, section 5.3 and appendix B.3: in training each encoder's part was zero for 46 % of the
texts, so that one left out is zeros here, too. T5, with 4.8 B parameters the largest part of the model, is
the first to go.

The folder's schedule shifts every t once. Stability's code and diffusers shift the last one twice: add
`{"_shift_t_min_twice": True}` to `scheduler` for their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxldm import diffusion as D
from jaxldm.errors import CheckpointError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.families.stable_diffusion import negative_skip
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
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import Encoded, check_sequence_length, encode_texts, for_each

CLIP_TOKENS = 77
# CLIP ViT-L/14, OpenCLIP ViT-bigG/14, T5 v1.1 XXL.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    prompt_2: str | list[str] | None = None,
    prompt_3: str | list[str] | None = None,
    negative_prompt_2: str | list[str] | None = None,
    negative_prompt_3: str | list[str] | None = None,
    max_sequence_length: int | None = None,
    clip_skip: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The penultimate states of both CLIPs, side by side, behind them T5's; and the CLIPs' pooled states.

    Args:
        prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: other texts for the larger CLIP and T5.
        max_sequence_length: tokens that T5 sees, up to 512; None: 256, or fewer where its tokenizer has
            fewer. The CLIPs see 77.
        clip_skip: leave out this many more of the CLIPs' last layers, for both prompts.

    Raises:
        InvalidArgumentError: a number of texts or of tokens that does not fit.
    """
    if max_sequence_length is None:
        max_sequence_length = 256 if pipe.tokenizer_3 is None else min(256, pipe.tokenizer_3.max_length)
    check_sequence_length(max_sequence_length)
    prompts, negatives = request.prompts, request.negatives or [""] * len(request.prompts)
    second, third, negative_second, negative_third = (
        for_each(texts, prompts, name)
        for name, texts in (
            ("prompt_2", prompt_2),
            ("prompt_3", prompt_3),
            ("negative_prompt_2", negative_prompt_2),
            ("negative_prompt_3", negative_prompt_3),
        )
    )
    encode_all = functools.partial(_encode_all, pipe, max_sequence_length)
    cond = encode_all(clip_skip, prompts, second, third)
    return cond, encode_all(negative_skip(pipe, clip_skip), negatives, negative_second, negative_third)


def _encode_all(
    pipe: Pipeline,
    max_sequence_length: int,
    clip_skip: int,
    texts: Sequence[str],
    second: list[str] | None,
    third: list[str] | None,
) -> dict[str, Any]:
    width, clips = pipe.transformer.config.joint_attention_dim, []
    clip_tokens = [tokenizer.max_length for tokenizer in (pipe.tokenizer, pipe.tokenizer_2) if tokenizer]
    for k, (own, (states, pooled)) in enumerate(zip((None, second), _clip_widths(pipe), strict=True)):
        encoder, tokenizer = getattr(pipe, ENCODERS[k]), getattr(pipe, TOKENIZERS[k])
        if encoder is None:
            shapes = (len(texts), min([CLIP_TOKENS, *clip_tokens]), states), (len(texts), pooled)
            clips.append(Encoded(*(np.zeros(shape, np.float32) for shape in shapes)))
            continue
        # The same text has the same tokens in both: one warning is enough.
        warn = own is not None or k == 0 or pipe.text_encoder is None
        options = {"skip": 1 + clip_skip, "final_norm": False, "warn": warn}
        clips.append(encode_texts(encoder, tokenizer, own or texts, **options))
    hidden = np.concatenate([clip.hidden for clip in clips], axis=-1)
    hidden = np.pad(hidden, ((0, 0), (0, 0), (0, width - hidden.shape[-1])))
    if pipe.text_encoder_3 is None:
        last = np.zeros((len(texts), max_sequence_length, width), np.float32)
    else:
        # T5 looks at what fills a row as well: so the transformer was trained.
        t5 = (pipe.text_encoder_3, pipe.tokenizer_3, third or texts)
        last = encode_texts(*t5, max_length=max_sequence_length).hidden
    return {
        "encoder_hidden_states": np.concatenate([hidden, last], axis=1),
        "pooled_projections": np.concatenate([clip.pooled for clip in clips], axis=-1),
    }


def _clip_widths(pipe: Pipeline) -> list[tuple[int, int]]:
    """(states, pooled state) of each CLIP. One that is left out is as wide as the other leaves room."""
    left = pipe.transformer.config.pooled_projection_dim
    widths: list[tuple[int, int] | None] = []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        width = None if encoder is None else (encoder.config.hidden_size, encoder.config.projection_dim)
        widths.append(width)
        left -= width[1] if width else 0
    if widths == [None, None]:
        return [(left, left), (0, 0)]
    return [(left, left) if width is None else width for width in widths]


def text_widths(pipe: Pipeline) -> TextWidths:
    """The states of all encoders, one behind the other, and the CLIPs' pooled ones side by side."""
    config = pipe.transformer.config
    return TextWidths(config.joint_attention_dim, config.pooled_projection_dim)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """The transformer packs 2x2 latents into a token."""
    return default_latent_spec(pipe, patch=pipe.transformer.config.patch_size)


def grid_to_t_min(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """Even in t to the last that was trained, whatever shifts it."""
    scheduler = read_scheduler(pipe, call)
    if scheduler.dynamic_shift is not None:
        scheduler = scheduler.with_grid(spacing="linspace")
    return grid(pipe, call, size, scheduler)


def defaults(pipe: Pipeline) -> Defaults:
    """As published."""
    return Defaults(guidance_scale=7.0, num_inference_steps=28, strength=0.6, round_up=True)


def check(pipe: Pipeline) -> None:
    """The encoders' states and the latents must be as wide as the transformer takes them.

    Raises:
        CheckpointError: parts of different models, or no text encoder at all.
    """
    config = pipe.transformer.config
    check_latent_channels(pipe, config.in_channels)
    if not any(name in pipe.networks for name in ENCODERS):
        raise CheckpointError(f"without a text encoder: at least one of {', '.join(ENCODERS)} is needed")
    for encoder, tokenizer in zip(ENCODERS, TOKENIZERS, strict=True):
        if pipe.parts[encoder] is not None and pipe.parts[tokenizer] is None:
            raise CheckpointError(f"its {encoder} has no {tokenizer}")
    states, pooled = (sum(widths) for widths in zip(*_clip_widths(pipe), strict=True))
    if pooled != config.pooled_projection_dim or states > config.joint_attention_dim:
        raise CheckpointError(
            f"its CLIPs give states {states} and a pooled state {pooled} wide, its transformer takes "
            f"up to {config.joint_attention_dim} and {config.pooled_projection_dim}"
        )
    if pipe.text_encoder_3 is not None:
        check_text_width(pipe, states_width(pipe.text_encoder_3), config.joint_attention_dim, "T5")


STABLE_DIFFUSION_3 = Family(
    name="StableDiffusion3",
    folder=Folder(
        class_names=(
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
        ),
        parts=("transformer", "vae", "scheduler"),
        optional=(*ENCODERS, *TOKENIZERS),
        control=("controlnet",),
        check=check,
        class_name=class_name_by_control,
    ),
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    grid=grid_to_t_min,
    text_widths=text_widths,
)
