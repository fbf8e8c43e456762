"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, arXiv:2511.22699).

    pipe = pipelines.load("Z-Image-Turbo", dtype="bfloat16")
    images = pipe(key, "a red fox in the snow", num_inference_steps=8, guidance_scale=1)

A transformer through which text and latents go as one row of tokens. Z-Image-Turbo was distilled with its
guidance: 8 steps, `guidance_scale=1`. Scales of guidance count from 1 here, as for all models: what is 0 on a
model card of Z-Image is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import (
    Family,
    Folder,
    check_latent_channels,
    check_text_width,
    default_latent_spec,
)
from jaxldm.pipelines.generate import grid, read_scheduler
from jaxldm.pipelines.inputs import LatentSpec, Size
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import check_sequence_length, encode_texts
from jaxldm.pipelines.sampling_run import PerCall

# What Qwen3's chat template comes to for one question, its answer about to begin.
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    max_sequence_length: int | None = None,
    cfg_normalization: float = 0.0,
    cfg_truncation: float = 1.0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text encoder's penultimate states and their mask; without a negative prompt the empty text's.

    Texts are put to the encoder as a question in a chat, as the model was trained.

    Args:
        max_sequence_length: tokens of a text, the chat's own 8 or so among them; default 512, or as many as
            the transformer has places for. Each length compiles again, so it is the same for all texts.
        cfg_normalization: the guided velocity is at most this many times as long as that of the prompt alone;
            0: any length.
        cfg_truncation: no guidance behind this part of the way from noise to data, by t.

    Raises:
        InvalidArgumentError: no room for a token, or more than the transformer has places for; a negative
            cfg_normalization.
    """
    most = pipe.transformer.config.longest_text
    length = min(512, most) if max_sequence_length is None else max_sequence_length
    check_sequence_length(length, most)
    if not cfg_normalization >= 0:
        raise InvalidArgumentError(f"cfg_normalization must be 0 or more, not {cfg_normalization}")
    count = len(request.prompts)
    guidance = {
        "_longest": np.full(count, float(cfg_normalization) or np.inf, np.float32),
        "_guided_until": np.full(count, cfg_truncation, np.float32),
    }
    options = {"skip": 1, "final_norm": False, "max_length": length, "mask": True, "template": TEMPLATE}

    def states(texts: list[str]) -> dict[str, Any]:
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, **options)
        return {"encoder_hidden_states": encoded.hidden, "encoder_attention_mask": encoded.mask, **guidance}

    return request.both(states)


def combine(
    uncond: Float[Array, "N h w c"],
    cond: Float[Array, "N h w c"],
    t: Float[Array, " ..."],
    condition: Mapping[str, Any],
    per_call: PerCall,
) -> Float[Array, "N h w c"]:
    """Classifier-free guidance up to a length and up to a part of the way, see `encode`."""
    off = 1.0 - jnp.broadcast_to(t, cond.shape[:1]) > condition["_guided_until"]
    mixed = D.guide(uncond, cond, jnp.where(off, 1.0, per_call.guidance_scale))
    length, longest = (jnp.sqrt(jnp.square(part).sum((1, 2, 3))) for part in (mixed, cond))
    longest = longest * condition["_longest"]
    shorter = jnp.where((length > longest) & ~off, longest / jnp.where(length == 0, 1.0, length), 1.0)
    return D.rescale_guidance(mixed * shorter[:, None, None, None], cond, per_call.guidance_rescale)


def even_grid(pipe: Pipeline, call: Call, size: Size) -> tuple[Any, D.Grid]:
    """Even values 1 to 1/N before the shift, whatever the shift.

    The folder's scheduler, left alone, would go down to its smallest t.
    """
    spacing = pipe.scheduler.get("_spacing", "trailing")
    return grid(pipe, call, size, read_scheduler(pipe, call).with_grid(spacing=spacing))


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """The transformer packs 2x2 latents into a token; 1024x1024 pixels, which the config lacks."""
    return default_latent_spec(pipe, patch=pipe.transformer.config.patch_size, default_size=(1024, 1024))


def check_guidance(pipe: Pipeline, call: Call) -> None:
    """Refuse what would steer towards the negative prompt, and was meant as on a model card."""
    scale = call.guidance_scale
    if scale is not None and 0 <= scale < 1:
        raise InvalidArgumentError(
            f"guidance_scale counts from 1, the model as trained: for the {scale:g} of a model card of "
            f"Z-Image write {scale + 1:g}"
        )


def defaults(pipe: Pipeline) -> Defaults:
    """A scale of 6, which is 5 as diffusers counts it."""
    return Defaults(guidance_scale=6.0, strength=0.6, round_up=True)


def check(pipe: Pipeline) -> None:
    """The texts' states and the latents must be as wide as the transformer takes them.

    Raises:
        CheckpointError: parts of different models.
    """
    config = pipe.transformer.config
    check_text_width(pipe, pipe.text_encoder.config.hidden_size, config.cap_feat_dim)
    check_latent_channels(pipe, config.in_channels)


Z_IMAGE = Family(
    name="ZImage",
    folder=Folder(
        class_names=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        parts=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),  # Qwen3-4B
        check=check,
    ),
    defaults=defaults,
    encode=encode,
    latent_spec=latent_spec,
    grid=even_grid,
    combine=combine,
    check_guidance=check_guidance,
    text_widths=lambda pipe: TextWidths(pipe.transformer.config.cap_feat_dim, masked=True),
)
