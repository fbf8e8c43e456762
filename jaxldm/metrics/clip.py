"""CLIP score: how well images fit their texts (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxldm.arguments import a_params, array, checked, function, several, text
from jaxldm.data.images import to_uint8
from jaxldm.errors import DataError, InvalidArgumentError


@checked(
    params=a_params,
    tokenizer=function("(texts, max_length)"),
    images=array("floating", "[N, H, W, 3]", axes=4, filled=True),
    prompts=several(text),
)
def clip_similarities(
    module: Any, params: Any, tokenizer: Any, images: Float[np.ndarray, "N H W 3"], prompts: Sequence[str]
) -> Float[np.ndarray, "N K"]:
    """Returns the cosine between every image and every prompt in CLIP's common space.

    Args:
        module: a `models.CLIPModel`, with its `params`: `checkpoints.load(folder)`.
        params: see above.
        tokenizer: that of the same model: `checkpoints.load_tokenizer(folder)`.
        images: [N, H, W, 3] in [-1, 1]; resized and cropped as CLIP was trained.
        prompts: K texts.

    Raises:
        InvalidArgumentError: another module than CLIP, or a tokenizer with tokens that it does not know.
    """
    from jaxldm import models  # late: the other metrics need none
    from jaxldm.models.inputs import fitting

    tokens = text_tokens(module, tokenizer, prompts)
    pixels = models.clip_pixel_values(to_uint8(images), module.config.vision_config.image_size)
    apply = jax.jit(module.apply)
    with fitting(module):  # one image at a time: little memory
        logits = [apply({"params": params}, tokens, pixel[None]) for pixel in pixels]
    return np.concatenate(logits) / np.exp(np.asarray(params["logit_scale"]))


def text_tokens(module: Any, tokenizer: Any, prompts: Sequence[str]) -> Int[np.ndarray, "K T"]:
    """The tokens of prompts for CLIP's text tower.

    Raises:
        InvalidArgumentError: another module than CLIP, no prompts, or a tokenizer with tokens that it does
            not know.
    """
    from jaxldm import models
    from jaxldm.models.text_encoder import check_token_ids

    if not isinstance(module, models.CLIPModel):
        raise InvalidArgumentError(f"CLIP score needs a CLIPModel, got {type(module).__name__}")
    if not prompts:
        raise InvalidArgumentError("prompts is empty: give one text or more")
    length = module.config.text_config.max_position_embeddings
    tokens = np.asarray(tokenizer(list(prompts), max_length=length).input_ids)
    check_token_ids(module.config.text_config, tokens)
    return tokens


@checked(similarities=array("real", "[N, K]", axes=2), prompt_of=array("whole", "[N]", axes=1))
def clip_score(
    similarities: Float[np.ndarray, "N K"], prompt_of: Sequence[int] | Int[np.ndarray, " N"]
) -> float:
    """Returns the mean of 100 max(cos, 0) between each image and its own prompt.

    Args:
        similarities: [N, K] from `clip_similarities`.
        prompt_of: for each image the number of its prompt, in [0, K).

    Raises:
        DataError: not one prompt for each image.

    >>> round(clip_score(np.array([[0.3, 0.1], [0.2, 0.25]]), [0, 1]), 6)
    27.5
    """
    own = np.asarray(prompt_of)
    if own.shape != similarities.shape[:1]:
        raise DataError(f"prompt_of must be [{len(similarities)}], one entry for each image, got {own.shape}")
    number = similarities.shape[1]
    if ((own < 0) | (own >= number)).any():
        raise DataError(
            f"prompt_of must hold numbers of prompts, 0 to {number - 1}, got {own.min()} to {own.max()}"
        )
    return float(100 * np.maximum(similarities[np.arange(len(own)), own], 0).mean())
