"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): a transformer of two streams, with Qwen2.5-VL's states.

    pipe = pipelines.load("Qwen-Image", dtype="bfloat16")
    images = pipe(key, "a coffee shop with a sign that says hello", "blurred", true_cfg_scale=4.0)

Guidance is classifier-free, under the name that the published pipelines have for it, and keeps the length of
each token: see `combine`. Qwen2.5-VL sees texts alone here, and no pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.models.flux_transformer_2d import PATCH
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.families.flux import even_grid
from jaxldm.pipelines.family import (
    Family,
    Folder,
    check_latent_channels,
    check_text_width,
    default_latent_spec,
)
from jaxldm.pipelines.inputs import LatentSpec
from jaxldm.pipelines.latents import scale_factor
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts
from jaxldm.pipelines.sampling_run import PerCall

# The chat around each text in training; its first tokens are left out of the states.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34
MOST_TOKENS = 1024
NO_TEXT = " "  # in place of a negative prompt, as on the model's page


def encode(
    pipe: Pipeline, request: Request, *, max_sequence_length: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text encoder's last states and their mask; without a negative prompt those of a space.

    Texts are put to the encoder within a chat, as the model was trained; the states of the chat's beginning,
    34 tokens, are left out.

    Args:
        max_sequence_length: tokens of a text, the 5 of the chat's end among them, up to 1024; default 512.
            Each length compiles again, so it is the same for all texts. A picture does not depend on it.

    Raises:
        InvalidArgumentError: no room for a token, or more than 1024.
    """
    length = 512 if max_sequence_length is None else max_sequence_length
    check_sequence_length(length, MOST_TOKENS)
    options = {"max_length": DROPPED + length, "mask": True, "template": TEMPLATE}

    def states(texts: Any) -> dict[str, Any]:
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, **options)
        kept = {"encoder_hidden_states": encoded.hidden, "encoder_attention_mask": encoded.mask}
        return {name: value[:, DROPPED:] for name, value in kept.items()}

    return states(request.prompts), states(request.negatives or [NO_TEXT] * len(request.prompts))


def combine(
    uncond: Float[Array, "N h w c"],
    cond: Float[Array, "N h w c"],
    t: Float[Array, " ..."],
    condition: Mapping[str, Any],
    per_call: PerCall,
) -> Float[Array, "N h w c"]:
    """Classifier-free guidance, each token then made as long as that of the prompt alone.

    v = uncond + w (cond - uncond); v |cond| / |v| for each token, which is 2x2 latents.
    """
    mixed = D.guide(uncond, cond, per_call.guidance_scale)
    count, height, width, channels = cond.shape

    def tokens(x: Float[Array, "N h w c"]) -> Float[Array, "N h/2 2 w/2 2 c"]:
        return x.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, channels)

    def length(x: Float[Array, "N h w c"]) -> Float[Array, "N h/2 1 w/2 1 1"]:
        return jnp.sqrt(jnp.square(tokens(x).astype(jnp.float32)).sum((2, 4, 5), keepdims=True))

    longest = length(mixed)
    factor = length(cond) / jnp.where(longest == 0, 1.0, longest)
    mixed = (tokens(mixed) * factor.astype(mixed.dtype)).reshape(cond.shape)
    return D.rescale_guidance(mixed, cond, per_call.guidance_rescale)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """The transformer packs 2x2 latents into a token; 1024x1024 pixels at the published factor of 8."""
    side = 128 * scale_factor(pipe.vae)
    channels = pipe.transformer.config.latent_channels
    return default_latent_spec(pipe, patch=PATCH, in_channels=channels, default_size=(side, side))


def check_guidance(pipe: Pipeline, call: Call) -> None:
    """Raise `InvalidArgumentError` for a guidance scale that the transformer has no input for."""
    if call.guidance_scale not in (None, 0, 1):
        raise InvalidArgumentError(
            f"the guidance of Qwen-Image is true_cfg_scale: write true_cfg_scale={call.guidance_scale:g} in "
            "place of guidance_scale"
        )


def defaults(pipe: Pipeline) -> Defaults:
    """A scale of 4, as on the model's page."""
    return Defaults(guidance_scale=1.0, true_cfg_scale=4.0, strength=0.6, round_up=True)


def check(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the transformer takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    config = pipe.transformer.config
    check_text_width(pipe, pipe.text_encoder.config.hidden_size, config.joint_attention_dim)
    check_latent_channels(pipe, config.latent_channels)


QWEN_IMAGE = Family(
    name="QwenImage",
    folder=Folder(
        class_names=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        parts=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),  # Qwen2.5-VL-7B
        check=check,
    ),
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    grid=even_grid,
    combine=combine,
    true_cfg=True,
    check_guidance=check_guidance,
    text_widths=lambda pipe: TextWidths(pipe.transformer.config.joint_attention_dim, masked=True),
)
