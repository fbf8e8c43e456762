"""aMUSEd: images as tokens, unmasked in a few steps, the most certain first.

Patil et al. 2024 (arXiv:2401.01808), after MUSE (Chang et al. 2023). No path, no solver: `D.sample_tokens`
takes the steps of an `Unmasking`, and the codebook makes pixels of the tokens. Text-to-image, image-to-image
and inpainting are one call. `latents=` and `output="latents"` are tokens, int32 [N, h, w]; the mask token
(`pipe.mask_token()`) stands where nothing is known.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxldm import models
from jaxldm.data.pictures import shrink_masks
from jaxldm.errors import CheckpointError, InvalidArgumentError
from jaxldm.exact import floor_product
from jaxldm.models.config import height_width
from jaxldm.pipelines.call import Call, Defaults, Request
from jaxldm.pipelines.embeds import TextWidths
from jaxldm.pipelines.family import Family, Folder
from jaxldm.pipelines.inputs import (
    Inputs,
    Latents,
    LatentSpec,
    Size,
    check_rows,
    read_inputs,
    repeated,
)
from jaxldm.pipelines.latents import in_batches, over_images, scale_factor
from jaxldm.pipelines.network import Network
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.pipelines.prompts import encode_texts
from jaxldm.pipelines.tokens import (
    TEMPERATURE,
    InitialTokens,
    as_tokens,
    check_mask_token,
    mask_token,
    unmask_tokens,
    unmasking,
)


def encode(
    pipe: Pipeline,
    request: Request,
    *,
    original_size: Size | None = None,
    crops_coords_top_left: Size = (0, 0),
    aesthetic_score: float = 6.0,
    temperature: float | Sequence[float] = TEMPERATURE,
    mask_schedule: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """CLIP's penultimate states and its projected pooled state, and the micro-conditions.

    Args:
        original_size, crops_coords_top_left, aesthetic_score: (height, width) of a training picture as it
            was, default the size drawn; (top, left) where it was cut; and its score.
        temperature: of the noise on the confidence, from the first step to the last, or one for all: for
            `unmasking`.
        mask_schedule: a name of `D.MASK_SCHEDULES`, for `unmasking`; default the folder's ("cosine"), or
            "linear" with a mask, as published.
    """
    height, width = original_size or request.size
    # Width and height, but top and left: so the training counted them.
    numbers = np.asarray([width, height, *crops_coords_top_left, aesthetic_score], np.float32)

    def condition(texts: list[str]) -> dict[str, Any]:
        encoded = encode_texts(pipe.text_encoder, pipe.tokenizer, texts, skip=1, final_norm=False)
        return {
            "encoder_hidden_states": encoded.hidden,
            "pooled_text_emb": encoded.pooled,
            "micro_conds": np.tile(numbers, (len(texts), 1)),
        }

    return request.both(condition)


def text_widths(pipe: Pipeline) -> TextWidths:
    """The states, and the projected pooled one."""
    config = pipe.transformer.config
    return TextWidths(config.encoder_hidden_size, config.cond_embed_dim)


def token_inputs(pipe: Pipeline, call: Call, num_images: int) -> Inputs:
    """The size, the image and mask in pixels, and the tokens that a call starts from."""
    spec, tokens, height, width = pipe.latent_spec, call.latents, call.height, call.width
    if tokens is not None:
        if call.image is not None:
            raise InvalidArgumentError("image and latents are both a start: give one of them")
        tokens = as_tokens(pipe, tokens)
        check_rows(tokens, num_images, "latents")
        given = tuple(n * int(spec.factor) for n in tokens.shape[1:])
        height, width = given[0] if height is None else height, given[1] if width is None else width
    pixels = spec._replace(factor=1, channels=3)
    images = {"image": call.image, "mask_image": call.mask_image}
    if isinstance(call.image, Latents):
        raise InvalidArgumentError("image must be pixels: this model's latents are tokens, given as latents=")
    images["resize"] = call.resize
    inputs = read_inputs(pixels, num_images, height=height, width=width, **images)
    shape = spec.shape(inputs.size)[:2]
    if tokens is not None and tokens.shape[1:] != shape:
        given, wanted = ("x".join(map(str, sides)) for sides in (tokens.shape[1:], shape))
        raise InvalidArgumentError(f"latents are {given} tokens, {wanted} are needed")
    return inputs._replace(latents=tokens)


def initial_tokens(pipe: Pipeline, call: Call, inputs: Inputs, num_images: int) -> InitialTokens:
    """All masked, the caller's, those of an image, or those of the part of an image that stays."""
    mask, (height, width, _) = mask_token(pipe), pipe.latent_shape(inputs.size)
    if inputs.latents is not None:
        tokens = repeated(inputs.latents, num_images)
    elif inputs.image is None:
        tokens = np.full((num_images, height, width), mask, np.int32)
    else:
        tokens = image_tokens(pipe, repeated(inputs.image, num_images))
        if inputs.mask is None:
            return InitialTokens(tokens, np.full(num_images, height * width, np.int32), by_chance=True)
        white = shrink_masks(repeated(inputs.mask, num_images), int(pipe.latent_spec.factor))
        tokens = np.where(white[..., 0] > 0, np.int32(mask), tokens)
    return InitialTokens(tokens, (tokens == mask).sum((1, 2), dtype=np.int32))


def decode(pipe: Pipeline, tokens: Int[Any, "N h w"], **options: Any) -> Float[np.ndarray, "N H W C"]:
    """Images in [-1, 1] of tokens; options batch_size, devices, in_flight as in `in_batches`."""

    def run(vqvae: Network, batch: Any, mesh: Mesh) -> Any:
        return _decode(vqvae, batch, mesh=mesh)

    return in_batches(run, pipe.vqvae, np.asarray(tokens, np.int32), **options)


@functools.partial(jax.jit, static_argnames="mesh")
def _decode(vqvae: Network, tokens: Int[Array, "N h w"], *, mesh: Mesh) -> Float[Array, "N H W C"]:
    def on_one_device(vqvae, tokens):
        images = models.decode_indices(vqvae.module, vqvae.params, tokens)
        return 2 * jnp.clip(images, 0.0, 1.0) - 1

    return over_images(on_one_device, mesh)(vqvae, tokens)


def image_tokens(pipe: Pipeline, images: Float[Any, "N H W C"]) -> Int[np.ndarray, "N h w"]:
    """The tokens of images in [-1, 1]. Every different image is encoded once, alone."""
    known: dict[bytes, np.ndarray] = {}
    images = [np.asarray(image, np.float32) for image in images]
    for image in images:
        if image.tobytes() not in known:
            known[image.tobytes()] = np.asarray(_encode(pipe.vqvae, image[None]))[0]
    return np.stack([known[image.tobytes()] for image in images])


@jax.jit
def _encode(vqvae: Network, images: Float[Array, "N H W C"]) -> Int[Array, "N h w"]:
    return models.encode_indices(cast(Any, vqvae.module), vqvae.params, (images + 1) / 2)


def latent_spec(pipe: Pipeline) -> LatentSpec:
    """Tokens; in the model for 512 pixels the transformer halves them once more."""
    factor, config = scale_factor(pipe.vqvae), pipe.transformer.config
    size = cast(Size, tuple(side * factor for side in height_width(config.sample_size)))
    return LatentSpec(size, factor * (2 if config.downsample else 1), factor, 1)


def count_callbacks(pipe: Pipeline, num_images: int, **options: Any) -> int:
    """How often a call with these options calls its `progress`: the length of a progress bar."""
    steps = options.get("num_inference_steps") or pipe.defaults.num_inference_steps
    strength = options.get("strength")
    if options.get("image") is None or (strength is None and options.get("mask_image") is not None):
        strength = 1.0
    strength = pipe.defaults.strength if strength is None else strength
    return max(1, floor_product(steps, strength)) * -(-num_images // max(options.get("batch_size") or 1, 1))


def check(pipe: Pipeline) -> None:
    """Raise `CheckpointError` where the parts are of different models."""
    config = pipe.transformer.config
    check_mask_token(pipe)
    text, entries = pipe.text_encoder.config, pipe.vqvae.config.num_vq_embeddings
    for what, width, wanted in (
        ("text encoder gives states", text.hidden_size, config.encoder_hidden_size),
        ("text encoder gives a pooled text", text.projection_dim, config.cond_embed_dim),
        ("autoencoder has a codebook", entries, config.codebook_size),
    ):
        if width != wanted:
            raise CheckpointError(f"its {what} of {width}, its transformer takes {wanted}")


AMUSED = Family(
    name="Amused",
    folder=Folder(
        class_names=("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"),
        parts=("transformer", "vqvae", "text_encoder", "tokenizer", "scheduler"),  # CLIP ViT-L/14
        check=check,
    ),
    defaults=lambda pipe: Defaults(guidance_scale=10.0, strength=0.5, num_inference_steps=12),
    encode=encode,
    autoencoder="vqvae",
    latent_spec=latent_spec,
    grid=unmasking,
    is_guidance_distilled=lambda pipe: False,
    read_inputs=token_inputs,
    initial_latents=initial_tokens,
    denoise=unmask_tokens,
    decode=decode,
    num_callbacks=count_callbacks,
    unused=(
        *("solver", "eta", "variance", "spacing", "sigmas", "timesteps", "tiling", "previews", "cache"),
        "token_merging",
        *("guidance_rescale", "true_cfg_scale", "denoising_start", "denoising_end", "on_x0", "weak_guidance"),
    ),
    text_widths=text_widths,
    methods={"mask_token": mask_token, "image_tokens": image_tokens},
)
