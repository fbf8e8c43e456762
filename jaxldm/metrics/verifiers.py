"""Verifiers for `diffusion.search`: how well images fit their texts, by CLIP and by rules.

A verifier is a function of images [B, H, W, C] in [-1, 1] -> scores [B], more is better, made of JAX
operations: it is part of the compiled search. A model that works on latents decodes them first:

    verifier = metrics.clip_verifier(clip, params, tokenizer, prompts)
    score = lambda latents: verifier(decode(latents))
    found = D.search.best_of_n(key, denoise, solver, grid, x_T, score)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxldm.arguments import a_params, checked, function, several, text
from jaxldm.data.shapes import KINDS
from jaxldm.errors import InvalidArgumentError, shown
from jaxldm.metrics.clip import text_tokens
from jaxldm.metrics.shapes import asked_of, read_pixels

_SOME_TEXTS = several(text, "a list of texts")
_NOT_ASKED = -2  # no number of an attribute, and not `UNCLEAR`


@checked(params=a_params, tokenizer=function("(texts, max_length)"), prompts=_SOME_TEXTS)
def clip_verifier(
    module: Any, params: Any, tokenizer: Any, prompts: Sequence[str]
) -> Callable[[Float[Array, "B H W 3"]], Float[Array, " B"]]:
    """The verifier by CLIP score: the cosine between each image and its prompt (Hessel et al. 2021).

    As `clip_similarities`, without the rounding of images to 8 bits, and differentiable. What CLIP likes best
    need not be the best picture: measure what a search finds by another metric.

    Args:
        module: a `models.CLIPModel`, with its `params`: `checkpoints.load(folder)`.
        params: see above.
        tokenizer: that of the same model: `checkpoints.load_tokenizer(folder)`.
        prompts: one for each of B images, or one for all.

    Returns:
        images [B, H, W, 3] in [-1, 1] -> cosines [B].

    Raises:
        InvalidArgumentError: another module than CLIP, a tokenizer with tokens that it does not know, no
            prompt; when it is called, another number of images, or others than [B, H, W, 3].
    """
    from jaxldm import models  # late: other metrics need none
    from jaxldm.models.inputs import fitting

    tokens = text_tokens(module, tokenizer, prompts)

    def encode(params: Any, tokens: Any) -> Any:
        return module.apply({"params": params}, tokens, method="encode_text").text_embeds

    with fitting(module):
        texts = _unit(jax.jit(encode)(params, tokens))

    def verifier(images: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        _check_images(images, len(prompts))
        pixels = models.clip_inputs(images, module.config.vision_config.image_size)
        found = module.apply({"params": params}, pixels, method="encode_image").image_embeds
        return jnp.sum(_unit(found) * texts, axis=-1)

    return verifier


@checked(captions=_SOME_TEXTS)
def shapes_verifier(captions: Sequence[str]) -> Callable[[Float[Array, "B S S 3"]], Float[Array, " B"]]:
    """The verifier by rules: the share of a caption's attributes that an image of one shape shows.

    For captioned shapes (`jaxldm.data.shapes`), read from the pixels as by `metrics.shapes.read_shapes`,
    without a network. Rules have no gradient: under one the verifier raises an error.

    Args:
        captions: in the usual words, one for each of B images, or one for all.

    Returns:
        images [B, S, S, 3] in [-1, 1] -> scores [B] in [0, 1]; NaN for an image that is not finite.

    Raises:
        InvalidArgumentError: no caption, or one that names no attribute; when it is called, another number of
            images, or others than [B, S, S, 3] of 16 pixels or more.

    >>> verifier = shapes_verifier(["a large blue ring on the right"])
    >>> verifier(jnp.zeros((1, 16, 16, 3))).tolist()
    [0.0]
    """
    asked = _asked(captions)
    rules = _without_gradient(lambda images: _share_shown(images, asked))

    def verifier(images: Float[Array, "B S S 3"]) -> Float[Array, " B"]:
        _check_images(images, len(captions))
        if images.shape[1] != images.shape[2] or images.shape[1] < 16:
            raise InvalidArgumentError(
                f"images must be [B, S, S, 3] of 16 pixels or more to show a shape, got {list(images.shape)}"
            )
        return rules(images)

    return verifier


def _asked(captions: Sequence[str]) -> Int[np.ndarray, "K 5"]:
    """The number of each attribute that a caption names, else `_NOT_ASKED`."""
    if not captions:
        raise InvalidArgumentError("captions is empty: give one text or more")
    named = [asked_of(caption) for caption in captions]
    for row, (caption, found) in enumerate(zip(captions, named, strict=True)):
        if not found:
            raise InvalidArgumentError(
                f"captions[{row}] must name a shape, colour, size, place or background, got {shown(caption)}"
            )
    return np.array([[found.get(kind, _NOT_ASKED) for kind in KINDS] for found in named], np.int32)


def _share_shown(images: Float[Array, "B S S 3"], asked: Int[np.ndarray, "K 5"]) -> Float[Array, " B"]:
    pixels = jnp.clip(jnp.round((images.astype(jnp.float32) + 1) * 127.5), 0, 255)  # as `data.to_uint8`
    right = jnp.stack(read_pixels(pixels / 255, jnp), axis=1) == asked
    share = right.sum(1).astype(jnp.float32) / (asked != _NOT_ASKED).sum(1).astype(np.float32)
    return jnp.where(jnp.isfinite(images).all((1, 2, 3)), share, jnp.nan)


def _without_gradient(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, which raises `InvalidArgumentError` under a gradient in place of zeros."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def refuse(inputs: Any, tangents: Any) -> Any:
        raise InvalidArgumentError(
            "shapes_verifier has rules, which have no gradient: choose a search without one, such as "
            "D.search.best_of_n or D.search.steer, or give a classifier"
        )

    return wrapped


def _unit(vectors: Float[Array, "B D"]) -> Float[Array, "B D"]:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _check_images(images: Any, count: int) -> None:
    """Raises `InvalidArgumentError` for what are no images of RGB, one for each text."""
    if len(images.shape) != 4 or images.shape[-1] != 3:
        raise InvalidArgumentError(
            f"images must be [B, H, W, 3], got {list(images.shape)}: decode latents before the verifier"
        )
    if count not in (1, len(images)):
        raise InvalidArgumentError(
            f"the verifier has {count} texts for {len(images)} images: give one for each, or one for all"
        )
