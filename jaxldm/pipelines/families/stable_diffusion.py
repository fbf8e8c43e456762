"""Stable Diffusion 1.x and 2.x, and latent consistency models distilled from them.

Rombach et al. 2022; SD 2 predicts v (Salimans and Ho 2022); LCM is Luo et al. 2023. Text-to-image,
image-to-image and inpainting are one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxldm.errors import CheckpointError
from jaxldm.pipelines.call import Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import Family, Folder, class_named
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.weighted_prompts import text_encoding

# Of families that were published with a safety checker, which is not read or written here: without this
# diffusers opens the folder with a line about it.
WITHOUT_SAFETY_CHECKER = {"requires_safety_checker": False}


def encode(
    pipe: Pipeline, request: Request, *, clip_skip: int = 0, prompt_syntax: str = "plain"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's last states; where there is no negative prompt, those of the empty one.

    Args:
        clip_skip: leave out this many of the encoder's last layers, for both prompts (with
            `reference_quirks` for the prompt alone, as in diffusers). Models that were
            trained so say "clip skip 2" where this is 1.
        prompt_syntax: "plain"; "chunks" takes texts beyond 77 tokens; "weights" these and `(cat:1.3)`, see
            `weighted_prompts`. All texts of a call get as many chunks as the longest.

    Raises:
        InvalidArgumentError: as many layers as there are, or more.
    """

    texts = [*request.prompts, *(request.negatives or [""])]
    encoding = text_encoding(prompt_syntax, [(pipe.text_encoder, pipe.tokenizer, texts)])

    def states(texts: Sequence[str], skip: int) -> dict[str, Any]:
        encoded = encoding(pipe.text_encoder, pipe.tokenizer, texts, skip=skip)
        return {"encoder_hidden_states": encoded.hidden}

    negatives = request.negatives or [""] * len(request.prompts)
    return states(request.prompts, clip_skip), states(negatives, negative_skip(pipe, clip_skip))


def negative_skip(pipe: Pipeline, clip_skip: int) -> int:
    """`clip_skip` of the negative prompts: the same, but none in diffusers."""
    return 0 if pipe.reference_quirks else clip_skip


def defaults(pipe: Pipeline) -> Defaults:
    """A scale of 7.5; a latent consistency model takes 8.5 as an input."""
    return Defaults(guidance_scale=8.5 if pipe.is_guidance_distilled else 7.5)


def check(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the U-Net takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    unet, channels = pipe.unet.config, pipe.vae.config.latent_channels
    encoders = [part for name, part in pipe.networks.items() if name.startswith("text_encoder")]
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if width != unet.context_dim:
        raise CheckpointError(
            f"its text encoders give states {width} wide, its U-Net takes {unet.context_dim}"
        )
    if unet.out_channels != channels:
        raise CheckpointError(
            f"its autoencoder has {channels} latent channels, its U-Net draws {unet.out_channels}"
        )


def text_widths(pipe: Pipeline) -> TextWidths:
    """The states alone."""
    return TextWidths(pipe.unet.config.context_dim)


def class_name(pipe: Pipeline) -> str:
    """Inpainting, guidance-distilled and controlled networks have a class of their own in diffusers."""
    if "controlnet" in pipe.parts:
        return class_named(pipe, "ControlNetInpaint" if pipe.latent_spec.takes_mask else "ControlNet")
    if "adapter" in pipe.parts:
        return class_named(pipe, "Adapter")
    kind = "Inpaint" if pipe.latent_spec.takes_mask else "LatentConsistency"
    special = pipe.latent_spec.takes_mask or pipe.is_guidance_distilled
    return class_named(pipe, kind if special else "")


STABLE_DIFFUSION = Family(
    name="StableDiffusion",
    folder=Folder(
        class_names=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionAdapterPipeline",
        ),
        # The text encoder is CLIP ViT-L/14 (SD 1.x), or OpenCLIP ViT-H/14 without its last layer (SD 2.x).
        parts=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        control=("controlnet", "adapter"),
        constants=WITHOUT_SAFETY_CHECKER,
        check=check,
        class_name=class_name,
    ),
    denoisers=("unet",),
    encode=encode,
    defaults=defaults,
    text_widths=text_widths,
)
