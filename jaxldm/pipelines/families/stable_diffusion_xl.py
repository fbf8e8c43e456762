"""Stable Diffusion XL: base, refiner, and one grid that both share (Podell et al. 2023).

    base, refiner = pipelines.load("sdxl-base"), pipelines.load("sdxl-refiner")
    steps = dict(num_inference_steps=40, solver="euler")
    latents = base(key, prompt, denoising_end=0.8, output="latents", **steps)
    images = refiner(key, prompt, latents=latents, denoising_start=0.8, **steps)

Playground v2.5 is an SDXL base on EDM's path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.families import stable_diffusion
from jaxldm.pipelines.family import Family, Folder, class_named
from jaxldm.pipelines.inputs import Size
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import Encoded, for_each
from jaxldm.pipelines.weighted_prompts import text_encoding


class MicroConditioning(TypedDict, total=False):
    """What SDXL is given of a picture besides its text (Podell et al. 2023, section 2.2): options of a call.

    Attributes:
        original_size: (height, width) of a training picture as it was; default the size drawn.
        crops_coords_top_left: (top, left) where it was cut; default (0, 0).
        target_size: (height, width) to draw; default the size drawn.
        aesthetic_score: of the refiner, in place of target_size; default 6.
        negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for the
            negative branch; default as for the other one.
        negative_aesthetic_score: likewise; default 2.5.
    """

    original_size: Size | None
    crops_coords_top_left: Size
    target_size: Size | None
    aesthetic_score: float
    negative_original_size: Size | None
    negative_crops_coords_top_left: Size | None
    negative_target_size: Size | None
    negative_aesthetic_score: float


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    prompt_2: str | list[str] | None = None,
    negative_prompt_2: str | list[str] | None = None,
    clip_skip: int = 0,
    prompt_syntax: str = "plain",
    **micro: Unpack[MicroConditioning],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The penultimate states of both text encoders, the pooled one of the second, and the micro-conditioning.

    Args:
        prompt_2, negative_prompt_2: other texts for the second encoder.
        clip_skip: leave out this many more of the encoders' last layers, for both prompts.
        prompt_syntax: "plain", "chunks" or "weights", as in Stable Diffusion; of all texts.
        micro: see `MicroConditioning`.

    Raises:
        InvalidArgumentError: a number of texts that does not fit; as many layers as there are, or more; an
            aesthetic score for a base model, a target size for the refiner.
    """
    prompts, negatives, _, size = request
    numbers, negative_numbers = micro_conditioning(pipe, size, micro)
    second = for_each(prompt_2, prompts, "prompt_2")
    negative_second = for_each(negative_prompt_2, prompts, "negative_prompt_2")
    empty = [""] * len(prompts)
    encoding = text_encoding(
        prompt_syntax,
        [
            (pipe.text_encoder, pipe.tokenizer, [*prompts, *(negatives or empty)]),
            (
                pipe.text_encoder_2,
                pipe.tokenizer_2,
                [*(second or prompts), *(negative_second or negatives or empty)],
            ),
        ],
    )
    encode_all = functools.partial(_encode_both, pipe, encoding)
    cond = encode_all(clip_skip, prompts, second)
    if negatives is None and negative_second is None and pipe.force_zeros_for_empty_prompt:
        uncond = Encoded(*(np.zeros_like(part) for part in cond))
    else:
        uncond = encode_all(
            stable_diffusion.negative_skip(pipe, clip_skip), negatives or empty, negative_second
        )
    return _arguments(cond, numbers), _arguments(uncond, negative_numbers)


def micro_conditioning(
    pipe: Pipeline, size: Size, given: MicroConditioning
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers that the network takes with the prompt, and those with the negative.

    Raises:
        InvalidArgumentError: what the other of base and refiner takes, and this model does not.
    """
    for name in unused_numbers(pipe):
        if given.get(name) is not None:
            raise InvalidArgumentError(
                f"{name} is not for this model, which takes "
                f"{'an aesthetic_score' if 'size' in name else 'a target_size'} in its place: leave it out"
            )
    original, crop = given.get("original_size") or size, given.get("crops_coords_top_left") or (0, 0)
    negative_original = given.get("negative_original_size") or original
    negative_crop = given.get("negative_crops_coords_top_left") or crop
    if pipe.requires_aesthetics_score:
        last = (given.get("aesthetic_score", 6.0),)
        negative_last = (given.get("negative_aesthetic_score", 2.5),)
    else:
        last = given.get("target_size") or size
        negative_last = given.get("negative_target_size") or last
    return (*original, *crop, *last), (*negative_original, *negative_crop, *negative_last)


def unused_numbers(pipe: Pipeline) -> tuple[str, ...]:
    """The options that the model has no use for: the refiner draws no size, the base no score."""
    kind = "target_size" if pipe.requires_aesthetics_score else "aesthetic_score"
    return kind, f"negative_{kind}"


def _encode_both(
    pipe: Pipeline,
    encoding: Callable[..., Encoded],
    clip_skip: int,
    texts: Sequence[str],
    second_texts: list[str] | None,
) -> Encoded:
    """Penultimate states, side by side, and the pooled state of the second encoder."""
    second = encoding(
        pipe.text_encoder_2,
        pipe.tokenizer_2,
        second_texts or texts,
        skip=1 + clip_skip,
        final_norm=False,
        warn=second_texts is not None or pipe.text_encoder is None,  # the same text has the same tokens
    )
    if pipe.text_encoder is None:
        return second
    first = encoding(pipe.text_encoder, pipe.tokenizer, texts, skip=1 + clip_skip, final_norm=False)
    return Encoded(np.concatenate([first.hidden, second.hidden], axis=-1), second.pooled)


def _arguments(encoded: Encoded, numbers: tuple[float, ...]) -> dict[str, Any]:
    time_ids = np.tile(np.asarray(numbers, np.float32), (len(encoded.hidden), 1))
    return {
        "encoder_hidden_states": encoded.hidden,
        "text_embeds": encoded.pooled,
        "time_ids": time_ids,
    }


def defaults(pipe: Pipeline) -> Defaults:
    """A scale of 5; a latent consistency model takes 8.5 as an input."""
    return Defaults(guidance_scale=8.5 if pipe.is_guidance_distilled else 5.0, strength=0.3)


def text_widths(pipe: Pipeline) -> TextWidths:
    """The states of both encoders side by side, and the pooled one of the second."""
    return TextWidths(pipe.unet.config.context_dim, pipe.text_encoder_2.config.projection_dim)


def class_name(pipe: Pipeline) -> str:
    """The refiner is an image-to-image pipeline in diffusers."""
    if pipe.text_encoder is None and not pipe.latent_spec.takes_mask:
        return class_named(pipe, "Img2Img")
    return stable_diffusion.class_name(pipe)


STABLE_DIFFUSION_XL = Family(
    name="StableDiffusionXL",
    folder=Folder(
        class_names=(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLAdapterPipeline",
        ),
        # CLIP ViT-L/14, and OpenCLIP ViT-bigG/14 with its projection; the refiner has the second alone.
        parts=("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"),
        optional=("text_encoder", "tokenizer"),
        control=("controlnet", "adapter"),
        # Without a negative prompt the other branch takes zeros, not the empty text; the refiner takes a
        # score in place of the target size.
        options={"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False},
        check=stable_diffusion.check,
        class_name=class_name,
    ),
    denoisers=("unet",),
    encode=encode,
    defaults=defaults,
    text_widths=text_widths,
)
